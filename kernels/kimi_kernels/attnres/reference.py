"""Attention Residuals in plain torch (Attention Residuals, arXiv 2603.15031, sections 3 and 4).

All of it computes in float32, or float64 when an input is float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch


def _accumulator(*tensors: Tensor | None) -> torch.dtype:
    return (
        torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    )


def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm without gain, and its factor."""
    factor = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * factor, factor


def _unit_backward(d_unit: Tensor, unit: Tensor, factor: Tensor) -> Tensor:
    return factor * (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True))


@dispatch.register("attn_res", "reference")
def mix(
    queries: Tensor,
    residuals: Sequence[Tensor],
    rms_weights: Tensor,
    output_rms_weight: Tensor | None,
    rms_eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """S queries over n sources: (out [S, ..., D] in the sources' dtype, lse [S, ...])."""
    acc = _accumulator(queries, residuals[0], rms_weights, output_rms_weight)
    values = torch.stack([r.to(acc) for r in residuals])
    keys, _ = _unit(values, rms_eps)
    folded = queries.to(acc) * rms_weights.to(acc) * scale
    logits = torch.einsum("sd,n...d->sn...", folded, keys)
    out = torch.einsum("sn...,n...d->s...d", logits.softmax(1), values)
    if output_rms_weight is not None:
        out = _unit(out, rms_eps)[0] * output_rms_weight.to(acc)
    return out.to(residuals[0].dtype).contiguous(), logits.logsumexp(1).contiguous()


@dispatch.register("attn_res_backward", "reference")
def mix_backward(
    d_out: Tensor,
    d_lse: Tensor,
    queries: Tensor,
    residuals: Sequence[Tensor],
    rms_weights: Tensor,
    output_rms_weight: Tensor | None,
    rms_eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """Gradients of `mix`: queries, rms_weights, output_rms_weight, residuals."""
    acc = _accumulator(queries, residuals[0], rms_weights, output_rms_weight)
    values = torch.stack([r.to(acc) for r in residuals])
    keys, factor = _unit(values, rms_eps)
    folded = queries.to(acc) * rms_weights.to(acc) * scale
    weights = torch.einsum("sd,n...d->sn...", folded, keys).softmax(1)
    d_mixed = d_out.to(acc)
    d_gain = None
    if output_rms_weight is not None:
        unit, out_factor = _unit(torch.einsum("sn...,n...d->s...d", weights, values), rms_eps)
        d_gain = (d_mixed * unit).flatten(0, -2).sum(0).to(output_rms_weight.dtype)
        d_mixed = _unit_backward(d_mixed * output_rms_weight.to(acc), unit, out_factor)
    along = torch.einsum("s...d,n...d->sn...", d_mixed, values)
    d_logits = weights * (along - (weights * along).sum(1, keepdim=True) + d_lse.to(acc).unsqueeze(1))
    d_keys = torch.einsum("sn...,sd->n...d", d_logits, folded)
    d_values = torch.einsum("sn...,s...d->n...d", weights, d_mixed) + _unit_backward(d_keys, keys, factor)
    d_folded = torch.einsum("snr,nrd->sd", d_logits.flatten(2), keys.flatten(1, -2))
    return (
        (d_folded * rms_weights.to(acc) * scale).to(queries.dtype),
        (d_folded * queries.to(acc) * scale).to(rms_weights.dtype),
        d_gain,
        [d.to(r.dtype, copy=True).contiguous() for d, r in zip(d_values.unbind(0), residuals)],
    )


@dispatch.register("attn_res_merge", "reference")
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
    """One more source on top of (out, lse)."""
    acc = _accumulator(out, lse, query, rms_weight, output_rms_weight)
    logit = _unit(partial.to(acc), rms_eps)[0] @ (query.to(acc) * rms_weight.to(acc) * scale)
    gate = torch.sigmoid(logit - lse.to(acc)).unsqueeze(-1)
    merged = out.to(acc) + gate * (partial.to(acc) - out.to(acc))
    if output_rms_weight is not None:
        merged = _unit(merged, rms_eps)[0] * output_rms_weight.to(acc)
    return merged.to(partial.dtype)


@dispatch.register("attn_res_merge_backward", "reference")
def merge_backward(
    d_merged: Tensor,
    out: Tensor,
    lse: Tensor,
    partial: Tensor,
    query: Tensor,
    rms_weight: Tensor,
    output_rms_weight: Tensor | None,
    rms_eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `merge`: out, lse, partial, query, rms_weight, output_rms_weight."""
    acc = _accumulator(out, lse, query, rms_weight, output_rms_weight)
    key, factor = _unit(partial.to(acc), rms_eps)
    folded = query.to(acc) * rms_weight.to(acc) * scale
    gate = torch.sigmoid(key @ folded - lse.to(acc)).unsqueeze(-1)
    difference = partial.to(acc) - out.to(acc)
    d = d_merged.to(acc)
    d_gain = None
    if output_rms_weight is not None:
        unit, out_factor = _unit(out.to(acc) + gate * difference, rms_eps)
        d_gain = (d * unit).flatten(0, -2).sum(0).to(output_rms_weight.dtype)
        d = _unit_backward(d * output_rms_weight.to(acc), unit, out_factor)
    d_logit = (d * difference).sum(-1, keepdim=True) * gate * (1 - gate)
    d_folded = (d_logit * key).flatten(0, -2).sum(0)
    d_partial = d * gate + _unit_backward(d_logit * folded, key, factor)
    return (
        (d * (1 - gate)).to(out.dtype),
        -d_logit.squeeze(-1).to(lse.dtype),
        d_partial.to(partial.dtype),
        (d_folded * rms_weight.to(acc) * scale).to(query.dtype),
        (d_folded * query.to(acc) * scale).to(rms_weight.dtype),
        d_gain,
    )


@dispatch.register("attn_res_step", "reference")
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
    """`merge` of the updated partial sum: (merged, partial + update)."""
    next_partial = partial + update
    return merge(out, lse, next_partial, query, rms_weight, output_rms_weight, rms_eps, scale), next_partial


@dispatch.register("attn_res_step_backward", "reference")
def step_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `step`: out, lse, partial and update (the same), query, rms_weight, output_rms_weight."""
    d_out, d_lse, d_partial, *rest = merge_backward(
        d_merged, out, lse, next_partial, query, rms_weight, output_rms_weight, rms_eps, scale
    )
    return d_out, d_lse, d_partial + d_next, *rest
