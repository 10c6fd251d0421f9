"""The largest logits by blocks of torch's float32 matrix product; a block of scores fits the second-level cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .reference import bound, sequences

_QUERIES, _KEYS = 128, 256
# Scores of a block, over the heads that it takes together.
_SCORES = 1 << 18


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
    out = q.new_full((heads,), float("-inf"), dtype=acc)
    keys = sorted({h // group for h in open_heads})  # heads of k with an open head
    queries = [h for key in keys for h in range(key * group, (key + 1) * group)]
    for x, y in sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        if len(keys) < k.shape[2]:
            x, y = x[:, :, queries], y[:, :, keys]
        found = _largest(_by_head(x, group).to(acc) * scale, _by_head(y, 1).to(acc).squeeze(1), causal)
        best = found.view(len(x), -1).amax(0)
        out[queries] = torch.maximum(out[queries], best)
    if largest is not None:
        closed = torch.ones(heads, dtype=torch.bool)
        closed[open_heads] = False
        out = torch.where(closed, largest.to(acc), out)
    return out


def _by_head(x: Tensor, group: int) -> Tensor:
    """[N, T, HK * group, D] -> [N * HK, group, T, D]."""
    return x.unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4).flatten(0, 1)


def _largest(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """[M, G]: max of q [M, G, T, D] times k [M, S, D] over the visible pairs."""
    group, tokens = q.shape[1:3]
    keys = k.shape[1]
    shift = keys - tokens
    best = q.new_full(q.shape[:2], float("-inf"))
    height, width = min(_QUERIES, tokens), min(_KEYS, keys)
    together = max(1, _SCORES // (group * height * width))
    for m in range(0, len(q), together):
        some, other = slice(m, m + together), k[m : m + together].mT
        for i in range(0, tokens, height):
            rows = q[some, :, i : i + height]
            block = rows.flatten(1, 2)
            seen = min(keys, i + rows.shape[2] + shift) if causal else keys
            whole = min(max(i + shift + 1, 0), seen) if causal else seen  # keys that every row sees
            for j in range(0, whole, width):
                scores = torch.bmm(block, other[:, :, j : min(j + width, whole)])
                best[some] = torch.maximum(best[some], scores.unflatten(1, (group, -1)).amax((2, 3)))
            if seen > whole:
                scores = torch.bmm(block, other[:, :, whole:seen]).unflatten(1, (group, -1))
                hidden = scores.new_ones(scores.shape[2:], dtype=torch.bool).triu(i + shift + 1 - whole)
                best[some] = torch.maximum(
                    best[some], scores.masked_fill_(hidden, float("-inf")).amax((2, 3))
                )
    return best
