"""The paged serving ops on the native library."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import _native, dispatch
from ._layout import KdaArgs, KdaLayer, packer
from .cpu import GATE_LOWER_BOUND, GATE_SOFTPLUS, MAX_HEAD
from .paged_reference import LayerOptions
from .validation import layer_problem

_ARGS, _LAYER = packer(KdaArgs), packer(KdaLayer)
MAX_CONV_WIDTH = 8  # csrc/kda/conv.h: kMaxConvWidth


def _refuses(qkv, g, beta, gate, conv_weight, conv_state, state, *rest) -> str | None:
    for name, x in (("qkv", qkv), ("g", g), ("beta", beta), ("gate", gate)):
        if x.dtype not in _native.DTYPE_CODES:
            return f"takes float32 or bfloat16, got {x.dtype} for {name}"
    return layer_refusal(conv_weight, conv_state, state)


def layer_refusal(conv_weight: Tensor, conv_state: Tensor, state: Tensor) -> str | None:
    """Why the native kernels cannot take a layer's filters and pools, or None."""
    for name, x in (("conv_weight", conv_weight), ("conv_state", conv_state)):
        if x.dtype not in _native.DTYPE_CODES:
            return f"takes float32 or bfloat16, got {x.dtype} for {name}"
    if max(state.shape[2:]) > MAX_HEAD:
        return f"takes head sizes up to {MAX_HEAD}, got {max(state.shape[2:])}"
    if conv_weight.shape[1] > MAX_CONV_WIDTH:
        return f"takes convolutions of width up to {MAX_CONV_WIDTH}, got {conv_weight.shape[1]}"
    if state.stride(3) != 1:
        return f"takes states whose last dimension is contiguous, got strides {state.stride()}"
    return None


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()


def _int(x: Tensor) -> Tensor:
    return x if x.dtype == torch.int32 and x.is_contiguous() else x.to(torch.int32).contiguous()


def _optional_int(x: Tensor | None) -> Tensor | None:
    return None if x is None else _int(x)


def _packed(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _call(
    kernel: str,
    qkv: Tensor,
    g: Tensor,
    beta: Tensor,
    gate: Tensor,
    conv_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor | None,
    has_initial: Tensor | None,
    num_accepted: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    out: Tensor,
    options: LayerOptions,
) -> None:
    codes = _native.DTYPE_CODES
    slots, value_heads, value_width, width = state.shape
    heads = options.num_heads
    qkv, g, gate = _packed(qkv), _packed(g), _packed(gate)
    conv_weight = conv_weight if conv_weight.is_contiguous() else conv_weight.contiguous()
    A_log, norm_weight = _float(A_log), _float(norm_weight)
    dt_bias = None if dt_bias is None else _float(dt_bias)
    state_indices = _int(state_indices)
    cu_seqlens, num_accepted = _optional_int(cu_seqlens), _optional_int(num_accepted)
    has_initial = None if has_initial is None else has_initial.to(torch.bool).contiguous()

    code, row, size = codes[qkv.dtype], qkv.stride(0), qkv.element_size()
    address = qkv.data_ptr()
    k_address = address + heads * width * size
    v_address = k_address + heads * width * size
    slot_stride, head_stride, value_stride, _ = state.stride()
    pool = (state.data_ptr(), slot_stride, head_stride, 1, value_stride)
    g_strides, beta_strides, gate_strides = g.stride(), beta.stride(), gate.stride()
    # In the order of KdaArgs and KdaLayer: a tensor is address, dtype, strides of batch, token and head.
    args = _ARGS.pack(
        *(address, code, 0, row, width),
        *(k_address, code, 0, row, width),
        *(v_address, code, 0, row, value_width),
        *(g.data_ptr(), codes[g.dtype], 0, g_strides[0], g_strides[1]),
        *(beta.data_ptr(), codes[beta.dtype], 0, beta_strides[0], beta_strides[1]),
        *(out.data_ptr(), codes[out.dtype], 0, out.stride(0), value_width),
        *pool,
        *pool,
        0,  # the offsets are in the layer
        A_log.data_ptr(),
        0 if dt_bias is None else dt_bias.data_ptr(),
        *(state_indices.shape[0], qkv.shape[0], heads, value_heads, width, value_width),
        1,  # L2 norm
        GATE_SOFTPLUS if options.lower_bound is None else GATE_LOWER_BOUND,
        1,  # sigmoid of beta
        torch.get_num_threads(),
        *(options.scale, options.lower_bound or 0.0, 1.0),
    )
    layer = ctypes.create_string_buffer(_LAYER.size)
    _LAYER.pack_into(
        layer,
        0,
        *(conv_weight.data_ptr(), codes[conv_weight.dtype], conv_weight.shape[1]),
        *(conv_state.data_ptr(), codes[conv_state.dtype], *conv_state.stride()),
        *(gate.data_ptr(), codes[gate.dtype], 0, gate_strides[0], gate_strides[1]),
        *(norm_weight.data_ptr(), options.norm_eps),
        state_indices.data_ptr(),
        1 if state_indices.dim() == 1 else state_indices.shape[1],
        0 if has_initial is None else has_initial.data_ptr(),
        0 if num_accepted is None else num_accepted.data_ptr(),
        0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        *(slots, 0, 0),
    )
    _native.kernel(kernel, "pp")(args, layer)
    problem, at = _LAYER.unpack(layer)[-2:]
    if problem:
        raise layer_problem(problem, at, slots, qkv.shape[0])


@dispatch.register("kda_prefill", "cpu", _refuses)
def kda_prefill(
    qkv, g, beta, gate, conv_weight, conv_state, state, state_indices, cu_seqlens, has_initial_state,
    A_log, dt_bias, norm_weight, out, options: LayerOptions,
) -> None:  # fmt: skip
    _call(
        "kda_prefill", qkv, g, beta, gate, conv_weight, conv_state, state, state_indices, cu_seqlens,
        has_initial_state, None, A_log, dt_bias, norm_weight, out, options,
    )  # fmt: skip


@dispatch.register("kda_decode", "cpu", _refuses)
def kda_decode(
    qkv, g, beta, gate, conv_weight, conv_state, state, state_indices,
    A_log, dt_bias, norm_weight, cu_seqlens, num_accepted_tokens, out, options: LayerOptions,
) -> None:  # fmt: skip
    _call(
        "kda_decode", qkv, g, beta, gate, conv_weight, conv_state, state, state_indices, cu_seqlens,
        None, num_accepted_tokens, A_log, dt_bias, norm_weight, out, options,
    )  # fmt: skip
