"""Matrix products of a decode step: projections, and one product per head or gate."""

from __future__ import annotations

from torch import Tensor

from . import ops

__all__ = ["batched_linear", "linear"]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """out[t] = weight x[t]. Inference only: there is no gradient. Sums are in float32.

    Args:
        x: [T, K]. weight: [N, K], in x's dtype.

    Returns:
        [T, N] in x's dtype, contiguous.

    Raises:
        ValueError: the shapes do not fit.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"weight must be [N, K] for x [T, K], got shapes {tuple(weight.shape)} and {tuple(x.shape)}"
        )
    return ops.linear(x, weight)


def batched_linear(x: Tensor, weight: Tensor) -> Tensor:
    """out[b, t] = weight[b] x[b, t]. Inference only: there is no gradient. Sums are in float32.

    Args:
        x: [B, T, K], any strides.
        weight: [B, N, K], any strides; x's dtype.

    Returns:
        [B, T, N] in x's dtype, contiguous.

    Raises:
        ValueError: the shapes do not fit.
    """
    if x.dim() != 3 or weight.dim() != 3 or x.shape[0] != weight.shape[0] or x.shape[2] != weight.shape[2]:
        raise ValueError(
            f"weight must be [B, N, K] for x [B, T, K], got shapes {tuple(weight.shape)} and {tuple(x.shape)}"
        )
    return ops.batched_linear(x, weight)
