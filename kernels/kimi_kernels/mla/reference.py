"""Paged multi-query attention over the MLA latent cache, in plain torch: one sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch


@dispatch.register("mla_paged_attention", "reference")
def mla_paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
    v_dim: int,
) -> Tensor:
    acc = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros((*q.shape[:2], v_dim))
    block_size = kv_cache.shape[1]
    offsets = cu_seqlens_q.tolist()
    for n, length in enumerate(seq_lens.tolist()):
        first, last = offsets[n], offsets[n + 1]
        if first == last:
            continue
        blocks = block_table[n, : -(-length // block_size)].long()
        keys = kv_cache[blocks].flatten(0, 1)[:length].to(acc)
        scores = torch.einsum("thd,sd->ths", q[first:last].to(acc), keys) * scale
        position = torch.arange(length - (last - first), length, device=q.device)
        future = torch.arange(length, device=q.device) > position[:, None]
        weights = scores.masked_fill(future[:, None], float("-inf")).softmax(-1)
        out[first:last] = (weights @ keys[:, :v_dim]).to(q.dtype)
    return out
