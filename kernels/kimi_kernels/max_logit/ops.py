"""The custom op of the largest logits: what torch.compile sees."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .._library import custom_op
from . import cpu, reference, triton  # noqa: F401  (register the backends)


@custom_op("kimi::qk_max_logits", mutates_args=())
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
    with torch.autocast(q.device.type, enabled=False):
        return dispatch.run(
            "qk_max_logits", q.device, q, k, scale, causal, cu_seqlens_q, cu_seqlens_k, lse, threshold
        )


@qk_max_logits.register_fake
def _(q, k, scale, causal, cu_seqlens_q, cu_seqlens_k, lse, threshold):
    return q.new_empty(q.shape[2], dtype=torch.promote_types(q.dtype, torch.float32))
