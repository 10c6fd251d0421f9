"""A mixture of SwiGLU experts on the native library: float32 or bfloat16 weights, float32 sums."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native, dispatch


def _refuses(x, w13, w2, topk_ids, topk_weights):
    if not (w13.is_contiguous() and w2.is_contiguous()):
        return "needs contiguous w13 and w2"
    return _native.refuses_dtype(x, w13, w2)


@dispatch.register("moe_experts", "cpu", _refuses)
def moe_experts(x: Tensor, w13: Tensor, w2: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    x = x.contiguous()
    topk_ids = topk_ids.to(torch.int32).contiguous()
    topk_weights = topk_weights.to(torch.float32).contiguous()
    out = torch.empty_like(x)
    experts, width, inner = w2.shape
    _native.kernel("moe_experts", "pppppp" + "iiiiiii")(
        x.data_ptr(),
        w13.data_ptr(),
        w2.data_ptr(),
        topk_ids.data_ptr(),
        topk_weights.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        topk_ids.shape[1],
        experts,
        width,
        inner,
        _native.DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
    )
    return out


def _route_refuses(x, gate, bias, top_k, num_groups, topk_groups, renormalize, factor, num_shared):
    if gate.shape[0] // num_groups < 2 and num_groups > 1:
        return "needs two experts in a group"
    if not gate.is_contiguous():
        return "needs a contiguous gate"
    if x.dtype not in _native.DTYPE_CODES:
        return f"takes float32 or bfloat16 tokens, got {x.dtype}"
    return _native.refuses_dtype(gate)


@dispatch.register("moe_route", "cpu", _route_refuses)
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
    x = x.contiguous()
    bias = bias.contiguous()
    tokens, width = x.shape
    ids = torch.empty((tokens, top_k + num_shared), dtype=torch.int32)
    weights = torch.empty((tokens, top_k + num_shared), dtype=torch.float32)
    _native.kernel("moe_route", "ppppp" + "iiiiiiii" + "f" + "ii")(
        x.data_ptr(),
        gate.data_ptr(),
        bias.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        tokens,
        gate.shape[0],
        width,
        top_k,
        num_groups,
        topk_groups,
        num_shared,
        int(renormalize),
        factor,
        _native.DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
    )
    return ids, weights
