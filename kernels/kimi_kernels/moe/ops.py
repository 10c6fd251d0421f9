"""The custom op of the expert mixture: what torch.compile sees."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .._library import custom_op
from . import cpu, reference  # noqa: F401  (register the backends)


@custom_op("kimi::moe_experts", mutates_args=())
def moe_experts(x: Tensor, w13: Tensor, w2: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    return dispatch.run("moe_experts", x.device, x, w13, w2, topk_ids, topk_weights)


@moe_experts.register_fake
def _(x, w13, w2, topk_ids, topk_weights):
    return x.new_empty(x.shape)


@custom_op("kimi::moe_route", mutates_args=())
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
    return dispatch.run(
        "moe_route", x.device, x, gate, bias, top_k, num_groups, topk_groups, renormalize, factor, num_shared
    )


@moe_route.register_fake
def _(x, gate, bias, top_k, num_groups, topk_groups, renormalize, factor, num_shared):
    shape = (x.shape[0], top_k + num_shared)
    return x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=gate.dtype)
