"""Tensor and pipeline parallel engines give the tokens of a single one (gloo, two processes)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(new_host: Callable[..., Any]) -> Any:
    """A process whose engines run their two workers on one core each."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    return new_host(VLLM_CPU_OMP_THREADS_BIND=f"{cores[0]}|{cores[1]}")


@pytest.mark.parametrize(
    ("changes", "parallel"),
    [
        ({"vocab_size": 500, "num_shared_experts": 2}, {"tensor_parallel_size": 2}),
        ({"attn_res_block_size": 3, "layers": 8, "vocab_size": 500}, {"pipeline_parallel_size": 2}),
    ],
    ids=["tensor, odd vocabulary", "pipeline, attnres, cut inside a block"],
)
def test_equals_one_process(
    engine: Any,
    pair: Any,
    checkpoint: Callable[..., Path],
    prompts: list[list[int]],
    changes: dict[str, Any],
    parallel: dict[str, int],
) -> None:
    folder = checkpoint(**changes)
    some = [[t % 497 + 3 for t in prompt] for prompt in prompts[::3]]
    one = engine(folder, some, tokens=16)
    two = pair(folder, some, tokens=16, max_num_batched_tokens=160, **parallel)
    assert "error" not in one, one.get("traceback")
    assert "error" not in two, two.get("traceback")
    assert two["rounds"][0]["tokens"] == one["rounds"][0]["tokens"]
