"""What prepared layers share: may they call the native library, and with which tokens."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .. import _native
from ..projection.cpu import MOST_TOKENS

__all__ = ["MOST_TOKENS", "check_hidden", "int32", "native_refusal"]


def native_refusal(*weights: Tensor | None) -> str | None:
    """Why the native library cannot run a layer with these weights here, or None."""
    forced = os.environ.get("KIMI_KERNELS_BACKEND")
    if forced not in (None, "", "cpu"):
        return f"KIMI_KERNELS_BACKEND={forced}"
    for weight in weights:
        if weight is not None and weight.device.type != "cpu":
            return f"takes CPU tensors, got {weight.device}"
        if weight is not None and not weight.is_contiguous():
            return "needs contiguous weights"
    return _native.unavailable() or _native.refuses_dtype(*weights)


def check_hidden(hidden: Tensor, like: Tensor) -> None:
    """`hidden` is [T, K] for a weight [N, K]."""
    if hidden.dim() != 2 or hidden.shape[1] != like.shape[-1] or hidden.dtype != like.dtype:
        raise ValueError(
            f"hidden must be {like.dtype} [T, {like.shape[-1]}], got {hidden.dtype} {tuple(hidden.shape)}"
        )


def int32(x: Tensor) -> Tensor:
    """x as contiguous int32."""
    return x if x.dtype == torch.int32 and x.is_contiguous() else x.to(torch.int32).contiguous()
