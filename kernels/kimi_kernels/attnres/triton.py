"""Attention Residuals on Triton kernels: float32 or bfloat16 sources. The kernels are imported when first run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _triton, dispatch

_DTYPES = (torch.float32, torch.bfloat16)
ROWS_OF_PROGRAM = 32  # whose gradients of the queries are added up in registers; more where there would be
MAX_GROUPS = 512  # groups of rows, which are added up in memory


def _refuses(name: str, x: Tensor, *weights: Tensor | None) -> str | None:
    if x.dtype not in _DTYPES:
        return f"takes float32 or bfloat16, got {x.dtype} for {name}"
    if any(w is not None and w.dtype == torch.float64 for w in weights):
        return "computes in float32, got float64 weights"
    return None


def _rows(x: Tensor) -> Tensor:
    """`x` as [rows, D], in place where its rows are evenly spaced.

    A row of a multiple of 16 bytes starts at one, so that it is read in one way only: that gives it the same bits.
    """
    width, size = x.shape[-1], x.element_size()
    flat = _triton.rows(x.reshape(-1, width))
    starts = (flat.data_ptr(), _stride(flat) * size)
    if width * size % 16 == 0 and any(start % 16 for start in starts):
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat


def _stride(flat: Tensor) -> int:
    """Of the rows of [rows, D]; a single row's is of no meaning, and so does not compile a kernel of its own."""
    return flat.stride(0) if flat.shape[0] > 1 else flat.shape[1]


def _strides(flat: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(map(_stride, flat))


def _chunks(sources: Sequence[Tensor], most: int) -> list[tuple[Tensor, ...]]:
    """The sources of each launch: at most `most`, and as equally many as can be."""
    n = len(sources)
    count = -(-n // most)
    return [tuple(sources[i * n // count : (i + 1) * n // count]) for i in range(count)]


def _groups(rows: int) -> tuple[int, int]:
    """Groups of rows whose gradients are added up by one program, and rows of each."""
    size = max(ROWS_OF_PROGRAM, -(-rows // MAX_GROUPS))
    return -(-rows // size), size


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _mix(
    queries: Tensor, sources: Sequence[Tensor], weights: Tensor, gain: Tensor | None, out: Tensor, lse: Tensor,
    eps: float, scale: float,
) -> None:  # fmt: skip
    """The mixtures of all sources [rows, D] into out [S, rows, D] and lse [S, rows], one launch for each chunk."""
    from . import triton_kernels as kernels

    rows, width = sources[0].shape
    count, size = len(queries), sources[0].element_size()
    chunks = _chunks(sources, kernels.MAX_SOURCES)
    carried = carried_lse = None
    for number, chunk in enumerate(chunks):
        last = number == len(chunks) - 1
        # Never in place: a thread may read what another one of its program has written.
        to, lse_to = (out, lse) if last else (_empty(out, *out.shape), torch.empty_like(lse))
        config = kernels.mix_config(len(chunk), count, width, size, _triton.on_amd())
        constants = {"CARRY": number > 0, "HAS_GAIN": last and gain is not None}
        _triton.launch(
            kernels.mix_kernel, (rows * -(-count // config.constants["SB"]),), out,
            chunk, queries, weights, gain if last else None, carried, carried_lse, to, lse_to,
            _strides(chunk), _stride(queries), _stride(weights), rows, count, scale, eps,
            config=config._replace(constants={**config.constants, **constants}),
        )  # fmt: skip
        carried, carried_lse = to, lse_to


def _mix_refuses(queries, residuals, rms_weights, output_rms_weight, rms_eps, scale):
    return _refuses("residuals", residuals[0], queries, rms_weights, output_rms_weight)


@dispatch.register("attn_res", "triton", _mix_refuses)
def mix(
    queries: Tensor,
    residuals: Sequence[Tensor],
    rms_weights: Tensor,
    output_rms_weight: Tensor | None,
    rms_eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    first, count = residuals[0], len(queries)
    out = _empty(first, count, *first.shape, dtype=first.dtype)
    lse = _empty(first, count, *first.shape[:-1])
    sources, gain = list(map(_rows, residuals)), _contiguous(output_rms_weight)
    _mix(_triton.rows(queries), sources, _triton.rows(rms_weights), gain, out, lse, rms_eps, scale)
    return out, lse


@dispatch.register("attn_res_backward", "triton", lambda d_out, d_lse, *args: _mix_refuses(*args))
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
    from . import triton_kernels as kernels

    sources, gain = list(map(_rows, residuals)), _contiguous(output_rms_weight)
    q, w = _triton.rows(queries), _triton.rows(rms_weights)
    d_out, d_lse = d_out.contiguous(), d_lse.to(torch.float32).contiguous()
    rows, width = sources[0].shape
    count, n, size = len(q), len(sources), sources[0].element_size()
    has_gain = {"HAS_GAIN": gain is not None}
    factors = _empty(d_out, n, rows)
    logits, along, shares, slopes = (_empty(d_out, count, n, rows) for _ in range(4))
    pulls = torch.empty_like(factors)
    mixed = against = mixed_squares = mixed_factors = mixed_pulls = d_gain = None
    if gain is not None:
        mixed, against = _empty(d_out, count, rows, width), torch.empty_like(along)
        mixed_squares, mixed_factors, mixed_pulls = (_empty(d_out, count, rows) for _ in range(3))
        _mix(q, sources, w, None, mixed, torch.empty_like(mixed_squares), rms_eps, scale)

    chunks, before = _chunks(sources, kernels.MAX_SOURCES_BACK), 0
    for chunk in chunks:
        config = kernels.score_config(len(chunk), count, width, size, gain is not None)
        _triton.launch(
            kernels.score_kernel, (rows * -(-count // config.constants["SB"]),), d_out,
            chunk, q, w, gain, d_out, mixed, factors, logits, along, against, mixed_squares,
            _strides(chunk), _stride(q), _stride(w), rows, count, n, before, scale, rms_eps,
            config=config._replace(constants={**config.constants, **has_gain}),
        )  # fmt: skip
        before += len(chunk)

    config = kernels.coefficient_config(n, width)
    _triton.launch(
        kernels.coefficient_kernel, (-(-rows // config.constants["BR"]),), d_out,
        factors, logits, along, against, mixed_squares, d_lse, shares, slopes, pulls, mixed_factors, mixed_pulls,
        rows, count, n, rms_eps,
        config=config._replace(constants={**config.constants, **has_gain}),
    )  # fmt: skip

    groups, rows_of_program = _groups(rows)
    d_sources = [_empty(d_out, *r.shape, dtype=r.dtype) for r in residuals]
    d_folded, before = _empty(d_out, len(chunks), groups, count, width), 0
    if gain is not None:
        d_gain = _empty(d_out, groups, width)
    for number, chunk in enumerate(chunks):
        config = kernels.gradient_config(len(chunk), count, width, size)
        constants, d_chunk = config.constants, tuple(d_sources[before : before + len(chunk)])
        _triton.launch(
            kernels.gradient_kernel, (-(-width // constants["BD"]), groups, -(-count // constants["SB"])), d_out,
            chunk, q, w, gain, d_out, mixed, pulls, shares, slopes, mixed_factors, mixed_pulls,
            d_chunk, d_folded[number], d_gain,
            _strides(chunk), (width,) * len(chunk), _stride(q), _stride(w), rows, count, n, before, rows_of_program,
            scale, config=config._replace(constants={**constants, **has_gain}),
        )  # fmt: skip
        before += len(chunk)
    total = d_folded.sum((0, 1))
    return (
        (total * rms_weights * scale).to(queries.dtype),
        (total * queries * scale).to(rms_weights.dtype),
        None if d_gain is None or output_rms_weight is None else d_gain.sum(0).to(output_rms_weight.dtype),
        d_sources,
    )


def _merge(
    out: Tensor, lse: Tensor, partial: Tensor, update: Tensor | None, query: Tensor, rms_weight: Tensor,
    output_rms_weight: Tensor | None, rms_eps: float, scale: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    from . import triton_kernels as kernels

    merged = _empty(partial, *partial.shape, dtype=partial.dtype)
    next_partial = None if update is None else torch.empty_like(merged)
    rows_out, rows_partial = _rows(out), _rows(partial)
    rows_update = rows_partial if update is None else _rows(update)
    config = kernels.merge_config(partial.shape[-1], partial.element_size())
    constants = {"HAS_UPDATE": update is not None, "HAS_GAIN": output_rms_weight is not None}
    _triton.launch(
        kernels.merge_kernel, (len(rows_partial),), partial,
        rows_out, lse.contiguous(), rows_partial, rows_update, query.contiguous(), rms_weight.contiguous(),
        _contiguous(output_rms_weight), merged, next_partial,
        *_strides((rows_out, rows_partial, rows_update)), scale, rms_eps,
        config=config._replace(constants={**config.constants, **constants}),
    )  # fmt: skip
    return merged, next_partial


def _merge_refuses(out, lse, partial, query, rms_weight, output_rms_weight, rms_eps, scale):
    return _refuses("partial", partial, lse, query, rms_weight, output_rms_weight)


@dispatch.register("attn_res_merge", "triton", _merge_refuses)
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
    merged, _ = _merge(out, lse, partial, None, query, rms_weight, output_rms_weight, rms_eps, scale)
    return merged


def _merge_backward(
    d_merged: Tensor, d_next: Tensor | None, out: Tensor, lse: Tensor, partial: Tensor, query: Tensor,
    rms_weight: Tensor, output_rms_weight: Tensor | None, rms_eps: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """`d_next`: what else comes back to the partial sum that was merged."""
    from . import triton_kernels as kernels

    rows_out, rows_partial, rows_d = _rows(out), _rows(partial), _rows(d_merged)
    rows_next = rows_d if d_next is None else _rows(d_next)
    q, w, gain = query.contiguous(), rms_weight.contiguous(), _contiguous(output_rms_weight)
    rows, width = rows_partial.shape
    d_out, d_partial = (_empty(x, *x.shape, dtype=x.dtype) for x in (out, partial))
    d_lse, scalars = _empty(lse, *lse.shape, dtype=lse.dtype), _empty(partial, 5, rows)
    has_gain = {"HAS_GAIN": gain is not None}
    config = kernels.merge_config(width, partial.element_size())
    _triton.launch(
        kernels.merge_score_kernel, (rows,), partial,
        rows_out, lse.contiguous(), rows_partial, q, w, gain, rows_d, d_lse, scalars,
        *_strides((rows_out, rows_partial, rows_d)), rows, scale, rms_eps,
        config=config._replace(constants={**config.constants, **has_gain}),
    )  # fmt: skip
    groups, rows_of_program = _groups(rows)
    d_folded = _empty(partial, groups, width)
    d_gain = None if gain is None else torch.empty_like(d_folded)
    config = kernels.merge_gradient_config(width)
    constants = {**config.constants, **has_gain, "HAS_NEXT": d_next is not None}
    _triton.launch(
        kernels.merge_gradient_kernel, (-(-width // constants["BD"]), groups), partial,
        rows_out, rows_partial, q, w, gain, rows_d, rows_next, scalars, d_out, d_partial, d_folded, d_gain,
        *_strides((rows_out, rows_partial, rows_d, rows_next)), rows, rows_of_program, scale,
        config=config._replace(constants=constants),
    )  # fmt: skip
    total = d_folded.sum(0)
    return (
        d_out,
        d_lse,
        d_partial,
        (total * rms_weight * scale).to(query.dtype),
        (total * query * scale).to(rms_weight.dtype),
        None if d_gain is None or output_rms_weight is None else d_gain.sum(0).to(output_rms_weight.dtype),
    )


@dispatch.register("attn_res_merge_backward", "triton", lambda d_merged, *args: _merge_refuses(*args))
def merge_backward(d_merged: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    return _merge_backward(d_merged, None, *args)


@dispatch.register(
    "attn_res_step",
    "triton",
    lambda out, lse, partial, update, *rest: _merge_refuses(out, lse, partial, *rest),
)
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
    merged, next_partial = _merge(
        out, lse, partial, update, query, rms_weight, output_rms_weight, rms_eps, scale
    )
    assert next_partial is not None
    return merged, next_partial


@dispatch.register("attn_res_step_backward", "triton", lambda d_merged, d_next, *args: _merge_refuses(*args))
def step_backward(
    d_merged: Tensor, d_next: Tensor, *args
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    return _merge_backward(d_merged, d_next, *args)
