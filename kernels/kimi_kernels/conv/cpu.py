"""Depthwise causal convolution on the native library: float32 or bfloat16 tensors, float32 arithmetic."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import _native, dispatch
from .reference import offsets_of

_WIDTHS = range(2, 9)  # kernel widths that are compiled


def _refuses(x, weight, bias, initial_state, cu_seqlens, silu, output_final_state):
    if weight.shape[1] not in _WIDTHS:
        return f"takes kernel widths {_WIDTHS.start} to {_WIDTHS.stop - 1}, got {weight.shape[1]}"
    if any(t is not None and t.dtype == torch.float64 for t in (weight, bias, initial_state)):
        return "takes no float64 weight, bias or initial_state"
    return _native.refuses_dtype(x)


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _adjacent_channels(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _offsets(offsets: list[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(offsets))(*offsets)


@dispatch.register("causal_conv1d", "cpu", _refuses)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    offsets, shape = offsets_of(x, cu_seqlens), x.shape
    x, filters = _adjacent_channels(x.flatten(0, 1)), weight.to(torch.float32).t().contiguous()
    bias, initial_state = _float(bias), _float(initial_state)
    y = torch.empty(x.shape, dtype=x.dtype)
    count = len(offsets) - 1
    final = torch.empty((count if output_final_state else 0, *weight.shape), dtype=torch.float32)
    _native.kernel("causal_conv1d_forward", "pi" + "pppppp" + "iiiiii")(
        x.data_ptr(),
        x.stride(0),
        filters.data_ptr(),
        _native.pointer(bias),
        _native.pointer(initial_state),
        _offsets(offsets),
        y.data_ptr(),
        final.data_ptr() if output_final_state else None,
        count,
        weight.shape[0],
        weight.shape[1],
        silu,
        _native.DTYPE_CODES[x.dtype],
        _native.threads(x.numel() * 8),
    )
    return y.view(shape), final


def _backward_refuses(dy, dfinal, x, weight, bias, initial_state, cu_seqlens, silu):
    reason = _refuses(x, weight, bias, initial_state, cu_seqlens, silu, False)
    return reason or _native.refuses_dtype(dy, x)


@dispatch.register("causal_conv1d_backward", "cpu", _backward_refuses)
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
    offsets, shape = offsets_of(x, cu_seqlens), x.shape
    x, dy = _adjacent_channels(x.flatten(0, 1)), dy.flatten(0, 1).contiguous()
    filters = weight.to(torch.float32).t().contiguous()
    wide_bias, initial, dfinal = _float(bias), _float(initial_state), _float(dfinal)
    dx = torch.empty(x.shape, dtype=x.dtype)
    dfilters = torch.empty_like(filters)
    dbias = None if wide_bias is None else torch.empty_like(wide_bias)
    dinitial = None if initial is None else torch.empty_like(initial)
    _native.kernel("causal_conv1d_backward", "pi" + "pppppppppp" + "iiiiii")(
        x.data_ptr(),
        x.stride(0),
        filters.data_ptr(),
        _native.pointer(wide_bias),
        _native.pointer(initial),
        _offsets(offsets),
        dy.data_ptr(),
        _native.pointer(dfinal),
        dx.data_ptr(),
        dfilters.data_ptr(),
        _native.pointer(dbias),
        _native.pointer(dinitial),
        len(offsets) - 1,
        weight.shape[0],
        weight.shape[1],
        silu,
        _native.DTYPE_CODES[x.dtype],
        _native.threads(x.numel() * 16),
    )
    return (
        dx.view(shape),
        dfilters.t().to(weight.dtype).contiguous(),
        None if dbias is None or bias is None else dbias.to(bias.dtype),
        None if dinitial is None or initial_state is None else dinitial.to(initial_state.dtype),
    )
