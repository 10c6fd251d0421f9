"""Batched linear maps of a few tokens on the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native, dispatch

# Above this many tokens torch's products (oneDNN) have the better blocking; below, reading the weights once and no
# repacking win (measured on Zen 4 with torch 2.13: 1.0 to 2.5 times the speed up to here).
_MOST_TOKENS = 128


def _refuses(x: Tensor, weight: Tensor) -> str | None:
    if x.shape[1] > _MOST_TOKENS:
        return f"meant for at most {_MOST_TOKENS} tokens, got {x.shape[1]}"
    if x.stride(2) != 1 or weight.stride(2) != 1 or weight.stride(1) != weight.shape[2]:
        return "needs contiguous rows of x and contiguous matrices in weight"
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
