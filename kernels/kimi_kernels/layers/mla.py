"""A NoPE MLA layer over a paged latent cache, in the absorbed form."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native
from ..mla import mla_paged_attention
from ..projection import batched_linear, linear
from ._layout import MlaWeights
from ._prepared import MOST_TOKENS, check_hidden, int32, native_refusal


class MlaLayer:
    """Latent attention without rotary embedding, from hidden state to hidden state (Kimi Linear, section 4.1).

    Writes the tokens' rows to the cache, then lets every token see its sequence up to itself.

    Args:
        in_proj: [H * (nope + rope) + rank + rope, D], rows of the query and the latent; with a query latent
            [q_rank + rank + rope, D].
        latent_norm: [rank], gain of the latent's RMSNorm.
        kv_up: [H, nope + v, rank], key rows first.
        o_proj: [O, H * v].
        cache: [blocks, block_size, rank + rope], adjacent elements in a row; written by each call.
        nope_dim: nope. scale: of the scores.
        q_norm, q_up: [q_rank] and [H * (nope + rope), q_rank] of a query latent, else None.
        norm_eps: of both norms.

    The cache may change its values, not its place; of the weights the key rows of kv_up are copied.

    Raises:
        ValueError: a shape does not fit; the message names it.
    """

    def __init__(
        self,
        in_proj: Tensor,
        latent_norm: Tensor,
        kv_up: Tensor,
        o_proj: Tensor,
        cache: Tensor,
        *,
        nope_dim: int,
        scale: float,
        q_norm: Tensor | None = None,
        q_up: Tensor | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        self.rank = latent_norm.shape[0]
        if cache.dim() != 3 or cache.shape[2] < self.rank:
            raise ValueError(f"cache must be [blocks, block_size, >= {self.rank}], got shape {tuple(cache.shape)}")
        rope = cache.shape[2] - self.rank
        if kv_up.dim() != 3 or kv_up.shape[2] != self.rank or kv_up.shape[1] <= nope_dim:
            raise ValueError(f"kv_up must be [H, {nope_dim} + v, {self.rank}], got shape {tuple(kv_up.shape)}")
        self.heads, self.v_dim = kv_up.shape[0], kv_up.shape[1] - nope_dim
        self.nope_dim, self.qk_dim = nope_dim, nope_dim + rope
        query = self.heads * self.qk_dim
        self.q_rank = 0 if q_up is None else q_up.shape[1]
        if q_up is not None and (q_norm is None or q_up.shape[0] != query or q_norm.shape != (self.q_rank,)):
            raise ValueError(f"q_up must be [{query}, q_rank] with q_norm [q_rank], got shape {tuple(q_up.shape)}")
        self.splits = (self.q_rank or query, self.rank + rope)
        if in_proj.dim() != 2 or in_proj.shape[0] != sum(self.splits):
            raise ValueError(f"in_proj must have {sum(self.splits)} rows, got shape {tuple(in_proj.shape)}")
        if o_proj.dim() != 2 or o_proj.shape[1] != self.heads * self.v_dim:
            raise ValueError(f"o_proj must be [O, {self.heads * self.v_dim}], got shape {tuple(o_proj.shape)}")
        self.in_proj, self.latent_norm, self.o_proj, self.cache = in_proj, latent_norm, o_proj, cache
        self.q_norm, self.q_up = q_norm, q_up
        self.key_up = kv_up[:, :nope_dim].transpose(1, 2).contiguous()
        self.value_up = kv_up[:, nope_dim:]
        self.scale, self.norm_eps = scale, norm_eps
        self.refusal = native_refusal(in_proj, latent_norm, kv_up, o_proj, q_norm, q_up)
        if self.refusal is None and (cache.stride(2) != 1 or cache.dtype != in_proj.dtype):
            self.refusal = "needs a cache of the weights' dtype with rows of adjacent elements"
        if self.refusal is None:
            self._prepare(rope)

    def _prepare(self, rope: int) -> None:
        self._weights = w = MlaWeights()
        for name in ("in_proj", "q_norm", "q_up", "latent_norm", "key_up", "value_up", "o_proj", "cache"):
            setattr(w, name, _native.pointer(getattr(self, name)))
        w.D, w.H, w.O = self.in_proj.shape[1], self.heads, self.o_proj.shape[0]
        w.nope, w.rope, w.v, w.rank, w.q_rank = self.nope_dim, rope, self.v_dim, self.rank, self.q_rank
        w.value_stride = self.value_up.stride(0)
        w.block_stride, w.row_stride, _ = self.cache.stride()
        w.block_size = self.cache.shape[1]
        w.dtype, w.threads = _native.DTYPE_CODES[self.in_proj.dtype], torch.get_num_threads()
        w.eps, w.scale = self.norm_eps, self.scale
        self._address = ctypes.addressof(w)
        self._call = _native.kernel("mla_decode_layer", "ppp" + "ii" + "ppi" + "pp")

    def __call__(
        self, hidden: Tensor, slots: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor
    ) -> Tensor:
        """[T, D] normed -> [T, O].

        Args:
            hidden: [T, D].
            slots: [T] int64, the row of the cache that each token gets, block * block_size + offset; -1: none.
            block_table, seq_lens, cu_seqlens_q: as for `mla_paged_attention`.
        """
        check_hidden(hidden, self.in_proj)
        tokens = hidden.shape[0]
        if slots.shape != (tokens,) or slots.dtype != torch.int64:
            raise ValueError(f"slots must be int64 [{tokens}], got {slots.dtype} {tuple(slots.shape)}")
        if self.refusal is not None or tokens > MOST_TOKENS:
            return self._by_ops(hidden, slots, block_table, seq_lens, cu_seqlens_q)
        if block_table.dtype != torch.int32 or block_table.stride(-1) != 1:
            block_table = int32(block_table)
        hidden, slots = hidden.contiguous(), slots.contiguous()
        seq_lens, cu_seqlens_q = int32(seq_lens), int32(cu_seqlens_q)
        out = torch.empty((tokens, self.o_proj.shape[0]), dtype=hidden.dtype)
        self._call(
            self._address,
            hidden.data_ptr(),
            out.data_ptr(),
            tokens,
            seq_lens.shape[0],
            slots.data_ptr(),
            block_table.data_ptr(),
            block_table.stride(0),
            seq_lens.data_ptr(),
            cu_seqlens_q.data_ptr(),
        )
        return out

    def _by_ops(
        self, hidden: Tensor, slots: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor
    ) -> Tensor:
        query, latent = linear(hidden, self.in_proj).split(self.splits, dim=-1)
        if self.q_up is not None:
            query = linear(F.rms_norm(query, (self.q_rank,), self.q_norm, self.norm_eps), self.q_up)
        normed = F.rms_norm(latent[:, : self.rank], (self.rank,), self.latent_norm, self.norm_eps)
        row = torch.cat((normed, latent[:, self.rank :]), dim=-1).to(self.cache.dtype)
        real = slots >= 0
        slots, row = slots[real], row[real]
        size = self.cache.shape[1]
        self.cache.index_put_((slots // size, slots % size), row)
        query = query.unflatten(-1, (self.heads, self.qk_dim))
        nope = batched_linear(query[..., : self.nope_dim].transpose(0, 1), self.key_up)
        absorbed = torch.cat((nope.transpose(0, 1), query[..., self.nope_dim :]), dim=-1)
        mixed = mla_paged_attention(
            absorbed, self.cache, block_table, seq_lens, cu_seqlens_q, self.scale, self.rank
        )
        values = batched_linear(mixed.transpose(0, 1), self.value_up)
        return linear(values.transpose(0, 1).flatten(1), self.o_proj)
