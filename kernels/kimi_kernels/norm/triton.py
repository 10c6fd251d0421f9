"""Gated RMSNorm on Triton kernels: float32 arithmetic. The kernels are imported when first run."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton, dispatch

MAX_WIDTH = 8192  # a row stays in registers


def _refuses(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> str | None:
    for name, t in (("x", x), ("gate", gate), ("weight", weight)):
        if t.dtype == torch.float64:
            return f"computes in float32, got float64 for {name}"
    if x.shape[-1] > MAX_WIDTH:
        return f"takes rows of up to {MAX_WIDTH}, got {x.shape[-1]}"
    return None


def _by_row(x: Tensor) -> Tensor:
    """[A, heads, D], the last dimension contiguous: a view of slices of a projection's result."""
    x = x.reshape(1, *x.shape) if x.dim() == 2 else x.reshape(1, 1, -1) if x.dim() == 1 else x.flatten(0, -3)
    return _triton.rows(x)


@dispatch.register("rmsnorm_gated", "triton", _refuses)
def rmsnorm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    from . import triton_kernels as kernels

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, gate = _by_row(x), _by_row(gate)
    count, width = x.shape[0] * x.shape[1], x.shape[2]
    config = kernels.config(width)
    _triton.launch(
        kernels.forward_kernel, (-(-count // config.constants["BR"]),), x,
        x, gate, weight.contiguous(), out, *x.stride()[:2], *gate.stride()[:2], count, x.shape[1], eps,
        config=config._replace(constants={**config.constants, "SILU": silu}),
    )  # fmt: skip
    return out


@dispatch.register("rmsnorm_gated_backward", "triton", lambda dy, *args: _refuses(*args))
def rmsnorm_gated_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight's gradient is summed over the rows of a program, and then over programs: the same bits each time."""
    from . import triton_kernels as kernels

    dx, dgate = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, gate))
    dy, x, gate = map(_by_row, (dy, x, gate))
    count, width = x.shape[0] * x.shape[1], x.shape[2]
    config = kernels.config(width, backward=True)
    programs = -(-count // (config.constants["BR"] * kernels.TURNS))
    dweights = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    _triton.launch(
        kernels.backward_kernel, (programs,), x,
        dy, x, gate, weight.contiguous(), dx, dgate, dweights,
        *dy.stride()[:2], *x.stride()[:2], *gate.stride()[:2], count, x.shape[1], eps,
        config=config._replace(constants={**config.constants, "TURNS": kernels.TURNS, "SILU": silu}),
    )  # fmt: skip
    return dx, dgate, dweights.sum(0).to(weight.dtype)
