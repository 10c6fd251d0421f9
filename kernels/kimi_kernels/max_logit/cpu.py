"""The largest logits by blocks of torch's float32 matrix product; a block of scores fits the second-level cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .reference import bound, sequences

_QUERIES, _KEYS = 256, 512


@dispatch.register("qk_max_logits", "cpu", native=False)
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
    acc = torch.promote_types(q.dtype, torch.float32)
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    largest, open_heads = bound(lse, threshold, heads)
    out = q.new_full((heads,), float("-inf"), dtype=acc) if largest is None else largest.to(acc, copy=True)
    if open_heads and largest is not None:
        out[open_heads] = float("-inf")
    for x, y in sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        for h in open_heads:
            best = _one_head(x[:, h].to(acc) * scale, y[:, h // group].to(acc), causal)
            out[h] = torch.maximum(out[h], best)
    return out


def _one_head(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """max of q [T, D] times k [S, D] over the visible pairs."""
    shift = len(k) - len(q)
    best = q.new_full((), float("-inf"))
    for i in range(0, len(q), _QUERIES):
        rows = q[i : i + _QUERIES]
        seen = min(len(k), i + len(rows) + shift) if causal else len(k)
        whole = min(max(i + shift + 1, 0), seen) if causal else seen  # keys that every row sees
        for j in range(0, whole, _KEYS):
            best = torch.maximum(best, (rows @ k[j : min(j + _KEYS, whole)].mT).amax())
        if seen > whole:
            scores = rows @ k[whole:seen].mT
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(i + shift + 1 - whole)
            best = torch.maximum(best, scores.masked_fill(hidden, float("-inf")).amax())
    return best
