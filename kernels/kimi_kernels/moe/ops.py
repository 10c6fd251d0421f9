"""The custom op of the expert mixture: what torch.compile sees."""

from __future__ import annotations

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
