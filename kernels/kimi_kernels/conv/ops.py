"""Custom ops of the causal convolution: what autograd and torch.compile see."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import dispatch
from .._library import custom_op
from . import cpu, reference, triton  # noqa: F401  (register the backends)


@custom_op("kimi::causal_conv1d", mutates_args=())
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    args = (x, weight, bias, initial_state, cu_seqlens, silu, output_final_state)
    return dispatch.run("causal_conv1d", x.device, *args)


@causal_conv1d.register_fake
def _(x, weight, bias, initial_state, cu_seqlens, silu, output_final_state):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    count = sequences if output_final_state else 0
    return x.new_empty(x.shape), x.new_empty((count, *weight.shape), dtype=reference.state_dtype(x))


# Gradients as one list (x, weight, [bias], [initial_state]): results cannot be optional.
@custom_op("kimi::causal_conv1d_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> list[Tensor]:
    args = (dy, dfinal, x, weight, bias, initial_state, cu_seqlens, silu)
    grads = dispatch.run("causal_conv1d_backward", x.device, *args)
    return [grad for grad in grads if grad is not None]


@_backward.register_fake
def _(dy, dfinal, x, weight, bias, initial_state, cu_seqlens, silu):
    return [t.new_empty(t.shape) for t in (x, weight, bias, initial_state) if t is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.silu, ctx.has_final = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Any, ...]:
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    grads = _backward(
        dy, dfinal if ctx.has_final else None, x, weight, bias, initial_state, cu_seqlens, ctx.silu
    )
    dx, dweight, *rest = grads
    dbias = rest.pop(0) if bias is not None else None
    dinitial = rest.pop(0) if initial_state is not None else None
    return dx, dweight, dbias, dinitial, None, None, None


causal_conv1d.register_autograd(_grad, setup_context=_save)
