"""Attention Residuals: each sub-layer reads a softmax mixture over the outputs of all earlier ones.

Attention Residuals, arXiv 2603.15031, sections 3 (definition) and 4 (two-phase computation).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import ops

__all__ = ["attn_res", "attn_res_merge", "attn_res_phase1", "attn_res_step"]


def _validate_sources(residuals: Sequence[Tensor]) -> None:
    if len(residuals) == 0:
        raise ValueError("residuals is empty: pass at least one source [..., D]")
    for i, residual in enumerate(residuals):
        if residual.shape != residuals[0].shape or residual.dtype != residuals[0].dtype:
            raise ValueError(
                f"residuals[{i}] is {residual.dtype} {tuple(residual.shape)}, but residuals[0] is "
                f"{residuals[0].dtype} {tuple(residuals[0].shape)}: all sources need one shape and dtype"
            )


def _validate_weight(name: str, weight: Tensor | None, shape: tuple[int, ...]) -> None:
    if weight is not None and tuple(weight.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(weight.shape)}")


def _validate_merge(
    out: Tensor,
    lse: Tensor,
    partial: Tensor,
    query: Tensor,
    rms_weight: Tensor,
    output_rms_weight: Tensor | None,
) -> None:
    width = partial.shape[-1]
    if out.shape != partial.shape or out.dtype != partial.dtype:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)}, but partial is {partial.dtype} "
            f"{tuple(partial.shape)}: pass one sub-layer's row of attn_res_phase1"
        )
    _validate_weight("lse", lse, tuple(partial.shape[:-1]))
    _validate_weight("query", query, (width,))
    _validate_weight("rms_weight", rms_weight, (width,))
    _validate_weight("output_rms_weight", output_rms_weight, (width,))


def attn_res(
    query: Tensor,
    residuals: Sequence[Tensor],
    rms_weight: Tensor,
    output_rms_weight: Tensor | None = None,
    rms_eps: float = 1e-6,
    scale: float = 1.0,
) -> Tensor:
    """sum_i p_i residuals[i] with p = softmax_i(scale * <query, RMSNorm(residuals[i]) * rms_weight>).

    Args:
        query: [D], the learned pseudo-query of the sub-layer.
        residuals: the n >= 1 sources, each [..., D], one dtype. They are read in place, never stacked.
        rms_weight: [D], gain of the key norm. Values are mixed as they are.
        output_rms_weight: [D]; when given, the mixture goes through an RMSNorm with this gain.
        rms_eps: epsilon of both norms.
        scale: factor on the scores; the paper uses 1.

    Returns:
        [..., D] in the sources' dtype; arithmetic is float32 (float64 for float64 inputs).
    """
    _validate_sources(residuals)
    width = residuals[0].shape[-1]
    _validate_weight("query", query, (width,))
    _validate_weight("rms_weight", rms_weight, (width,))
    _validate_weight("output_rms_weight", output_rms_weight, (width,))
    out, _ = ops.mix(
        query.unsqueeze(0), list(residuals), rms_weight.unsqueeze(0), output_rms_weight, rms_eps, scale
    )
    return out.squeeze(0)


def attn_res_phase1(
    queries: Tensor,
    residuals: Sequence[Tensor],
    rms_weights: Tensor,
    rms_eps: float = 1e-6,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The share of the finished blocks for all S sub-layers of a block at once (paper, algorithm 1).

    Args:
        queries: [S, D], the pseudo-queries of the block's sub-layers.
        residuals: the n >= 1 finished sources, each [..., D], one dtype.
        rms_weights: [S, D], the key gain of each sub-layer.
        rms_eps: epsilon of the key norm.
        scale: factor on the scores.

    Returns:
        (out [S, ..., D] in the sources' dtype, the softmax mixture over these sources;
        lse [S, ...] float32, the log of the softmax denominator), for `attn_res_merge`.
    """
    _validate_sources(residuals)
    if queries.dim() != 2 or queries.shape[1] != residuals[0].shape[-1]:
        raise ValueError(f"queries must have shape (S, {residuals[0].shape[-1]}), got {tuple(queries.shape)}")
    _validate_weight("rms_weights", rms_weights, tuple(queries.shape))
    return ops.mix(queries, list(residuals), rms_weights, None, rms_eps, scale)


def attn_res_merge(
    out: Tensor,
    lse: Tensor,
    partial: Tensor,
    query: Tensor,
    rms_weight: Tensor,
    output_rms_weight: Tensor | None = None,
    rms_eps: float = 1e-6,
    scale: float = 1.0,
) -> Tensor:
    """Add the running partial sum of the current block as one more source (paper, algorithm 1).

    `attn_res_merge(*phase1 row, partial, ...)` equals `attn_res(query, [*blocks, partial], ...)`.

    Args:
        out: [..., D], one sub-layer's row of `attn_res_phase1`.
        lse: [...], its log denominator.
        partial: [..., D], the additional source, in out's dtype.
        query: [D], that sub-layer's pseudo-query.
        rms_weight: [D], its key gain.
        output_rms_weight: [D]; when given, the mixture goes through an RMSNorm with this gain.
        rms_eps: epsilon of both norms.
        scale: factor on the scores; the same as in phase 1.

    Returns:
        [..., D] in partial's dtype.
    """
    _validate_merge(out, lse, partial, query, rms_weight, output_rms_weight)
    return ops.merge(out, lse, partial, query, rms_weight, output_rms_weight, rms_eps, scale)


def attn_res_step(
    out: Tensor,
    lse: Tensor,
    partial: Tensor,
    update: Tensor,
    query: Tensor,
    rms_weight: Tensor,
    output_rms_weight: Tensor | None = None,
    rms_eps: float = 1e-6,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """From one sub-layer's output to the next one's input: the residual update, the merge and the norm at once.

    `attn_res_step(out, lse, partial, update, ...)` equals `attn_res_merge(out, lse, partial + update, ...)` together
    with that sum. A block's first sub-layer has no partial sum: its input is phase 1's row, its output the partial.

    Args:
        out: [..., D], the next sub-layer's row of `attn_res_phase1`.
        lse: [...], its log denominator.
        partial: [..., D], the sum of the outputs of the block's sub-layers before the last one, in out's dtype.
        update: [..., D], the output of the last one, in out's dtype.
        query: [D], the next sub-layer's pseudo-query.
        rms_weight: [D], its key gain.
        output_rms_weight: [D]; when given, the mixture goes through an RMSNorm with this gain.
        rms_eps: epsilon of both norms.
        scale: factor on the scores; the same as in phase 1.

    Returns:
        (merged [..., D], the input of the next sub-layer; partial + update [..., D]), both in partial's dtype.
    """
    if update.shape != partial.shape or update.dtype != partial.dtype:
        raise ValueError(
            f"update is {update.dtype} {tuple(update.shape)}, but partial is {partial.dtype} "
            f"{tuple(partial.shape)}: pass the sub-layer's output in the shape and dtype of the sum it goes to"
        )
    _validate_merge(out, lse, partial, query, rms_weight, output_rms_weight)
    return ops.step(out, lse, partial, update, query, rms_weight, output_rms_weight, rms_eps, scale)
