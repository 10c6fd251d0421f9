"""Seer's drafter in a real vLLM on the CPU: the same tokens with it and without, and siblings that draft."""

from __future__ import annotations

import collections
import random
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM")
pytest.importorskip("zmq")

from verl_seer.drafting.link import DraftService
from verl_seer.drafting.names import chunk_name, response_name
from verl_seer.drafting.store import DraftServer

pytestmark = pytest.mark.slow

KIMI = Path(__file__).resolve().parents[2] / "models" / "checkpoints" / "tiny-linear"
GROUPS, SIBLINGS, TOKENS = 4, 4, 64


def prompt(group: int, length: int, vocabulary: int) -> list[int]:
    rng = random.Random(group)
    return [rng.randrange(3, vocabulary) for _ in range(length)]


def rollout(vocabulary: int, tokens: int = TOKENS) -> list[tuple[str, list[int], dict]]:
    """Groups of siblings, the first of each a probe. Siblings ask for different lengths, so that rows come and go."""
    return [
        (
            chunk_name(response_name(f"g{g}", s, "r", 0), 0, 0, 0, s == 0),
            prompt(g, 5 + 30 * g, vocabulary),
            {"max_tokens": tokens - 7 * s},
        )
        for g in range(GROUPS)
        for s in range(SIBLINGS)
    ]


@pytest.fixture(scope="module")
def without(start, dense):
    """An engine without drafts."""
    return start(dense)


@pytest.fixture(scope="module")
def plain(without):
    """What a dense model samples without drafts, by name."""
    return without.run(rollout(320))["tokens"]


def sampled(engine, count):
    """How often each triple of tokens was sampled, of one prompt."""
    options = {"max_tokens": 3, "temperature": 0.6, "top_k": 3}
    requests = [(f"s{i}", [5, 6, 7], {**options, "seed": i}) for i in range(count)]
    return collections.Counter(map(tuple, engine.run(requests)["tokens"].values()))


def test_a_dense_model_samples_the_same_with_drafts(start, dense, drafting, request):
    """Greedy, with cut prompts and with so little KV memory that requests are preempted and come back.

    The probes run first: what they say, their siblings say too, so that almost all drafts must be right.
    """
    engine = start(
        dense,
        block_size=32,
        num_gpu_blocks_override=24,
        max_num_batched_tokens=64,
        **drafting(6, adaptive=False),
    )
    plain = request.getfixturevalue("plain")  # which starts this engine
    requests = rollout(320)
    alone = engine.run([r for r in requests if r[0].endswith("p")])
    before = engine.counts()
    siblings = engine.run([r for r in requests if not r[0].endswith("p")])
    assert alone["tokens"] | siblings["tokens"] == plain
    assert siblings["preemptions"] > 0
    counts = {name: value - before[name] for name, value in engine.counts().items()}
    assert counts["accepted"] > 0.8 * counts["drafted"] > 0, counts
    # Requests that Seer has not named draft for those with the same prompt.
    foreign = [(f"x{i}", p, o) for i, (_, p, o) in enumerate(requests)]
    first = engine.run(foreign[::4])["tokens"]
    before = engine.counts()
    rest = engine.run([f for i, f in enumerate(foreign) if i % 4])["tokens"]
    both = first | rest
    assert [both[name] for name, *_ in foreign] == [plain[name] for name, *_ in requests]
    counts = {name: value - before[name] for name, value in engine.counts().items()}
    assert counts["accepted"] > 0.8 * counts["drafted"] > 0, counts

    # And at a temperature: two samples of at most 27 outcomes. The statistic is chi-squared with 26 degrees of
    # freedom, of which 64 is the 99.995th percentile. Without `_mend_sampler` hardly a draft is accepted.
    before = engine.counts()
    ours, stock = sampled(engine, 1500), sampled(request.getfixturevalue("without"), 1500)
    assert engine.counts()["accepted"] - before["accepted"] > 300
    assert sum((ours[k] - stock[k]) ** 2 / (ours[k] + stock[k]) for k in ours | stock) < 64, (ours, stock)


def test_kimi_linear_samples_the_same_with_drafts(start, drafting):
    """Rejected drafts leave no trace in the KDA states: siblings that part from one another, adaptive lengths."""
    engines = start(KIMI), start(KIMI, **drafting(6))
    requests = [
        (n, p, {**o, "repetition_penalty": 1.3 if n.endswith("p") else 1.0}) for n, p, o in rollout(1024)
    ]
    want, got = (engine.run(requests)["tokens"] for engine in engines)
    assert got == want
    assert engines[1].run([("k", [5, 6, 7], {"max_tokens": 9, "temperature": 1, "top_k": 1, "seed": 0})])
    counts = engines[1].counts()
    assert 0 < counts["accepted"] < counts["drafted"], counts


def test_an_engine_drafts_from_what_another_engine_sampled(start, dense, drafting, plain):
    """Two engines and a draft server. A's response comes to B, where a sibling runs chunk by chunk."""
    service = DraftService(DraftServer(), "tcp://127.0.0.1:0")
    options = drafting(6, adaptive=False, update_seconds=0.001)
    a, b = start(dense, **options), start(dense, **options)
    name, text, sampling = rollout(320)[0]
    try:
        for engine in (a, b):
            engine.ready().connect(service.address)
        assert a.run([(name, text, sampling)])["tokens"][name] == plain[name]
        a.run([("other", [7, 8, 9], {"max_tokens": 4})])  # takes what is left of the response to the server
        sibling, out = response_name("g0", 1, "r", 0), []
        for attempt in range(TOKENS // 4):
            chunk = chunk_name(sibling, 0, len(out), attempt, False)
            out += b.run([(chunk, text + out, {"max_tokens": 4})])["tokens"][chunk]
            before = b.counts()
            if before["received"] == TOKENS:
                break
            time.sleep(0.2)
        assert 0 < len(out) < TOKENS // 2
        chunk = chunk_name(sibling, 0, len(out), 99, False)
        last = b.run([(chunk, text + out, {"max_tokens": TOKENS - len(out)})])
        assert out + last["tokens"][chunk] == plain[name]
        counts = {key: value - before[key] for key, value in b.counts().items()}
        assert counts["accepted"] == counts["drafted"] > 0
        assert last["steps"] <= 3 + (TOKENS - len(out)) // 7
        stats = service.stats()
        assert stats["groups"] == 2 and len(stats["engines"]) == 2

        # New weights in an engine void what the old ones said; new weights for the server void it everywhere.
        b.reload()
        service.new_weights()
        before = b.counts()
        fresh = chunk_name(response_name("g0", 2, "r", 0), 0, 0, 0, False)
        assert b.run([(fresh, text, sampling)])["tokens"][fresh] == plain[name]
        counts = {key: value - before[key] for key, value in b.counts().items()}
        assert counts["accepted"] < TOKENS // 2 and counts["received"] == 0
    finally:
        service.close()
    # Without a server both go on alone.
    again = chunk_name(response_name("g0", 3, "r", 0), 0, 0, 0, False)
    assert b.run([(again, text, sampling)])["tokens"][again] == plain[name]
