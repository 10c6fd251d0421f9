"""Paged MLA attention on the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native, dispatch


def _refuses(q, kv_cache, block_table, seq_lens, cu_seqlens_q, scale, v_dim):
    for tensor in (q, kv_cache):
        reason = _native.refuses_dtype(tensor)
        if reason:
            return reason
    if kv_cache.stride(2) != 1:
        return f"needs cache rows of adjacent elements, got stride {kv_cache.stride(2)} in the last dimension"
    return None


def _int32(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()


@dispatch.register("mla_paged_attention", "cpu", _refuses)
def mla_paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
    v_dim: int,
) -> Tensor:
    q = q.contiguous()
    tokens, heads, width = q.shape
    if block_table.dtype != torch.int32 or block_table.stride(-1) != 1:
        block_table = _int32(block_table)
    seq_lens, cu_seqlens_q = _int32(seq_lens), _int32(cu_seqlens_q)
    out = q.new_empty((tokens, heads, v_dim))
    _native.kernel("mla_paged_attention", "pipi" + "iiip" + "ippp" + "iiiii" + "fi")(
        q.data_ptr(),
        _native.DTYPE_CODES[q.dtype],
        kv_cache.data_ptr(),
        _native.DTYPE_CODES[kv_cache.dtype],
        kv_cache.shape[1],
        kv_cache.stride(0),
        kv_cache.stride(1),
        block_table.data_ptr(),
        block_table.stride(0),
        seq_lens.data_ptr(),
        cu_seqlens_q.data_ptr(),
        out.data_ptr(),
        seq_lens.shape[0],
        tokens,
        heads,
        width,
        v_dim,
        scale,
        torch.get_num_threads(),
    )
    return out
