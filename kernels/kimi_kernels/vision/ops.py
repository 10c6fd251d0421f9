"""Custom ops of the vision towers: what autograd and torch.compile see."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import dispatch
from .._library import custom_op
from . import reference, triton  # noqa: F401  (register the backends)


@custom_op("kimi::rope_2d", mutates_args=())
def rope(q: Tensor, k: Tensor, grid: Tensor, theta: float, inverse: bool) -> tuple[Tensor, Tensor]:
    return dispatch.run("rope_2d", q.device, q, k, grid, theta, inverse)


@rope.register_fake
def _(q, k, grid, theta, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save_rope(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, grid, ctx.theta, ctx.inverse = inputs
    ctx.save_for_backward(grid)


def _rope_grad(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
    """A rotation is orthogonal: gradients are turned back."""
    (grid,) = ctx.saved_tensors
    return *rope(dq, dk, grid, ctx.theta, not ctx.inverse), None, None, None


rope.register_autograd(_rope_grad, setup_context=_save_rope)


@custom_op("kimi::rope_2d_inplace", mutates_args=("qkv",))
def rope_inplace(qkv: Tensor, grid: Tensor, theta: float) -> None:
    dispatch.run("rope_2d_inplace", qkv.device, qkv, grid, theta)


@rope_inplace.register_fake
def _(qkv, grid, theta):
    return None


@custom_op("kimi::interpolate_pos_embed", mutates_args=())
def interpolate(x: Tensor, weight: Tensor, grid: Tensor, time_weight: Tensor | None, bicubic: bool) -> Tensor:
    return dispatch.run("interpolate_pos_embed", x.device, x, weight, grid, time_weight, bicubic)


@interpolate.register_fake
def _(x, weight, grid, time_weight, bicubic):
    return x.new_empty(x.shape)


@custom_op("kimi::interpolate_pos_embed_backward", mutates_args=())
def _interpolate_backward(d_out: Tensor, weight: Tensor, grid: Tensor, bicubic: bool) -> Tensor:
    return dispatch.run("interpolate_pos_embed_backward", d_out.device, d_out, weight, grid, bicubic)


@_interpolate_backward.register_fake
def _(d_out, weight, grid, bicubic):
    return weight.new_empty(weight.shape)


def _save_interpolate(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, weight, grid, _, ctx.bicubic = inputs
    ctx.save_for_backward(weight, grid)


def _interpolate_grad(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    weight, grid = ctx.saved_tensors
    d_weight = _interpolate_backward(d_out, weight, grid, ctx.bicubic) if ctx.needs_input_grad[1] else None
    return d_out, d_weight, None, None, None


interpolate.register_autograd(_interpolate_grad, setup_context=_save_interpolate)


@custom_op("kimi::merge_patches", mutates_args=())
def merge(x: Tensor, grid: Tensor, kernel_h: int, kernel_w: int, count: int) -> Tensor:
    return dispatch.run("merge_patches", x.device, x, grid, kernel_h, kernel_w, count)


@merge.register_fake
def _(x, grid, kernel_h, kernel_w, count):
    return x.new_empty((count, kernel_h * kernel_w, x.shape[1]))


@custom_op("kimi::merge_patches_backward", mutates_args=())
def _merge_backward(d_out: Tensor, grid: Tensor, kernel_h: int, kernel_w: int, patches: int) -> Tensor:
    return dispatch.run("merge_patches_backward", d_out.device, d_out, grid, kernel_h, kernel_w, patches)


@_merge_backward.register_fake
def _(d_out, grid, kernel_h, kernel_w, patches):
    return d_out.new_empty((patches, d_out.shape[2]))


def _save_merge(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, grid, ctx.kernel_h, ctx.kernel_w, _ = inputs
    ctx.patches = x.shape[0]
    ctx.save_for_backward(grid)


def _merge_grad(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    (grid,) = ctx.saved_tensors
    return _merge_backward(d_out, grid, ctx.kernel_h, ctx.kernel_w, ctx.patches), None, None, None, None


merge.register_autograd(_merge_grad, setup_context=_save_merge)
