"""Linear maps of a few tokens on the native library."""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from .. import _native, dispatch

# Above this many tokens torch's products (oneDNN) have the better blocking; below, reading the weights once and no
# repacking win (measured on Zen 4 with torch 2.13: 1.0 to 2.5 times the speed up to here).
MOST_TOKENS = 128

_ARGS = struct.Struct("14q")  # csrc/linear.h: LinearArgs


def refuses_tokens(count: int) -> str | None:
    """Why the native products do not take this many tokens, or None."""
    return f"meant for at most {MOST_TOKENS} tokens, got {count}" if count > MOST_TOKENS else None


def _call(x: Tensor, weight: Tensor, out: Tensor, batch: int, strides: tuple[int, ...]) -> None:
    """`strides` are those of x's batch and token, weight's batch, and out's batch and token."""
    arguments = _ARGS.pack(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        *(batch, x.shape[-2], *weight.shape[:-3:-1]),
        *strides,
        _native.DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
    )
    _native.kernel("batched_linear", "p")(ctypes.c_char_p(arguments))


def _linear_refuses(x: Tensor, weight: Tensor) -> str | None:
    reason = refuses_tokens(x.shape[0])
    if reason:
        return reason
    if x.stride(1) != 1 or not weight.is_contiguous():
        return "needs contiguous rows of x and a contiguous weight"
    return _native.refuses_dtype(x, weight)


@dispatch.register("linear", "cpu", _linear_refuses)
def linear(x: Tensor, weight: Tensor) -> Tensor:
    rows = weight.shape[0]
    out = torch.empty((x.shape[0], rows), dtype=x.dtype)
    _call(x, weight, out, 1, (0, x.stride(0), 0, 0, rows))
    return out


def _batched_refuses(x: Tensor, weight: Tensor) -> str | None:
    reason = refuses_tokens(x.shape[1])
    if reason:
        return reason
    if x.stride(2) != 1 or weight.stride(2) != 1 or weight.stride(1) != weight.shape[2]:
        return "needs contiguous rows of x and contiguous matrices in weight"
    return _native.refuses_dtype(x, weight)


@dispatch.register("batched_linear", "cpu", _batched_refuses)
def batched_linear(x: Tensor, weight: Tensor) -> Tensor:
    batch, tokens, _ = x.shape
    rows = weight.shape[1]
    out = torch.empty((batch, tokens, rows), dtype=x.dtype)
    _call(x, weight, out, batch, (x.stride(0), x.stride(1), weight.stride(0), tokens * rows, rows))
    return out
