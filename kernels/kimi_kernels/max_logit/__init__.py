"""The largest attention logit of each head, which QK-Clip watches (Kimi K2, arXiv 2507.20534, section 2.1)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from . import ops

__all__ = ["qk_max_logits"]


def _check_offsets(name: str, offsets: Tensor, tokens: int, sequences: int) -> None:
    if tuple(offsets.shape) != (sequences + 1,) or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must be int32 or int64 [{sequences + 1}], got {offsets.dtype} {tuple(offsets.shape)}"
        )
    if torch.compiler.is_compiling() or offsets.device.type != "cpu":
        return  # values are not known while tracing, and reading them would stall the device
    values = offsets.tolist()
    if values[0] != 0:
        raise ValueError(f"{name} must start at 0, got {values[0]}: pass offsets of the packed batch")
    for n, (a, b) in enumerate(itertools.pairwise(values)):
        if b < a:
            raise ValueError(f"{name} must not decrease, got {a} then {b} at sequence {n}")
    if values[-1] > tokens:
        raise ValueError(f"{name} must end at {tokens} tokens or before, got {values[-1]}")


def _validate(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    lse: Tensor | None,
    threshold: float | None,
) -> None:
    for name, x, shape in (("q", q, "[B, T, H, D]"), ("k", k, "[B, S, HK, D]")):
        if x.dim() != 4:
            raise ValueError(f"{name} must be {shape}, got shape {tuple(x.shape)}")
    if q.dtype != k.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q and k must share a floating dtype, got {q.dtype} and {k.dtype}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k must be [{q.shape[0]}, S, HK, {q.shape[3]}] to match q, got shape {tuple(k.shape)}"
        )
    if k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"the {q.shape[2]} heads of q must be a multiple of k's heads, got {k.shape[2]}")
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError(
            "pass cu_seqlens_q and cu_seqlens_k together: both sides of a packed batch have offsets"
        )
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        if q.shape[0] != 1:
            raise ValueError(f"with cu_seqlens the batch must be packed into one row, got B={q.shape[0]}")
        sequences = cu_seqlens_q.numel() - 1
        _check_offsets("cu_seqlens_q", cu_seqlens_q, q.shape[1], sequences)
        _check_offsets("cu_seqlens_k", cu_seqlens_k, k.shape[1], sequences)
    if (lse is None) != (threshold is None):
        raise ValueError("pass lse and threshold together: heads whose lse stays under threshold are skipped")
    if lse is not None and tuple(lse.shape) != (q.shape[0], q.shape[2], q.shape[1]):
        raise ValueError(
            f"lse must be [B, H, T] = {(q.shape[0], q.shape[2], q.shape[1])}, got shape {tuple(lse.shape)}"
        )


def qk_max_logits(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    lse: Tensor | None = None,
    threshold: float | None = None,
) -> Tensor:
    """max over all visible pairs (i, j) of scale * <q[i], k[j]>, for each head; exact, not a bound.

    Nothing of size T x S is ever held. There is no gradient.

    Args:
        q: [B, T, H, D].
        k: [B, S, HK, D], q's dtype; H a multiple of HK, head h of q reads head h // (H / HK) of k.
        scale: factor on the products; D ** -0.5 when None.
        causal: query i of T sees keys up to i + S - T, so the last query sees the last key.
        cu_seqlens_q: [N + 1] offsets of N packed sequences in q; B is 1. Tokens past the last offset are padding.
        cu_seqlens_k: [N + 1] offsets of the same sequences in k.
        lse: [B, H, T], the natural log-sum-exp over the visible scores of each query, as flash attention
            returns it; with `threshold`.
        threshold: a maximum never exceeds the lse of its query. A head whose largest lse is at most `threshold`
            is not computed: its result is that lse, an upper bound at most log(S) above the maximum.

    Returns:
        [H] float32 (float64 for float64 inputs); -inf where no pair is visible, NaN where an input is.

    Raises:
        ValueError: shapes, dtypes or offsets do not fit.
    """
    _validate(q, k, cu_seqlens_q, cu_seqlens_k, lse, threshold)
    return ops.qk_max_logits(
        q.detach(),
        k.detach(),
        q.shape[-1] ** -0.5 if scale is None else scale,
        causal,
        cu_seqlens_q,
        cu_seqlens_k,
        None if lse is None else lse.detach(),
        threshold,
    )
