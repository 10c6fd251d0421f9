"""Custom ops of Attention Residuals: what autograd and torch.compile see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .._library import custom_op
from . import cpu, reference, triton  # noqa: F401  (register the backends)


@custom_op("kimi::attn_res", mutates_args=())
def mix(
    queries: Tensor,
    residuals: list[Tensor],
    rms_weights: Tensor,
    output_rms_weight: Tensor | None,
    rms_eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    device = residuals[0].device
    return dispatch.run(
        "attn_res", device, queries, residuals, rms_weights, output_rms_weight, rms_eps, scale
    )


@mix.register_fake
def _(queries, residuals, rms_weights, output_rms_weight, rms_eps, scale):
    first, count = residuals[0], queries.shape[0]
    weights = (queries, rms_weights, output_rms_weight, first)
    wide = any(w is not None and w.dtype == torch.float64 for w in weights)
    lse_dtype = torch.float64 if wide else torch.float32
    return first.new_empty((count, *first.shape)), first.new_empty(
        (count, *first.shape[:-1]), dtype=lse_dtype
    )


# Gradients as one list (queries, rms_weights, residuals, [output_rms_weight]): results cannot be optional.
@custom_op("kimi::attn_res_backward", mutates_args=())
def _mix_backward(
    d_out: Tensor,
    d_lse: Tensor,
    queries: Tensor,
    residuals: list[Tensor],
    rms_weights: Tensor,
    output_rms_weight: Tensor | None,
    rms_eps: float,
    scale: float,
) -> list[Tensor]:
    d_queries, d_weights, d_gain, d_residuals = dispatch.run(
        "attn_res_backward",
        residuals[0].device,
        d_out,
        d_lse,
        queries,
        residuals,
        rms_weights,
        output_rms_weight,
        rms_eps,
        scale,
    )
    return [d_queries, d_weights, *d_residuals, *([] if d_gain is None else [d_gain])]


@_mix_backward.register_fake
def _(d_out, d_lse, queries, residuals, rms_weights, output_rms_weight, rms_eps, scale):
    inputs = [queries, rms_weights, *residuals] + ([] if output_rms_weight is None else [output_rms_weight])
    return [x.new_empty(x.shape) for x in inputs]


def _save_mix(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    queries, residuals, rms_weights, output_rms_weight, ctx.rms_eps, ctx.scale = inputs
    ctx.has_gain = output_rms_weight is not None
    gain = (output_rms_weight,) if ctx.has_gain else ()
    ctx.save_for_backward(queries, rms_weights, *gain, *residuals)


def _mix_grad(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
    queries, rms_weights, *rest = ctx.saved_tensors
    gain = rest.pop(0) if ctx.has_gain else None
    grads = _mix_backward(d_out, d_lse, queries, rest, rms_weights, gain, ctx.rms_eps, ctx.scale)
    n = len(rest)
    return grads[0], grads[2 : 2 + n], grads[1], grads[2 + n] if ctx.has_gain else None, None, None


mix.register_autograd(_mix_grad, setup_context=_save_mix)


@custom_op("kimi::attn_res_merge", mutates_args=())
def merge(
    out: Tensor,
    lse: Tensor,
    partial: Tensor,
    query: Tensor,
    rms_weight: Tensor,
    output_rms_weight: Tensor | None,
    rms_eps: float,
    scale: float,
) -> Tensor:
    return dispatch.run(
        "attn_res_merge",
        partial.device,
        out,
        lse,
        partial,
        query,
        rms_weight,
        output_rms_weight,
        rms_eps,
        scale,
    )


@merge.register_fake
def _(out, lse, partial, query, rms_weight, output_rms_weight, rms_eps, scale):
    return partial.new_empty(partial.shape)


@custom_op("kimi::attn_res_merge_backward", mutates_args=())
def _merge_backward(
    d_merged: Tensor,
    out: Tensor,
    lse: Tensor,
    partial: Tensor,
    query: Tensor,
    rms_weight: Tensor,
    output_rms_weight: Tensor | None,
    rms_eps: float,
    scale: float,
) -> list[Tensor]:
    *grads, d_gain = dispatch.run(
        "attn_res_merge_backward",
        partial.device,
        d_merged,
        out,
        lse,
        partial,
        query,
        rms_weight,
        output_rms_weight,
        rms_eps,
        scale,
    )
    return [*grads, *([] if d_gain is None else [d_gain])]


@_merge_backward.register_fake
def _(d_merged, out, lse, partial, query, rms_weight, output_rms_weight, rms_eps, scale):
    inputs = [out, lse, partial, query, rms_weight] + (
        [] if output_rms_weight is None else [output_rms_weight]
    )
    return [x.new_empty(x.shape) for x in inputs]


def _save_merge(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.rms_eps, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _merge_grad(ctx: Any, d_merged: Tensor) -> tuple[Any, ...]:
    grads = _merge_backward(d_merged, *ctx.saved_tensors, ctx.rms_eps, ctx.scale)
    return *grads[:5], grads[5] if len(grads) > 5 else None, None, None


merge.register_autograd(_merge_grad, setup_context=_save_merge)


@custom_op("kimi::attn_res_step", mutates_args=())
def step(
    out: Tensor,
    lse: Tensor,
    partial: Tensor,
    update: Tensor,
    query: Tensor,
    rms_weight: Tensor,
    output_rms_weight: Tensor | None,
    rms_eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return dispatch.run(
        "attn_res_step",
        partial.device,
        out,
        lse,
        partial,
        update,
        query,
        rms_weight,
        output_rms_weight,
        rms_eps,
        scale,
    )


@step.register_fake
def _(out, lse, partial, update, query, rms_weight, output_rms_weight, rms_eps, scale):
    return partial.new_empty(partial.shape), partial.new_empty(partial.shape)


@custom_op("kimi::attn_res_step_backward", mutates_args=())
def _step_backward(
    d_merged: Tensor,
    d_next: Tensor,
    out: Tensor,
    lse: Tensor,
    next_partial: Tensor,
    query: Tensor,
    rms_weight: Tensor,
    output_rms_weight: Tensor | None,
    rms_eps: float,
    scale: float,
) -> list[Tensor]:
    *grads, d_gain = dispatch.run(
        "attn_res_step_backward",
        next_partial.device,
        d_merged,
        d_next,
        out,
        lse,
        next_partial,
        query,
        rms_weight,
        output_rms_weight,
        rms_eps,
        scale,
    )
    return [*grads, *([] if d_gain is None else [d_gain])]


@_step_backward.register_fake
def _(d_merged, d_next, out, lse, next_partial, query, rms_weight, output_rms_weight, rms_eps, scale):
    inputs = [out, lse, next_partial, query, rms_weight] + (
        [] if output_rms_weight is None else [output_rms_weight]
    )
    return [x.new_empty(x.shape) for x in inputs]


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, lse, _, _, *weights, ctx.rms_eps, ctx.scale = inputs
    ctx.save_for_backward(out, lse, output[1], *weights)


def _step_grad(ctx: Any, d_merged: Tensor, d_next: Tensor) -> tuple[Any, ...]:
    grads = _step_backward(d_merged, d_next, *ctx.saved_tensors, ctx.rms_eps, ctx.scale)
    d_out, d_lse, d_partial, d_query, d_weight, *d_gain = grads
    return d_out, d_lse, d_partial, d_partial, d_query, d_weight, d_gain[0] if d_gain else None, None, None


step.register_autograd(_step_grad, setup_context=_save_step)
