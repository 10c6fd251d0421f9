"""Depthwise causal convolution in plain torch: float32, or float64 when an input is."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .. import dispatch


def _accumulator(*tensors: Tensor | None) -> torch.dtype:
    return (
        torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    )


def state_dtype(x: Tensor) -> torch.dtype:
    """Dtype of the states that go with x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def offsets_of(x: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """Offsets of the sequences in the tokens of x [B, T, D]; ValueError where cu_seqlens are none of it."""
    batch, tokens = x.shape[:2]
    if cu_seqlens is None:
        return [n * tokens for n in range(batch + 1)]
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {offsets[0]}: pass offsets of the packed batch")
    if offsets[-1] != tokens:
        raise ValueError(f"cu_seqlens must end at T = {tokens}, got {offsets[-1]}")
    if any(a > b for a, b in pairwise(offsets)):
        raise ValueError(f"cu_seqlens must not decrease, got {offsets}")
    return offsets


def _with_history(x: Tensor, initial_state: Tensor | None, n: int, width: int, acc: torch.dtype) -> Tensor:
    """The W inputs before sequence n, then the sequence x: [W + T, D]."""
    if initial_state is None:
        history = x.new_zeros((width, x.shape[1]), dtype=acc)
    else:
        history = initial_state[n].T.to(acc)
    return torch.cat([history, x.to(acc)])


def _filtered(history: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution before its activation: [T, D]."""
    width = weight.shape[1]
    tokens = history.shape[0] - width
    out = history.new_zeros((tokens, history.shape[1])) if bias is None else bias.expand(tokens, -1)
    for j in range(width):
        out = out + history[1 + j : 1 + j + tokens] * weight[:, j]
    return out


@dispatch.register("causal_conv1d", "reference")
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """(y [B, T, D], final state [N, D, W] or empty)."""
    offsets, shape = offsets_of(x, cu_seqlens), x.shape
    x = x.flatten(0, 1)
    acc = _accumulator(x, weight, bias, initial_state)
    w, b = weight.to(acc), None if bias is None else bias.to(acc)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    count = len(offsets) - 1 if output_final_state else 0
    final = x.new_empty((count, *weight.shape), dtype=state_dtype(x))
    for n, (first, last) in enumerate(pairwise(offsets)):
        history = _with_history(x[first:last], initial_state, n, weight.shape[1], acc)
        z = _filtered(history, w, b)
        y[first:last] = (z * torch.sigmoid(z) if silu else z).to(x.dtype)
        if output_final_state:
            final[n] = history[last - first :].T
    return y.view(shape), final


@dispatch.register("causal_conv1d_backward", "reference")
def causal_conv1d_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state."""
    offsets, shape = offsets_of(x, cu_seqlens), x.shape
    x, dy = x.flatten(0, 1), dy.flatten(0, 1)
    acc = _accumulator(x, weight, bias, initial_state)
    w, b = weight.to(acc), None if bias is None else bias.to(acc)
    width = w.shape[1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight, dbias = torch.zeros_like(w), w.new_zeros(w.shape[0])
    dinitial = None if initial_state is None else torch.empty_like(initial_state)
    for n, (first, last) in enumerate(pairwise(offsets)):
        tokens = last - first
        history = _with_history(x[first:last], initial_state, n, width, acc)
        g = dy[first:last].to(acc)
        if silu:
            z = _filtered(history, w, b)
            s = torch.sigmoid(z)
            g = g * (s + z * s * (1 - s))
        dhistory = torch.zeros_like(history)
        for j in range(width):
            dhistory[1 + j : 1 + j + tokens] += g * w[:, j]
            dweight[:, j] += (g * history[1 + j : 1 + j + tokens]).sum(0)
        dbias += g.sum(0)
        if dfinal is not None:
            dhistory[tokens:] += dfinal[n].T.to(acc)
        dx[first:last] = dhistory[width:].to(x.dtype)
        if dinitial is not None:
            dinitial[n] = dhistory[:width].T
    dx = dx.view(shape)
    return dx, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype), dinitial
