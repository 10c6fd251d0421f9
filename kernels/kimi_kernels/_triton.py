"""What the Triton backends share: whether they can run here, and how a kernel is launched and compiled.

Importing this does not import triton. An op's kernels are in its folder's `triton_kernels.py`, which does; its host
side, `triton.py`, imports the kernels when they are first run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Config(NamedTuple):
    """How a kernel is compiled: its compile-time constants, warps of a program, stages of its pipelined loops."""

    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2


class Variant(NamedTuple):
    """One way in which a kernel is compiled in use: a row of an op's `aot_variants()`, for `benchmarks.aot`."""

    name: str
    kernel: Any
    signature: Mapping[str, str | tuple[str, ...]]  # of arguments that are no constants: "*bf16", ("i32", "i32")
    config: Config
    backward: bool = False
    amd: Config | None = None  # where it differs


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def unavailable() -> str | None:
    """Why no Triton kernel can run in this process, or None."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def cannot_run_on(device: str) -> str | None:
    """Why Triton kernels cannot take tensors of this device type, or None."""
    if device == "cpu" and not interpreting():
        return "takes GPU tensors, got cpu; TRITON_INTERPRET=1 runs the kernels in Triton's interpreter"
    return None


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and `least`, the smallest side of a matrix product."""
    return max(least, 1 << (n - 1).bit_length())


def on_amd() -> bool:
    return torch.version.hip is not None


def float32_products() -> str:
    """`input_precision` of `tl.dot` for float32 results: what AMD lacks, NVIDIA does on its matrix units."""
    return "ieee" if on_amd() else "tf32x3"


def rows(x: Tensor) -> Tensor:
    """`x` with its last dimension contiguous, as the kernels read it; others may have any stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, config: Config) -> None:
    """Run `kernel` with `config` on `like`'s device; a grid without programs launches nothing."""
    if 0 in grid:
        return
    guard: Callable[[Any], Any] = torch.cuda.device if like.is_cuda else contextlib.nullcontext
    with guard(like.device):
        kernel[grid](*args, **config.constants, num_warps=config.num_warps, num_stages=config.num_stages)
