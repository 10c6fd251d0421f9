"""The same tokens whatever shares the batch, however a prompt is cut, whatever is evicted, cached or drafted."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[{}, {"attn_res_block_size": 2}], ids=["additive", "attnres"])
def model(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(**request.param)


@pytest.fixture(scope="module")
def alone(engine: Any, model: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """Each prompt served by itself, without a prefix cache: what everything else must equal."""
    answer = engine(model, *[[p] for p in prompts], tokens=32, enable_prefix_caching=False)
    assert "error" not in answer, answer.get("traceback")
    return {"tokens": [r["tokens"][0] for r in answer["rounds"]]}


def ok(answer: dict[str, Any]) -> dict[str, Any]:
    assert "error" not in answer, answer.get("traceback")
    return answer


def test_batch_and_second_run(engine: Any, model: Path, alone: dict[str, Any], prompts: list[list[int]]) -> None:
    """All 32 at once, twice; then in another order, eight at a time, so that requests come and go."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(3)).tolist()
    rounds = ok(engine(model, prompts, prompts, tokens=32, enable_prefix_caching=False))["rounds"]
    assert rounds[0]["tokens"] == rounds[1]["tokens"] == alone["tokens"]
    assert rounds[0]["logprobs"] == rounds[1]["logprobs"]
    mixed = ok(engine(model, [prompts[i] for i in order], tokens=32, max_num_seqs=8))["rounds"][0]
    assert mixed["tokens"] == [alone["tokens"][i] for i in order]


@pytest.mark.parametrize("chunk", [33, 96])
def test_prefill_chunk(
    engine: Any, model: Path, alone: dict[str, Any], prompts: list[list[int]], chunk: int
) -> None:
    """Prompts cut at many places and mixed with running decodes."""
    answer = ok(engine(model, prompts, tokens=32, max_num_batched_tokens=chunk, enable_prefix_caching=False))
    assert answer["chunked_prefill"]
    assert answer["rounds"][0]["tokens"] == alone["tokens"]


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_preemption(
    engine: Any, model: Path, alone: dict[str, Any], prompts: list[list[int]], prefix_caching: bool
) -> None:
    """So few cache blocks that running requests lose theirs and start over."""
    answer = ok(
        engine(
            model, prompts, tokens=32, block_size=16, num_gpu_blocks_override=24, enable_prefix_caching=prefix_caching
        )
    )  # fmt: skip
    assert answer["preemptions"] > 0
    assert answer["rounds"][0]["tokens"] == alone["tokens"]


def test_prefix_cache_hit(engine: Any, model: Path, alone: dict[str, Any], prompts: list[list[int]]) -> None:
    """A second round reuses latent rows and KDA states of the first; longer prompts reuse those of shorter ones."""
    answer = ok(engine(model, prompts, prompts, tokens=32, block_size=16))
    assert answer["prefix_caching"]
    first, second = answer["rounds"]
    assert first["tokens"] == second["tokens"] == alone["tokens"]
    block = answer["block_size"]
    hits = [c for c, p in zip(second["cached"], prompts) if len(p) > block]
    assert hits and all(c >= block for c in hits)

    shared = (prompts[-1] * 3)[: 2 * block + 5]
    extended = [shared, [*shared, 7, 8, 9], [*shared, 11]]
    plain = ok(engine(model, *[[p] for p in extended], tokens=16, enable_prefix_caching=False))["rounds"]
    cached = ok(engine(model, *[[p] for p in extended], tokens=16, block_size=16))["rounds"]
    assert [r["tokens"] for r in cached] == [r["tokens"] for r in plain]
    assert [r["cached"][0] for r in cached] == [0, 2 * block, 2 * block]


def repetitive() -> list[list[int]]:
    """Prompts that drafters find continuations in, beside random ones in which they do not."""
    rng = torch.Generator().manual_seed(5)
    random = [torch.randint(3, 512, (n,), generator=rng).tolist() for n in (1, 3, 20, 70)]
    return [[5, 6, 7, 8] * 10 + [9], [11, 12, 13] * 20, [3, 4] * 30, *random]


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_speculative_decoding(
    engine: Any, new_host: Callable[..., Any], model: Path, method: str
) -> None:
    """Rejected drafts leave no trace in conv histories or KDA states; also with preemption and cut prompts.

    One prompt of one token starts beside running requests: vLLM pads it with empty drafts.
    """
    if method == "suffix" and importlib.util.find_spec("arctic_inference") is None:
        pytest.skip("vLLM's suffix drafter needs the package arctic-inference")
    prompts = repetitive()
    plain = ok(engine(model, prompts, tokens=48, enable_prefix_caching=False))["rounds"][0]
    drafts = {"method": method, "num_speculative_tokens": 3}
    if method == "ngram":
        drafts |= {"prompt_lookup_min": 1, "prompt_lookup_max": 4}
    # A process of its own: vLLM's CPU drafters rebind kernels in place, which works once in a process.
    host = new_host()
    answer = ok(
        host(
            model, prompts, prompts, tokens=48, speculative_config=drafts, block_size=16, num_gpu_blocks_override=40,
            max_num_batched_tokens=48,
        )
    )  # fmt: skip
    host.close()
    assert [r["tokens"] for r in answer["rounds"]] == [plain["tokens"]] * 2
