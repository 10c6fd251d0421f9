"""Mixture-of-experts feed-forward for serving."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops

__all__ = ["moe_experts", "moe_route"]


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

    Inference only: there is no gradient. Sums are in float32; the hidden layer is rounded to x's dtype where the CPU
    multiplies bfloat16 itself.

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


def moe_route(
    x: Tensor,
    gate: Tensor,
    bias: Tensor,
    top_k: int,
    num_groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    factor: float = 1.0,
    num_shared: int = 0,
) -> tuple[Tensor, Tensor]:
    """Experts of each token by sigmoid scores with a bias that decides the choice but not the weight.

    score = sigmoid(gate x); the `top_k` experts with the largest score + bias are chosen, among the experts of the
    `topk_groups` groups (of `num_groups` equal ones) whose two best choices sum highest. Inference only.

    Args:
        x: [T, D], the tokens.
        gate: [E, D] float32. bias: [E] float32.
        top_k: experts a token, in [1, E].
        num_groups, topk_groups: grouped choice; 1 is none. num_groups divides E.
        renormalize: divide the chosen scores by their sum.
        factor: of the weights, after renormalising.
        num_shared: experts E, E+1, ... that every token also gets, with weight 1.

    Returns:
        (ids [T, top_k + num_shared] int32, weights [T, top_k + num_shared] float32), as `moe_experts` takes them. The
        order of the chosen experts is not specified. A token gets the same bits alone or in a batch.

    Raises:
        ValueError: a shape, dtype or count does not fit; the message names the argument.
    """
    experts = gate.shape[0]
    if x.dim() != 2 or gate.dim() != 2 or gate.shape[1] != x.shape[1]:
        raise ValueError(f"gate must be [E, D] for x [T, D], got shapes {tuple(gate.shape)} and {tuple(x.shape)}")
    if tuple(bias.shape) != (experts,):
        raise ValueError(f"bias must be [{experts}] to match gate, got shape {tuple(bias.shape)}")
    if gate.dtype != bias.dtype or gate.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"gate and bias must be float32, got {gate.dtype} and {bias.dtype}: convert them once")
    if num_groups < 1 or experts % num_groups or not 1 <= topk_groups <= num_groups:
        raise ValueError(
            f"num_groups must divide the {experts} experts and topk_groups be in [1, num_groups], "
            f"got {num_groups} and {topk_groups}"
        )
    if not 1 <= top_k <= experts // num_groups * topk_groups:
        raise ValueError(f"top_k must be in [1, {experts // num_groups * topk_groups}], got {top_k}")
    if num_shared < 0:
        raise ValueError(f"num_shared must not be negative, got {num_shared}")
    return ops.moe_route(x, gate, bias, top_k, num_groups, topk_groups, renormalize, factor, num_shared)
