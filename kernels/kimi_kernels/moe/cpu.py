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
