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
