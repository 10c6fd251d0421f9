"""Attention Residuals on the native library: float32 or bfloat16 sources, float32 arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native, dispatch


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _fold(query: Tensor, rms_weight: Tensor, scale: float) -> Tensor:
    """The gains of the key norm and the scale, folded into the query."""
    folded = query.to(torch.float32) * rms_weight.to(torch.float32)
    return (folded if scale == 1.0 else folded * scale).contiguous()


def _refuses_weights(*weights: Tensor | None) -> str | None:
    if any(w is not None and w.dtype == torch.float64 for w in weights):
        return "takes no float64 weights"
    return None


def _mix_refuses(queries, residuals, rms_weights, output_rms_weight, rms_eps, scale):
    return _native.refuses_dtype(*residuals) or _refuses_weights(queries, rms_weights, output_rms_weight)


@dispatch.register("attn_res", "cpu", _mix_refuses)
def mix(
    queries: Tensor,
    residuals: Sequence[Tensor],
    rms_weights: Tensor,
    output_rms_weight: Tensor | None,
    rms_eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    sources = [r.contiguous() for r in residuals]
    first = sources[0]
    width, count = first.shape[-1], queries.shape[0]
    rows = first.numel() // width
    folded, gain = _fold(queries, rms_weights, scale), _float(output_rms_weight)
    out = first.new_empty((count, *first.shape))
    lse = first.new_empty((count, *first.shape[:-1]), dtype=torch.float32)
    _native.kernel("attn_res_forward", "pipippp" + "iifii")(
        _native.pointer_array(sources),
        len(sources),
        folded.data_ptr(),
        count,
        _native.pointer(gain),
        out.data_ptr(),
        lse.data_ptr(),
        rows,
        width,
        rms_eps,
        _native.DTYPE_CODES[first.dtype],
        _native.threads(rows * width * len(sources) * count),
    )
    return out, lse


def _mix_backward_refuses(d_out, d_lse, queries, residuals, rms_weights, output_rms_weight, rms_eps, scale):
    return _native.refuses_dtype(d_out, *residuals) or _refuses_weights(
        queries, rms_weights, output_rms_weight
    )


@dispatch.register("attn_res_backward", "cpu", _mix_backward_refuses)
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
    sources = [r.contiguous() for r in residuals]
    d_out, d_lse = d_out.contiguous(), d_lse.contiguous()
    first = sources[0]
    width, count = first.shape[-1], queries.shape[0]
    rows = first.numel() // width
    folded, gain = _fold(queries, rms_weights, scale), _float(output_rms_weight)
    d_sources = [torch.empty_like(s) for s in sources]
    d_folded = torch.empty_like(folded)
    d_gain = None if gain is None else torch.empty_like(gain)
    _native.kernel("attn_res_backward", "pipipppppp" + "iifii")(
        _native.pointer_array(sources),
        len(sources),
        folded.data_ptr(),
        count,
        _native.pointer(gain),
        d_out.data_ptr(),
        d_lse.data_ptr(),
        _native.pointer_array(d_sources),
        d_folded.data_ptr(),
        _native.pointer(d_gain),
        rows,
        width,
        rms_eps,
        _native.DTYPE_CODES[first.dtype],
        _native.threads(rows * width * len(sources) * count),
    )
    return (
        (d_folded * rms_weights * scale).to(queries.dtype),
        (d_folded * queries * scale).to(rms_weights.dtype),
        None if d_gain is None or output_rms_weight is None else d_gain.to(output_rms_weight.dtype),
        d_sources,
    )


def _merge_refuses(out, lse, partial, query, rms_weight, output_rms_weight, rms_eps, scale):
    return _native.refuses_dtype(out, partial) or _refuses_weights(lse, query, rms_weight, output_rms_weight)


@dispatch.register("attn_res_merge", "cpu", _merge_refuses)
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
    out, partial, lse = out.contiguous(), partial.contiguous(), lse.to(torch.float32).contiguous()
    width = partial.shape[-1]
    rows = partial.numel() // width
    folded, gain = _fold(query, rms_weight, scale), _float(output_rms_weight)
    merged = torch.empty_like(partial)
    _native.kernel("attn_res_merge_forward", "pppppp" + "iifii")(
        out.data_ptr(),
        lse.data_ptr(),
        partial.data_ptr(),
        folded.data_ptr(),
        _native.pointer(gain),
        merged.data_ptr(),
        rows,
        width,
        rms_eps,
        _native.DTYPE_CODES[partial.dtype],
        _native.threads(rows * width * 4),
    )
    return merged


def _merge_backward_refuses(d_merged, *forward_args):
    return _native.refuses_dtype(d_merged, forward_args[2]) or _merge_refuses(*forward_args)


@dispatch.register("attn_res_merge_backward", "cpu", _merge_backward_refuses)
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
    d_merged, out, partial = d_merged.contiguous(), out.contiguous(), partial.contiguous()
    lse_float = lse.to(torch.float32).contiguous()
    width = partial.shape[-1]
    rows = partial.numel() // width
    folded, gain = _fold(query, rms_weight, scale), _float(output_rms_weight)
    d_out, d_lse, d_partial = torch.empty_like(out), torch.empty_like(lse_float), torch.empty_like(partial)
    d_folded = torch.empty_like(folded)
    d_gain = None if gain is None else torch.empty_like(gain)
    _native.kernel("attn_res_merge_backward", "ppppppppppp" + "iifii")(
        out.data_ptr(),
        lse_float.data_ptr(),
        partial.data_ptr(),
        folded.data_ptr(),
        _native.pointer(gain),
        d_merged.data_ptr(),
        d_out.data_ptr(),
        d_lse.data_ptr(),
        d_partial.data_ptr(),
        d_folded.data_ptr(),
        _native.pointer(d_gain),
        rows,
        width,
        rms_eps,
        _native.DTYPE_CODES[partial.dtype],
        _native.threads(rows * width * 4),
    )
    return (
        d_out,
        d_lse.to(lse.dtype),
        d_partial,
        (d_folded * rms_weight * scale).to(query.dtype),
        (d_folded * query * scale).to(rms_weight.dtype),
        None if d_gain is None or output_rms_weight is None else d_gain.to(output_rms_weight.dtype),
    )


def _step_refuses(out, lse, partial, update, *rest):
    return _merge_refuses(out, lse, partial, *rest)


@dispatch.register("attn_res_step", "cpu", _step_refuses)
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
    next_partial = partial + update
    return merge(out, lse, next_partial, query, rms_weight, output_rms_weight, rms_eps, scale), next_partial


def _step_backward_refuses(d_merged, d_next, *forward_args):
    return _merge_backward_refuses(d_merged, *forward_args)


@dispatch.register("attn_res_step_backward", "cpu", _step_backward_refuses)
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
    d_out, d_lse, d_partial, *rest = merge_backward(
        d_merged, out, lse, next_partial, query, rms_weight, output_rms_weight, rms_eps, scale
    )
    return d_out, d_lse, d_partial + d_next, *rest
