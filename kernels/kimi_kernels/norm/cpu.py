"""Gated RMSNorm on the native library: float32 or bfloat16 tensors, float32 arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native, dispatch


def _refuses(x, gate, weight, eps, silu):
    if weight.dtype == torch.float64:
        return "takes no float64 weight"
    return _native.refuses_dtype(x, gate)


@dispatch.register("rmsnorm_gated", "cpu", _refuses)
def rmsnorm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    x, gate = x.contiguous(), gate.contiguous()
    weight = weight.to(torch.float32).contiguous()
    y = torch.empty_like(x)
    width = x.shape[-1]
    _native.kernel("rmsnorm_gated_forward", "pppp" + "iifiii")(
        x.data_ptr(),
        gate.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        x.numel() // width,
        width,
        eps,
        silu,
        _native.DTYPE_CODES[x.dtype],
        _native.threads(x.numel() * 8),
    )
    return y


def _backward_refuses(dy, x, gate, weight, eps, silu):
    return _native.refuses_dtype(dy, x) or _refuses(x, gate, weight, eps, silu)


@dispatch.register("rmsnorm_gated_backward", "cpu", _backward_refuses)
def rmsnorm_gated_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, gate = dy.contiguous(), x.contiguous(), gate.contiguous()
    wide = weight.to(torch.float32).contiguous()
    dx, dgate = torch.empty_like(x), torch.empty_like(gate)
    dweight = torch.empty(wide.shape, dtype=torch.float32)
    width = x.shape[-1]
    _native.kernel("rmsnorm_gated_backward", "ppppppp" + "iifiii")(
        x.data_ptr(),
        gate.data_ptr(),
        wide.data_ptr(),
        dy.data_ptr(),
        dx.data_ptr(),
        dgate.data_ptr(),
        dweight.data_ptr(),
        x.numel() // width,
        width,
        eps,
        silu,
        _native.DTYPE_CODES[x.dtype],
        _native.threads(x.numel() * 16),
    )
    return dx, dgate, dweight.to(weight.dtype)
