"""Two real vLLM engines that share KV blocks through host memory: what one computed, the other does not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

pytestmark = pytest.mark.slow

BLOCK, CHUNK, TOKENS = 32, 64, 256
KIMI = Path(__file__).resolve().parents[2] / "models" / "checkpoints" / "tiny-linear"


def pool(folder, **extra):
    return {
        "kv_transfer_config": {
            "kv_connector": "SeerKVPool",
            "kv_connector_module_path": "verl_seer.kv_pool",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"folder": str(folder), **extra},
        }
    }


def prompts():
    rng = random.Random(2)
    return [[rng.randrange(3, 320) for _ in range(n)] for n in (3, 40, 90)]


def divided(engines):
    """Each response in chunks, every chunk on the next engine. (tokens, prompt tokens computed)"""
    out = {i: [] for i in range(len(prompts()))}
    computed = 0
    for attempt in range(TOKENS // CHUNK):
        requests = [(f"{i}-{attempt}", p + out[i], {"max_tokens": CHUNK}) for i, p in enumerate(prompts())]
        answer = engines[attempt % len(engines)].run(requests)
        for i, (name, prompt, _) in enumerate(requests):
            out[i] += answer["tokens"][name]
            computed += len(prompt) - answer["cached"][name]
    return list(out.values()), computed


def test_a_chunk_that_moves_brings_its_kv_along(start, dense, drafting, tmp_path):
    """Also when drafts are verified; and not after new weights."""
    folder, sizes = tmp_path / "kv", {"block_size": BLOCK}
    engines = [start(dense, **sizes) for _ in range(2)]
    engines += [start(dense, **sizes, **pool(folder)), start(dense, **sizes, **pool(folder), **drafting(4))]
    for engine in engines:
        engine.ready()  # an engine that starts empties the folder
    plain, pooled = engines[:2], engines[2:]
    text, without = divided(plain)
    whole = plain[0].run([(f"w{i}", p, {"max_tokens": TOKENS}) for i, p in enumerate(prompts())])["tokens"]
    assert text == list(whole.values())
    same, computed = divided(pooled)
    assert same == text
    print(f"prompt tokens computed: {without} without the pool, {computed} with it")
    # Of a chunk that moved, what is not a full block; drafts accepted in the last step may cost one block more.
    moves = (TOKENS // CHUNK - 1) * len(prompts())
    assert computed <= sum(map(len, prompts())) + moves * BLOCK + moves // 2 * BLOCK < without
    size = BLOCK * 64 * 4 * 2 * 2  # keys and values of 2 layers, in float32
    assert {(f.suffix, f.stat().st_size) for f in folder.iterdir()} == {(".kv", size)}, "no pin is left"
    for engine in pooled:
        engine.reset()
    assert not list(folder.iterdir()), "new weights empty the pool"


@pytest.mark.parametrize("other", ["cache_salt", "lora_request", "mm_features", "prompt_embeds"])
def test_kv_that_does_not_follow_from_the_tokens_stays_out_of_the_pool(other):
    import torch
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

    from verl_seer.kv_pool import _named_by_tokens

    params = SamplingParams(max_tokens=4)
    given = {
        "cache_salt": "somebody's",
        "lora_request": LoRARequest("adapter", 1, "/nowhere"),
        "mm_features": [object()],
        "prompt_embeds": torch.zeros(3, 8),
    }[other]
    assert _named_by_tokens(Request("a", [1, 2, 3], params, None))
    assert not _named_by_tokens(Request("b", [1, 2, 3], params, None, **{other: given}))


def test_models_with_a_recurrent_state_are_refused(start, tmp_path):
    engine = start(KIMI, **pool(tmp_path / "kv"))
    with pytest.raises(
        RuntimeError, match="SeerKVPool goes with models whose layers all have full attention"
    ):
        engine.ready()
