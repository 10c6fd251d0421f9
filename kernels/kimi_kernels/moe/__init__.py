"""Mixture-of-experts feed-forward for serving."""

from __future__ import annotations

from torch import Tensor

from . import ops

__all__ = ["moe_experts"]


def _validate(x: Tensor, w13: Tensor, w2: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be [T, D], got shape {tuple(x.shape)}: flatten the tokens")
    if w2.dim() != 3 or w2.shape[1] != x.shape[1]:
        raise ValueError(f"w2 must be [E, {x.shape[1]}, I] to match x, got shape {tuple(w2.shape)}")
    expected = (w2.shape[0], 2 * w2.shape[2], x.shape[1])
    if tuple(w13.shape) != expected:
        raise ValueError(f"w13 must be [E, 2 I, D] = {expected}, got shape {tuple(w13.shape)}")
    if topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(f"topk_ids must be [{x.shape[0]}, k], got shape {tuple(topk_ids.shape)}")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights must have the shape of topk_ids {tuple(topk_ids.shape)}, "
            f"got {tuple(topk_weights.shape)}"
        )


def moe_experts(x: Tensor, w13: Tensor, w2: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """sum_j topk_weights[t, j] * w2[e] (silu(gate[e] x[t]) * (up[e] x[t])) with e = topk_ids[t, j].

    Inference only: there is no gradient. Products and sums are in float32.

    Args:
        x: [T, D], the tokens.
        w13: [E, 2 I, D], per expert the I gate rows, then the I up rows; x's dtype.
        w2: [E, D, I], the down projections; x's dtype.
        topk_ids: [T, k] integers, the chosen experts; an id outside 0..E-1 (an expert that lives elsewhere,
            padding) adds nothing.
        topk_weights: [T, k] float32, factors of the chosen experts' outputs.

    Returns:
        [T, D] in x's dtype. A token gets the same bits alone or in a batch.
    """
    _validate(x, w13, w2, topk_ids, topk_weights)
    return ops.moe_experts(x, w13, w2, topk_ids, topk_weights)
