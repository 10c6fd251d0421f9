"""Multi-head latent attention for serving: absorbed queries against a paged cache of latents."""

from __future__ import annotations

from torch import Tensor

from . import ops

__all__ = ["mla_paged_attention"]


def _validate(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, v_dim: int
) -> None:
    if q.dim() != 3:
        raise ValueError(f"q must be [T, H, D], got shape {tuple(q.shape)}")
    if kv_cache.dim() != 3 or kv_cache.shape[2] != q.shape[2]:
        raise ValueError(
            f"kv_cache must be [blocks, block_size, {q.shape[2]}] to match q, got shape {tuple(kv_cache.shape)}"
        )
    if not 1 <= v_dim <= q.shape[2]:
        raise ValueError(f"v_dim must be in 1..{q.shape[2]} (the width of a cache row), got {v_dim}")
    sequences = seq_lens.shape[0]
    if block_table.dim() != 2 or block_table.shape[0] != sequences:
        raise ValueError(f"block_table must be [{sequences}, max_blocks], got {tuple(block_table.shape)}")
    if tuple(cu_seqlens_q.shape) != (sequences + 1,):
        raise ValueError(f"cu_seqlens_q must have shape ({sequences + 1},), got {tuple(cu_seqlens_q.shape)}")


def mla_paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
    v_dim: int,
) -> Tensor:
    """Causal attention of all heads over one shared latent row a token (Kimi Linear, section 4; NoPE MLA).

    Inference only: there is no gradient. Sums are in float32.

    Args:
        q: [T, H, D], queries of all sequences one after the other, already mapped into the latent space.
        kv_cache: [blocks, block_size, D], any strides with adjacent elements in a row; float32 or bfloat16 on
            the native path. A key is a whole row, its value the first `v_dim` elements.
        block_table: [N, max_blocks] int32, the blocks of each sequence in order.
        seq_lens: [N] int32, tokens of each sequence in the cache, this call's queries included.
        cu_seqlens_q: [N + 1] int32, offsets of the sequences in q; arange for decode. A query sees the keys up
            to and including its own; tokens past the last offset are padding and give zeros.
        scale: factor on the scores.
        v_dim: width of the values, at most D.

    Returns:
        [T, H, v_dim] in q's dtype. A sequence gets the same bits alone or in a batch, whole or in pieces.
    """
    _validate(q, kv_cache, block_table, seq_lens, cu_seqlens_q, v_dim)
    return ops.mla_paged_attention(q, kv_cache, block_table, seq_lens, cu_seqlens_q, scale, v_dim)
