"""KDA on the native library: float32 or bfloat16 tensors, float32 arithmetic and states."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import _native, dispatch
from ._layout import KdaArgs, KdaGrads, States, Tokens
from .reference import Options, by_interval

MAX_HEAD = 256  # csrc/kda/conv.h: kMaxHead

_NO_STATES = States(None, 0, 0, 0, 0)
_GATE_WORK = 40  # operations a gate value takes
_GATE_NONE, GATE_SOFTPLUS, GATE_LOWER_BOUND = 0, 1, 2


def _rows(x: Tensor) -> Tensor:
    """`x` with its channels next to each other; other dimensions may have any stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _tokens(x: Tensor) -> Tokens:
    strides = x.stride()
    return Tokens(x.data_ptr(), _native.DTYPE_CODES[x.dtype], strides[0], strides[1], strides[2])


def _states(x: Tensor | None, v_first: bool) -> States:
    if x is None:
        return _NO_STATES
    n, h, a, b = x.stride()
    return States(x.data_ptr(), n, h, b, a) if v_first else States(x.data_ptr(), n, h, a, b)


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _refuses(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options) -> str | None:
    for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta)):
        if x.dtype not in _native.DTYPE_CODES:
            return f"takes float32 or bfloat16, got {x.dtype} for {name}"
    for name, x in (("initial_state", initial_state), ("A_log", A_log), ("dt_bias", dt_bias)):
        if x is not None and x.dtype == torch.float64:
            return f"computes in float32, got float64 for {name}"
    if k.shape[3] > MAX_HEAD or v.shape[3] > MAX_HEAD:
        return f"takes head sizes up to {MAX_HEAD}, got K={k.shape[3]}, V={v.shape[3]}"
    return None


class _Call:
    """Arguments of one native call, and the tensors that must live as long as it."""

    def __init__(self, q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options: Options) -> None:
        tensors = [_rows(x) for x in (q, k, v, g)]
        A_log, dt_bias = _float(A_log), _float(dt_bias)
        offsets = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
        self.keep = (tensors, beta, initial_state, A_log, dt_bias, offsets)
        batch, length, heads, width = k.shape
        if not options.gate:
            gate = _GATE_NONE
        else:
            gate = GATE_SOFTPLUS if options.lower_bound is None else GATE_LOWER_BOUND
        self.value_heads, self.width, self.value_width = v.shape[2], width, v.shape[3]
        self.count = batch if offsets is None else offsets.shape[0] - 1
        self.args = KdaArgs(
            *(_tokens(x) for x in (*tensors, beta)),
            Tokens(),
            _states(initial_state, options.state_v_first),
            _NO_STATES,
            _native.pointer(offsets),
            _native.pointer(A_log),
            _native.pointer(dt_bias),
            self.count,
            length,
            heads,
            self.value_heads,
            width,
            self.value_width,
            options.l2norm,
            gate,
            options.beta_sigmoid,
            torch.get_num_threads(),
            options.scale,
            options.lower_bound or 0.0,
            2.0 if options.allow_neg_eigval else 1.0,
        )

    def state_shape(self, v_first: bool) -> tuple[int, ...]:
        sizes = (self.value_width, self.width) if v_first else (self.width, self.value_width)
        return (self.count, self.value_heads, *sizes)


def _forward(kernel: str, v: Tensor, call: _Call, options: Options) -> tuple[Tensor, Tensor]:
    out = torch.empty(v.shape, dtype=v.dtype)
    state = torch.empty(call.state_shape(options.state_v_first), dtype=torch.float32)
    call.args.o = _tokens(out)
    call.args.final = _states(state, options.state_v_first)
    _native.kernel(kernel, "p")(ctypes.addressof(call.args))
    return out, state


@dispatch.register("chunk_kda", "cpu", _refuses)
def chunk_kda(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options: Options):
    call = _Call(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options)
    return _forward("kda_forward", v, call, options)


@dispatch.register("chunk_kda_states", "cpu", lambda *args: _refuses(*args[:-2] + args[-1:]))
def chunk_kda_states(*args):
    return by_interval(chunk_kda, *args)


@dispatch.register("fused_recurrent_kda", "cpu", _refuses)
def fused_recurrent_kda(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options: Options):
    call = _Call(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options)
    return _forward("kda_recurrent", v, call, options)


@dispatch.register("chunk_kda_backward", "cpu", lambda d_out, d_state, *args: _refuses(*args))
def chunk_kda_backward(
    d_out, d_state, q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options: Options
) -> list[Tensor | None]:
    call = _Call(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options)
    d_out, d_state = _rows(d_out.to(v.dtype)), d_state.to(torch.float32)
    heads, value_heads = k.shape[2], v.shape[2]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32)

    dq, dk = zeros(*g.shape), zeros(*g.shape)  # per value head
    dv, dg, dbeta = zeros(*v.shape), zeros(*g.shape), zeros(*beta.shape)
    d_initial = None if initial_state is None else zeros(*initial_state.shape)
    dA_log = None if A_log is None else zeros(call.count, value_heads)
    ddt_bias = None if dt_bias is None else zeros(call.count, value_heads, k.shape[3])
    grads = KdaGrads(
        _tokens(d_out),
        _states(d_state, options.state_v_first),
        _states(d_initial, options.state_v_first),
        *map(_native.pointer, (dq, dk, dv, dg, dbeta, dA_log, ddt_bias)),
    )
    _native.kernel("kda_backward", "pp")(ctypes.addressof(call.args), ctypes.addressof(grads))
    if value_heads != heads:
        dq, dk = (x.unflatten(2, (heads, -1)).sum(3) for x in (dq, dk))
    if dA_log is not None:
        dA_log = dA_log.sum(0).view(A_log.shape)
    if ddt_bias is not None:
        ddt_bias = ddt_bias.sum(0).view(dt_bias.shape)
    inputs = (q, k, v, g, beta, initial_state, A_log, dt_bias)
    found = (dq, dk, dv, dg, dbeta, d_initial, dA_log, ddt_bias)
    return [None if x is None or d is None else d.to(x.dtype) for x, d in zip(inputs, found)]


def _gate_refuses(g, A_log, dt_bias, lower_bound) -> str | None:
    if g.dtype not in _native.DTYPE_CODES:
        return f"takes float32 or bfloat16, got {g.dtype} for g"
    if any(x is not None and x.dtype == torch.float64 for x in (A_log, dt_bias)):
        return "computes in float32, got float64 parameters"
    return None


@dispatch.register("kda_gate", "cpu", _gate_refuses)
def kda_gate(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    g, A_log, dt_bias = g.contiguous(), _float(A_log), _float(dt_bias)
    out = torch.empty(g.shape, dtype=torch.float32)
    heads, width = g.shape[-2:]
    _native.kernel("kda_gate", "pippifpiiii")(
        g.data_ptr(),
        _native.DTYPE_CODES[g.dtype],
        _native.pointer(A_log),
        _native.pointer(dt_bias),
        int(lower_bound is not None),
        lower_bound or 0.0,
        out.data_ptr(),
        g.numel() // max(heads * width, 1),
        heads,
        width,
        _native.threads(g.numel() * _GATE_WORK),
    )
    return out


@dispatch.register("kda_gate_backward", "cpu", lambda d_out, *args: _gate_refuses(*args))
def kda_gate_backward(
    d_out: Tensor, g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> list[Tensor | None]:
    raw, rate, bias = g.contiguous(), _float(A_log), _float(dt_bias)
    d_out = d_out.to(torch.float32).contiguous()
    heads, width = g.shape[-2:]
    dg = torch.empty(g.shape, dtype=torch.float32)
    dA_log, ddt_bias = (
        torch.empty(heads, dtype=torch.float32),
        torch.empty(heads * width, dtype=torch.float32),
    )
    _native.kernel("kda_gate_backward", "ppippifpppiiii")(
        d_out.data_ptr(),
        raw.data_ptr(),
        _native.DTYPE_CODES[g.dtype],
        _native.pointer(rate),
        _native.pointer(bias),
        int(lower_bound is not None),
        lower_bound or 0.0,
        dg.data_ptr(),
        dA_log.data_ptr(),
        ddt_bias.data_ptr(),
        g.numel() // max(heads * width, 1),
        heads,
        width,
        _native.threads(g.numel() * _GATE_WORK),
    )
    return [
        dg.to(g.dtype),
        None if A_log is None else dA_log.view(A_log.shape).to(A_log.dtype),
        None if dt_bias is None else ddt_bias.view(dt_bias.shape).to(dt_bias.dtype),
    ]
