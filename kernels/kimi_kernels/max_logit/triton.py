"""The largest logits on a Triton kernel: float16, bfloat16 or float32. The kernel is imported when first run.

Each program writes the maximum of its queries to a place of its own, and torch takes the largest of those: a maximum
is exact in any order. Offsets, and the heads that the gate closes, stay on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton, dispatch

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _refuses(q, k, scale, causal, cu_seqlens_q, cu_seqlens_k, lse, threshold) -> str | None:
    if q.dtype not in _DTYPES:
        return f"takes float16, bfloat16 or float32 and computes in float32, got {q.dtype}"
    return None


@dispatch.register("qk_max_logits", "triton", _refuses)
def qk_max_logits(
    q: Tensor,
    k: Tensor,
    scale: float,
    causal: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    lse: Tensor | None,
    threshold: float | None,
) -> Tensor:
    from . import triton_kernels as kernels

    batch, tokens, heads, width = q.shape
    bound = closed = None
    if lse is not None and threshold is not None:
        bound = lse.amax((0, 2)) if lse.numel() else lse.new_full((heads,), float("-inf"))
        closed = bound <= threshold
        bound = bound.to(torch.float32)

    config = kernels.config(width, q.dtype == torch.float32)
    BM = config.constants["BM"]
    if cu_seqlens_q is None or cu_seqlens_k is None:
        sequences, slots = batch, batch * -(-tokens // BM)
    else:
        sequences = cu_seqlens_q.shape[0] - 1
        slots = tokens // BM + sequences if sequences else 0
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    found = torch.empty((heads, slots), dtype=torch.float32, device=q.device)
    q, k = _triton.rows(q), _triton.rows(k)
    constants = {"NEGATIVE": scale < 0, "CAUSAL": causal, "PACKED": cu_seqlens_q is not None,
                 "GATED": closed is not None}  # fmt: skip
    _triton.launch(
        kernels.max_logit_kernel, (slots, heads), q,
        q, k, cu_seqlens_q, cu_seqlens_k, closed, found, *q.stride()[:3], *k.stride()[:3],
        tokens, k.shape[1], sequences, heads // k.shape[2], width, abs(scale),
        config=config._replace(constants={**config.constants, **constants}),
    )  # fmt: skip
    out = found.amax(1) if slots else found.new_full((heads,), float("-inf"))
    return out if closed is None or bound is None else torch.where(closed, bound, out)
