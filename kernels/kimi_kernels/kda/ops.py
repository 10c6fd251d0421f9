"""Custom ops of KDA: what autograd and torch.compile see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .._library import custom_op
from . import cpu, reference, triton  # noqa: F401  (register the backends)
from .reference import Options

_OPTIONS = len(Options._fields)


def _state_like(k: Tensor, v: Tensor, cu_seqlens: Tensor | None, wide: bool, state_v_first: bool) -> Tensor:
    count = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sizes = (v.shape[3], k.shape[3]) if state_v_first else (k.shape[3], v.shape[3])
    return v.new_empty((count, v.shape[2], *sizes), dtype=torch.float64 if wide else torch.float32)


def _is_wide(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.dtype == torch.float64 for t in tensors)


def _run(op: str, tensors: tuple[Tensor | None, ...], options: Options) -> tuple[Tensor, Tensor]:
    first = tensors[0]
    assert first is not None
    return dispatch.run(op, first.device, *tensors, options)


@custom_op("kimi::chunk_kda", mutates_args=())
def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    l2norm: bool,
    gate: bool,
    beta_sigmoid: bool,
    allow_neg_eigval: bool,
    lower_bound: float | None,
    state_v_first: bool,
) -> tuple[Tensor, Tensor]:
    options = Options(scale, l2norm, gate, beta_sigmoid, allow_neg_eigval, lower_bound, state_v_first)
    return _run("chunk_kda", (q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens), options)


@custom_op("kimi::fused_recurrent_kda", mutates_args=())
def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    l2norm: bool,
    gate: bool,
    beta_sigmoid: bool,
    allow_neg_eigval: bool,
    lower_bound: float | None,
    state_v_first: bool,
) -> tuple[Tensor, Tensor]:
    options = Options(scale, l2norm, gate, beta_sigmoid, allow_neg_eigval, lower_bound, state_v_first)
    return _run("fused_recurrent_kda", (q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens), options)


@chunk.register_fake
@recurrent.register_fake
def _(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, *options):
    wide = _is_wide(q, k, v, g, beta, initial_state, A_log, dt_bias)
    return v.new_empty(v.shape), _state_like(k, v, cu_seqlens, wide, Options(*options).state_v_first)


@custom_op("kimi::chunk_kda_states", mutates_args=())
def chunk_states(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    interval: int,
    scale: float,
    l2norm: bool,
    gate: bool,
    beta_sigmoid: bool,
    allow_neg_eigval: bool,
    lower_bound: float | None,
    state_v_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(scale, l2norm, gate, beta_sigmoid, allow_neg_eigval, lower_bound, state_v_first)
    tensors = (q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens)
    return dispatch.run("chunk_kda_states", q.device, *tensors, interval, options)


@chunk_states.register_fake
def _(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, interval, *options):
    wide = _is_wide(q, k, v, g, beta, initial_state, A_log, dt_bias)
    final = _state_like(k, v, cu_seqlens, wide, Options(*options).state_v_first)
    rows = k.shape[0] * (k.shape[1] // interval)
    return v.new_empty(v.shape), final, final.new_empty((rows, *final.shape[1:]))


# Gradients of the tensors that are there, in the order of the arguments: results cannot be optional.
@custom_op("kimi::chunk_kda_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    l2norm: bool,
    gate: bool,
    beta_sigmoid: bool,
    allow_neg_eigval: bool,
    lower_bound: float | None,
    state_v_first: bool,
) -> list[Tensor]:
    options = Options(scale, l2norm, gate, beta_sigmoid, allow_neg_eigval, lower_bound, state_v_first)
    tensors = (q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens)
    grads = dispatch.run("chunk_kda_backward", q.device, d_out, d_state, *tensors, options)
    return [grad for grad in grads if grad is not None]


@_backward.register_fake
def _(d_out, d_state, q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, *options):
    return [x.new_empty(x.shape) for x in (q, k, v, g, beta, initial_state, A_log, dt_bias) if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:-_OPTIONS])
    ctx.options = inputs[-_OPTIONS:]


def _grad(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grads = iter(_backward(d_out, d_state, *tensors, *ctx.options))
    # cu_seqlens and the options have none
    return (*(None if x is None else next(grads) for x in tensors[:-1]), *(None,) * (1 + _OPTIONS))


chunk.register_autograd(_grad, setup_context=_save)
recurrent.register_autograd(_grad, setup_context=_save)


@custom_op("kimi::kda_gate", mutates_args=())
def gate(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    return dispatch.run("kda_gate", g.device, g, A_log, dt_bias, lower_bound)


@gate.register_fake
def _(g, A_log, dt_bias, lower_bound):
    return g.new_empty(g.shape, dtype=torch.float64 if _is_wide(g, A_log, dt_bias) else torch.float32)


@custom_op("kimi::kda_gate_backward", mutates_args=())
def _gate_backward(
    d_out: Tensor, g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> list[Tensor]:
    grads = dispatch.run("kda_gate_backward", g.device, d_out, g, A_log, dt_bias, lower_bound)
    return [grad for grad in grads if grad is not None]


@_gate_backward.register_fake
def _(d_out, g, A_log, dt_bias, lower_bound):
    return [x.new_empty(x.shape) for x in (g, A_log, dt_bias) if x is not None]


def _save_gate(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.lower_bound = inputs
    ctx.save_for_backward(*tensors)


def _gate_grad(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grads = iter(_gate_backward(d_out, *tensors, ctx.lower_bound))
    return (*(None if x is None else next(grads) for x in tensors), None)


gate.register_autograd(_gate_grad, setup_context=_save_gate)
