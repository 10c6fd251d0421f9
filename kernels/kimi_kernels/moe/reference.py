"""A mixture of SwiGLU experts in plain torch: one product per expert that has tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch


@dispatch.register("moe_experts", "reference")
def moe_experts(x: Tensor, w13: Tensor, w2: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    acc = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(x.shape, dtype=acc, device=x.device)
    for expert in range(w13.shape[0]):
        token, choice = torch.nonzero(topk_ids == expert, as_tuple=True)
        if token.numel() == 0:
            continue
        gate, up = (x[token].to(acc) @ w13[expert].to(acc).T).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ w2[expert].to(acc).T
        out.index_add_(0, token, y * topk_weights[token, choice, None].to(acc))
    return out.to(x.dtype)


@dispatch.register("moe_route", "reference")
def moe_route(
    x: Tensor,
    gate: Tensor,
    bias: Tensor,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    renormalize: bool,
    factor: float,
    num_shared: int,
) -> tuple[Tensor, Tensor]:
    scores = F.linear(x.to(gate.dtype), gate).sigmoid()
    choice = scores + bias
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))
        strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(strength, dtype=torch.bool)
        kept.scatter_(1, strength.topk(topk_groups, dim=-1).indices, True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)
    ids = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * factor
    if num_shared:
        shared = torch.arange(gate.shape[0], gate.shape[0] + num_shared, device=x.device)
        ids = torch.cat((ids, shared.expand(x.shape[0], -1)), dim=1)
        weights = torch.cat((weights, weights.new_ones((x.shape[0], num_shared))), dim=1)
    return ids.to(torch.int32), weights
