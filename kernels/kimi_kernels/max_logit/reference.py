"""The largest logits in plain torch: one head at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import dispatch


def sequences(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(q [N, T, H, D], k [N, S, HK, D]) of sequences of one length that have a pair: all, or one by one if packed."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        pairs = [(q, k)]
    else:
        tq, tk = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        pairs = [(q[:, a:b], k[:, c:d]) for a, b, c, d in zip(tq, tq[1:], tk, tk[1:])]
    return ((x, y) for x, y in pairs if len(x) and x.shape[1] and y.shape[1])


def bound(lse: Tensor | None, threshold: float | None, heads: int) -> tuple[Tensor | None, list[int]]:
    """(largest lse of each head, the heads that may exceed the threshold)."""
    if lse is None or threshold is None:
        return None, list(range(heads))
    largest = lse.amax((0, 2)) if lse.numel() else lse.new_full((heads,), float("-inf"))
    return largest, (~(largest <= threshold)).nonzero().flatten().tolist()


@dispatch.register("qk_max_logits", "reference")
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
    out = q.new_full((heads,), float("-inf"), dtype=acc)
    for x, y in sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        last = torch.arange(x.shape[1], device=q.device) + y.shape[1] - x.shape[1]
        hidden = torch.arange(y.shape[1], device=q.device) > last[:, None]
        for h in open_heads:
            scores = (x[:, :, h].to(acc) @ y[:, :, h // group].to(acc).mT) * scale
            if causal:
                scores = scores.masked_fill(hidden, float("-inf"))
            out[h] = torch.maximum(out[h], scores.amax())
    if largest is not None:
        skipped = torch.ones(heads, dtype=torch.bool, device=q.device)
        skipped[open_heads] = False
        out = torch.where(skipped, largest.to(acc), out)
    return out
