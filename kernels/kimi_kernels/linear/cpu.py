"""Batched linear maps of a few tokens on the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native, dispatch

# Above this many tokens torch.bmm (oneDNN) has the better blocking; below, its set-up of 80 to 100 microseconds a call
# costs more than the product (Zen 4, torch 2.13).
_MOST_TOKENS = 16


def _refuses(x: Tensor, weight: Tensor) -> str | None:
    if x.shape[1] > _MOST_TOKENS:
        return f"meant for at most {_MOST_TOKENS} tokens"
    if x.stride(2) != 1 or weight.stride(2) != 1 or weight.stride(1) != weight.shape[2]:
        return "needs contiguous rows of x and contiguous matrices in weight"
    if weight.shape[1] % 4:
        return f"needs a multiple of 4 outputs, got {weight.shape[1]}"
    return _native.refuses_dtype(x, weight)


@dispatch.register("batched_linear", "cpu", _refuses)
def batched_linear(x: Tensor, weight: Tensor) -> Tensor:
    batch, tokens, width = x.shape
    out = torch.empty((batch, tokens, weight.shape[1]), dtype=x.dtype)
    _native.kernel("batched_linear", "ppp" + "iiiiiiiii")(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        batch,
        tokens,
        width,
        weight.shape[1],
        x.stride(0),
        x.stride(1),
        weight.stride(0),
        _native.DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
    )
    return out
