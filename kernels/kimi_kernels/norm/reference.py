"""Gated RMSNorm in plain torch: float32, or float64 when an input is."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch


def _accumulator(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@dispatch.register("rmsnorm_gated", "reference")
def rmsnorm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    acc = _accumulator(x, gate, weight)
    unit = x.to(acc) * torch.rsqrt(x.to(acc).square().mean(-1, keepdim=True) + eps)
    act = torch.sigmoid(gate.to(acc))
    if silu:
        act = act * gate.to(acc)
    return (unit * weight.to(acc) * act).to(x.dtype)


@dispatch.register("rmsnorm_gated_backward", "reference")
def rmsnorm_gated_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and weight."""
    acc = _accumulator(x, gate, weight)
    factor = torch.rsqrt(x.to(acc).square().mean(-1, keepdim=True) + eps)
    unit, z, w, g = x.to(acc) * factor, gate.to(acc), weight.to(acc), dy.to(acc)
    s = torch.sigmoid(z)
    act, slope = (z * s, s + z * s * (1 - s)) if silu else (s, s * (1 - s))
    d_unit = g * w * act
    dx = factor * (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True))
    dweight = (g * unit * act).flatten(0, -2).sum(0)
    return dx.to(x.dtype), (g * unit * w * slope).to(gate.dtype), dweight.to(weight.dtype)
