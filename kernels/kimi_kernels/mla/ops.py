"""The custom op of paged MLA attention: what torch.compile sees."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from .._library import custom_op
from . import cpu, reference  # noqa: F401  (register the backends)


@custom_op("kimi::mla_paged_attention", mutates_args=())
def mla_paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
    v_dim: int,
) -> Tensor:
    return dispatch.run(
        "mla_paged_attention", q.device, q, kv_cache, block_table, seq_lens, cu_seqlens_q, scale, v_dim
    )


@mla_paged_attention.register_fake
def _(q, kv_cache, block_table, seq_lens, cu_seqlens_q, scale, v_dim):
    return q.new_empty((q.shape[0], q.shape[1], v_dim))
