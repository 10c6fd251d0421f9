"""Custom ops of the gated RMSNorm: what autograd and torch.compile see."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import dispatch
from .._library import custom_op
from . import cpu, reference, triton  # noqa: F401  (register the backends)


@custom_op("kimi::rmsnorm_gated", mutates_args=())
def rmsnorm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    return dispatch.run("rmsnorm_gated", x.device, x, gate, weight, eps, silu)


@rmsnorm_gated.register_fake
def _(x, gate, weight, eps, silu):
    return x.new_empty(x.shape)


@custom_op("kimi::rmsnorm_gated_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return dispatch.run("rmsnorm_gated_backward", x.device, dy, x, gate, weight, eps, silu)


@_backward.register_fake
def _(dy, x, gate, weight, eps, silu):
    return x.new_empty(x.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.eps, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return *_backward(dy, *ctx.saved_tensors, ctx.eps, ctx.silu), None, None


rmsnorm_gated.register_autograd(_grad, setup_context=_save)
