"""Triton kernels of Attention Residuals, and the configurations in which they are compiled. Needs triton.

A forward program owns one row (a token): its result depends on nothing else, and has the same bits alone and in a
batch. Sources stay where they are; a kernel gets a tuple of them and handles the N of a launch as one tile [NP, BD].

Rows of D elements that a token moves, with n sources and S queries: n + S in `mix_kernel`, 3 in `merge_kernel`, 5
with the update of the partial sum. Sub-layers in groups of G = S thus take n / G + 6 rows each, (n + G) / G for phase
1 and 5 for the step, which replaces the residual addition and the norm as well; a pass over all sources in every
sub-layer takes n + 4 with that addition. Where the sources of a row do not fit the registers, `mix_kernel` reads them
again, last tile first, while the caches still hold them; so do the neighbouring programs of more than 4 queries.

Gradients take no atomic additions. `score_kernel` makes what the softmax needs in one pass over the sources,
`coefficient_kernel` turns that into factors, and `gradient_kernel` goes through groups of rows tile by tile and adds
up the gradients of the queries in registers: 2 (n + S) rows read, n written. With an output norm the mixtures are made
again first, in float32. The merge has its own two kernels.
"""

# mypy: disable-error-code=assignment
# Tuples grow where kernels have one value for each query; mypy takes the empty one for a type of its own.

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._triton import Config, Variant, power_of_two

MAX_SOURCES = 16  # of a launch; more go through in chunks
MAX_SOURCES_BACK = 8  # their gradients are in registers as well
MAX_QUERIES = 4  # of a program


@triton.jit
def _rows_of(tensors, strides, row, N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr):
    """Pointers [NP] to one row of each of N tensors."""
    n = tl.arange(0, NP)
    at = tensors[0] + tl.zeros([NP], tl.int64)
    for i in tl.static_range(N):
        at = tl.where(n == i, tensors[i] + row * strides[i], at)
    # The host passes rows that start at multiples of 16 bytes wherever their length allows it.
    if D * tensors[0].dtype.element_ty.primitive_bitwidth % 128 == 0:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def _tile(at, c, N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr):
    """Columns c of N rows, [NP, BD] float32; zero beyond."""
    inside = (tl.arange(0, NP) < N)[:, None] & (c < D)[None, :]
    return tl.load(at[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _columns(at, c, D: tl.constexpr, present=True):
    """Columns c of one row, [BD] float32; zero beyond."""
    return tl.load(at + c, mask=(c < D) & present, other=0.0).to(tl.float32)


@triton.jit
def _folded(query, weight, c, scale, D: tl.constexpr, present=True):
    """Columns of a query with the gain of its key norm and the scale folded in."""
    return _columns(query, c, D, present) * _columns(weight, c, D, present) * scale


@triton.jit
def _narrow(x, V: tl.constexpr):
    """Sums of V neighbours, which one thread holds: what is left to add up across threads is done once, at the end."""
    if len(x.shape) == 2:
        sums = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // V, V]), axis=2)
    else:
        sums = tl.sum(tl.reshape(x, [x.shape[0] // V, V]), axis=1)
    return sums


@triton.jit
def _mixture(x, share, carried, place, carried_share, c, present, D: tl.constexpr, CARRY: tl.constexpr):
    """One query's mixture of a tile, on top of what earlier launches carried over."""
    y = tl.sum(share[:, None] * x, axis=0)
    if CARRY:
        y += carried_share * _columns(carried + place, c, D, present)
    return y


@triton.jit
def mix_kernel(
    sources, queries, weights, gain, carried, carried_lse, out, lse,
    strides, query_stride, weight_stride, rows, count, scale, eps,
    N: tl.constexpr, NP: tl.constexpr, SB: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr,
    CARRY: tl.constexpr, HAS_GAIN: tl.constexpr,
):  # fmt: skip
    """SB of `count` queries over N sources, for one row; grid (rows * ceil(count / SB)).

    out [count, rows, D], lse [count, rows]. To CARRY on from other sources: their normalised mixture `carried`
    float32 and their lse.
    """
    rows = tl.cast(rows, tl.int64)
    groups = (count + SB - 1) // SB
    row = (tl.program_id(0) // groups).to(tl.int64)
    first = tl.program_id(0) % groups * SB
    at = _rows_of(sources, strides, row, N, NP, D)
    square = tl.zeros([NP, BD // V], tl.float32)
    dots = ()
    for _ in tl.static_range(SB):
        dots += (tl.zeros([NP, BD // V], tl.float32),)
    for start in tl.range(0, D, BD):
        c = start + tl.arange(0, BD)
        x = _tile(at, c, N, NP, D)
        square += _narrow(x * x, V)
        sums = ()
        for s in tl.static_range(SB):
            query, weight = queries + (first + s) * query_stride, weights + (first + s) * weight_stride
            folded = _folded(query, weight, c, scale, D, first + s < count)
            sums += (dots[s] + _narrow(x * folded[None, :], V),)
        dots = sums
    factor = tl.rsqrt(tl.sum(square, axis=1) / D + eps)

    shares = ()
    carried_shares = ()
    totals = ()
    for s in tl.static_range(SB):
        logit = tl.where(tl.arange(0, NP) < N, tl.sum(dots[s], axis=1) * factor, float("-inf"))
        most = tl.max(logit, axis=0)
        if CARRY:
            before = tl.load(carried_lse + (first + s) * rows + row, mask=first + s < count, other=0.0)
            most = tl.maximum(most, before)
        share = tl.exp(logit - most)
        total = tl.sum(share, axis=0)
        if CARRY:
            total += tl.exp(before - most)
            carried_shares += (tl.exp(before - most) / total,)
        else:
            carried_shares += (0.0,)
        totals += (most + tl.log(total),)
        shares += (share / total,)

    TILES: tl.constexpr = (D + BD - 1) // BD
    factors = ()
    if HAS_GAIN:
        norms = ()
        for _ in tl.static_range(SB):
            norms += (tl.zeros([BD // V], tl.float32),)
        for t in tl.range(0, TILES):
            c = (TILES - 1 - t) * BD + tl.arange(0, BD)
            x = _tile(at, c, N, NP, D)
            sums = ()
            for s in tl.static_range(SB):
                place = ((first + s) * rows + row) * D
                y = _mixture(x, shares[s], carried, place, carried_shares[s], c, first + s < count, D, CARRY)
                sums += (norms[s] + _narrow(y * y, V),)
            norms = sums
        for s in tl.static_range(SB):
            factors += (tl.rsqrt(tl.sum(norms[s], axis=0) / D + eps),)
    for t in tl.range(0, TILES):
        if HAS_GAIN:
            c = t * BD + tl.arange(0, BD)
        else:
            c = (TILES - 1 - t) * BD + tl.arange(0, BD)
        x = _tile(at, c, N, NP, D)
        for s in tl.static_range(SB):
            place = ((first + s) * rows + row) * D
            y = _mixture(x, shares[s], carried, place, carried_shares[s], c, first + s < count, D, CARRY)
            if HAS_GAIN:
                y = y * factors[s] * _columns(gain, c, D)
            tl.store(out + place + c, y.to(out.dtype.element_ty), mask=(c < D) & (first + s < count))
    # Last: behind a store, what was read before would be read again.
    for s in tl.static_range(SB):
        tl.store(lse + (first + s) * rows + row, totals[s], mask=first + s < count)


@triton.jit
def score_kernel(
    sources, queries, weights, gain, d_out, mixed, factors, logits, along, against, mixed_squares,
    strides, query_stride, weight_stride, rows, count, sources_in_all, before, scale, eps,
    N: tl.constexpr, NP: tl.constexpr, SB: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr,
    HAS_GAIN: tl.constexpr,
):  # fmt: skip
    """What the gradients need of one row, from one pass over N sources, of which `before` came earlier; the same grid.

    factors [n, rows] of the key norms; logits and along [count, n, rows], products of the sources with the folded
    queries and with d_out. With an output norm d_out includes its gain here, against [count, n, rows] are products
    with the mixtures before the norm, mixed [count, rows, D] float32, and mixed_squares [count, rows] sums of their
    squares.
    """
    rows = tl.cast(rows, tl.int64)
    groups = (count + SB - 1) // SB
    row = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    first = group * SB
    at = _rows_of(sources, strides, row, N, NP, D)
    square = tl.zeros([NP, BD // V], tl.float32)
    dots = ()
    slopes = ()
    overlaps = ()
    norms = ()
    for _ in tl.static_range(SB):
        dots += (tl.zeros([NP, BD // V], tl.float32),)
        slopes += (tl.zeros([NP, BD // V], tl.float32),)
        if HAS_GAIN:
            overlaps += (tl.zeros([NP, BD // V], tl.float32),)
            norms += (tl.zeros([BD // V], tl.float32),)
    for start in tl.range(0, D, BD):
        c = start + tl.arange(0, BD)
        x = _tile(at, c, N, NP, D)
        square += _narrow(x * x, V)
        more_dots = ()
        more_slopes = ()
        more_overlaps = ()
        more_norms = ()
        for s in tl.static_range(SB):
            present = first + s < count
            query, weight = queries + (first + s) * query_stride, weights + (first + s) * weight_stride
            folded = _folded(query, weight, c, scale, D, present)
            more_dots += (dots[s] + _narrow(x * folded[None, :], V),)
            place = ((first + s) * rows + row) * D
            d = _columns(d_out + place, c, D, present)
            if HAS_GAIN:
                d *= _columns(gain, c, D)
                y = _columns(mixed + place, c, D, present)
                more_overlaps += (overlaps[s] + _narrow(x * y[None, :], V),)
                more_norms += (norms[s] + _narrow(y * y, V),)
            more_slopes += (slopes[s] + _narrow(x * d[None, :], V),)
        dots = more_dots
        slopes = more_slopes
        if HAS_GAIN:
            overlaps = more_overlaps
            norms = more_norms
    n = tl.arange(0, NP)
    factor = tl.rsqrt(tl.sum(square, axis=1) / D + eps)
    tl.store(factors + (before + n) * rows + row, factor, mask=(n < N) & (group == 0))
    for s in tl.static_range(SB):
        place = ((first + s) * sources_in_all + before + n) * rows + row
        inside = (n < N) & (first + s < count)
        tl.store(logits + place, tl.sum(dots[s], axis=1) * factor, mask=inside)
        tl.store(along + place, tl.sum(slopes[s], axis=1), mask=inside)
        if HAS_GAIN:
            tl.store(against + place, tl.sum(overlaps[s], axis=1), mask=inside)
            place = (first + s) * rows + row
            tl.store(mixed_squares + place, tl.sum(norms[s], axis=0), mask=first + s < count)


@triton.jit
def coefficient_kernel(
    factors, logits, along, against, mixed_squares, d_lse, shares, slopes, pulls, mixed_factors, mixed_pulls,
    rows, count, sources_in_all, eps,
    D: tl.constexpr, NT: tl.constexpr, BR: tl.constexpr, HAS_GAIN: tl.constexpr,
):  # fmt: skip
    """The factors of the gradients of BR rows from what `score_kernel` found; grid (rows / BR).

    d_mixed = d_out, or with an output norm mixed_factors gain d_out - mixed_pulls mixed, both [count, rows].
    d_source = sum over queries of shares d_mixed + slopes folded query, minus pulls source; a query's d_folded = sum
    over sources and rows of slopes source. shares and slopes [count, n, rows], pulls [n, rows].
    """
    rows = tl.cast(rows, tl.int64)
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    n = tl.arange(0, NT)
    inside = (n < sources_in_all)[:, None] & (row < rows)[None, :]
    tile = n[:, None] * rows + row[None, :]
    factor = tl.load(factors + tile, mask=inside, other=0.0)
    pull = tl.zeros([NT, BR], tl.float32)
    for s in tl.range(0, count):
        place = s * sources_in_all * rows + tile
        logit = tl.load(logits + place, mask=inside, other=0.0)
        logit = tl.where((n < sources_in_all)[:, None], logit, float("-inf"))
        share = tl.exp(logit - tl.max(logit, axis=0)[None, :])
        share = share / tl.sum(share, axis=0)[None, :]
        slope = tl.load(along + place, mask=inside, other=0.0)
        at = s * rows + row
        if HAS_GAIN:
            norm = tl.rsqrt(tl.load(mixed_squares + at, mask=row < rows, other=0.0) / D + eps)
            back = norm * norm * norm * tl.sum(share * slope, axis=0) / D
            slope = norm[None, :] * slope - back[None, :] * tl.load(against + place, mask=inside, other=0.0)
            tl.store(mixed_factors + at, norm, mask=row < rows)
            tl.store(mixed_pulls + at, back, mask=row < rows)
        d_logit = slope - tl.sum(share * slope, axis=0)[None, :]
        d_logit = share * (d_logit + tl.load(d_lse + at, mask=row < rows, other=0.0)[None, :])
        pull += d_logit * tl.where(inside, logit, 0.0)
        tl.store(shares + place, share, mask=inside)
        tl.store(slopes + place, d_logit * factor, mask=inside)
    tl.store(pulls + tile, pull * factor * factor / D, mask=inside)


@triton.jit
def gradient_kernel(
    sources, queries, weights, gain, d_out, mixed, pulls, shares, slopes, mixed_factors, mixed_pulls,
    d_sources, d_folded, d_gain,
    strides, d_strides, query_stride, weight_stride, rows, count, sources_in_all, before, rows_of_program, scale,
    N: tl.constexpr, NP: tl.constexpr, SB: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, HAS_GAIN: tl.constexpr,
):  # fmt: skip
    """BD columns of a group of rows, with the factors of `coefficient_kernel`; grid (D / BD, groups, count / SB).

    Writes d_sources, and sums over the group's rows: d_folded [groups, count, D], d_gain [groups, D].
    """
    rows = tl.cast(rows, tl.int64)
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    first = tl.program_id(2) * SB
    start = tl.program_id(1).to(tl.int64) * rows_of_program
    n = tl.arange(0, NP)
    inside = (n < N)[:, None] & (c < D)[None, :]
    sums = ()
    for _ in tl.static_range(SB):
        sums += (tl.zeros([BD], tl.float32),)
    gain_sum = tl.zeros([BD], tl.float32)
    if HAS_GAIN:
        factor_of_mixed = _columns(gain, c, D)
    for row in tl.range(start, tl.minimum(start + rows_of_program, rows)):
        x = _tile(_rows_of(sources, strides, row, N, NP, D), c, N, NP, D)
        more = ()
        for s in tl.static_range(SB):
            place = ((first + s) * sources_in_all + before + n) * rows + row
            slope = tl.load(slopes + place, mask=(n < N) & (first + s < count), other=0.0)
            more += (sums[s] + tl.sum(slope[:, None] * x, axis=0),)
        sums = more
        if first == 0:
            pull = tl.load(pulls + (before + n) * rows + row, mask=n < N, other=0.0)
            dx = -pull[:, None] * x
            for j in tl.range(0, count):
                at = j * rows + row
                d = _columns(d_out + at * D, c, D)
                if HAS_GAIN:
                    y = _columns(mixed + at * D, c, D)
                    norm = tl.load(mixed_factors + at)
                    gain_sum += d * y * norm
                    d = norm * factor_of_mixed * d - tl.load(mixed_pulls + at) * y
                place = (j * sources_in_all + before + n) * rows + row
                share = tl.load(shares + place, mask=n < N, other=0.0)
                slope = tl.load(slopes + place, mask=n < N, other=0.0)
                folded = _folded(queries + j * query_stride, weights + j * weight_stride, c, scale, D)
                dx += share[:, None] * d[None, :] + slope[:, None] * folded[None, :]
            to = _rows_of(d_sources, d_strides, row, N, NP, D)
            tl.store(to[:, None] + c[None, :], dx.to(d_sources[0].dtype.element_ty), mask=inside)
    for s in tl.static_range(SB):
        place = (tl.program_id(1).to(tl.int64) * count + first + s) * D
        tl.store(d_folded + place + c, sums[s], mask=(c < D) & (first + s < count))
    if HAS_GAIN:
        place = tl.program_id(1).to(tl.int64) * D
        tl.store(d_gain + place + c, gain_sum, mask=(c < D) & (first == 0))


@triton.jit
def _partial(partial, update, c, D: tl.constexpr, HAS_UPDATE: tl.constexpr):
    """Columns of the partial sum after the update, rounded as it is stored."""
    y = _columns(partial, c, D)
    if HAS_UPDATE:
        y = (y + _columns(update, c, D)).to(partial.dtype.element_ty).to(tl.float32)
    return y


@triton.jit
def merge_kernel(
    out, lse, partial, update, query, weight, gain, merged, next_partial,
    out_stride, partial_stride, update_stride, scale, eps,
    D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_GAIN: tl.constexpr,
):  # fmt: skip
    """One more source on top of (out, lse), for one row: the partial sum, after its update; grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    out += row * out_stride
    partial += row * partial_stride
    if HAS_UPDATE:
        update += row * update_stride
    square = tl.zeros([BD // V], tl.float32)
    dot = tl.zeros([BD // V], tl.float32)
    for start in tl.range(0, D, BD):
        c = start + tl.arange(0, BD)
        y = _partial(partial, update, c, D, HAS_UPDATE)
        square += _narrow(y * y, V)
        dot += _narrow(y * _folded(query, weight, c, scale, D), V)
    logit = tl.sum(dot, axis=0) * tl.rsqrt(tl.sum(square, axis=0) / D + eps)
    gate = tl.sigmoid(logit - tl.load(lse + row).to(tl.float32))
    norm = 1.0
    if HAS_GAIN:
        square = tl.zeros([BD // V], tl.float32)
        for start in tl.range(0, D, BD):
            c = start + tl.arange(0, BD)
            before = _columns(out, c, D)
            y = before + gate * (_partial(partial, update, c, D, HAS_UPDATE) - before)
            square += _narrow(y * y, V)
        norm = tl.rsqrt(tl.sum(square, axis=0) / D + eps)
    for start in tl.range(0, D, BD):
        c = start + tl.arange(0, BD)
        before = _columns(out, c, D)
        after = _partial(partial, update, c, D, HAS_UPDATE)
        y = before + gate * (after - before)
        if HAS_GAIN:
            y = y * norm * _columns(gain, c, D)
        tl.store(merged + row * D + c, y.to(merged.dtype.element_ty), mask=c < D)
        if HAS_UPDATE:
            tl.store(next_partial + row * D + c, after.to(next_partial.dtype.element_ty), mask=c < D)


@triton.jit
def merge_score_kernel(
    out, lse, partial, query, weight, gain, d_merged, d_lse, scalars,
    out_stride, partial_stride, d_stride, rows, scale, eps,
    D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, HAS_GAIN: tl.constexpr,
):  # fmt: skip
    """d_lse of one row, and the factors of its other gradients; grid (rows).

    scalars [5, rows]: gate; of d_merged and of the mixture in the gradient before the output norm; of the folded
    query and of the partial sum in d_partial.
    """
    rows = tl.cast(rows, tl.int64)
    row = tl.program_id(0).to(tl.int64)
    out += row * out_stride
    partial += row * partial_stride
    d_merged += row * d_stride
    square = tl.zeros([BD // V], tl.float32)
    dot = tl.zeros([BD // V], tl.float32)
    for start in tl.range(0, D, BD):
        c = start + tl.arange(0, BD)
        y = _columns(partial, c, D)
        square += _narrow(y * y, V)
        dot += _narrow(y * _folded(query, weight, c, scale, D), V)
    factor = tl.rsqrt(tl.sum(square, axis=0) / D + eps)
    logit = tl.sum(dot, axis=0) * factor
    gate = tl.sigmoid(logit - tl.load(lse + row).to(tl.float32))
    rise = tl.zeros([BD // V], tl.float32)
    along = tl.zeros([BD // V], tl.float32)
    overlap = tl.zeros([BD // V], tl.float32)
    square = tl.zeros([BD // V], tl.float32)
    for start in tl.range(0, D, BD):
        c = start + tl.arange(0, BD)
        before = _columns(out, c, D)
        difference = _columns(partial, c, D) - before
        d = _columns(d_merged, c, D)
        if HAS_GAIN:
            d *= _columns(gain, c, D)
            mixed = before + gate * difference
            along += _narrow(d * mixed, V)
            overlap += _narrow(mixed * difference, V)
            square += _narrow(mixed * mixed, V)
        rise += _narrow(d * difference, V)
    d_gate = tl.sum(rise, axis=0)
    if HAS_GAIN:
        norm = tl.rsqrt(tl.sum(square, axis=0) / D + eps)
        pull = norm * norm * norm * tl.sum(along, axis=0) / D
        d_gate = norm * d_gate - pull * tl.sum(overlap, axis=0)
        tl.store(scalars + rows + row, norm)
        tl.store(scalars + 2 * rows + row, pull)
    d_logit = d_gate * gate * (1.0 - gate)
    tl.store(scalars + row, gate)
    tl.store(scalars + 3 * rows + row, d_logit * factor)
    tl.store(scalars + 4 * rows + row, d_logit * logit * factor * factor / D)
    tl.store(d_lse + row, (-d_logit).to(d_lse.dtype.element_ty))


@triton.jit
def merge_gradient_kernel(
    out, partial, query, weight, gain, d_merged, d_next, scalars, d_out, d_partial, d_folded, d_gain,
    out_stride, partial_stride, d_stride, next_stride, rows, rows_of_program, scale,
    D: tl.constexpr, BD: tl.constexpr, HAS_NEXT: tl.constexpr, HAS_GAIN: tl.constexpr,
):  # fmt: skip
    """BD columns of a group of rows, with the factors of `merge_score_kernel`; grid (D / BD, groups).

    d_next, of the partial sum from where else it is used, is added to d_partial. Sums over the group's rows:
    d_folded and d_gain [groups, D].
    """
    rows = tl.cast(rows, tl.int64)
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    start = tl.program_id(1).to(tl.int64) * rows_of_program
    folded = _folded(query, weight, c, scale, D)
    total = tl.zeros([BD], tl.float32)
    gain_sum = tl.zeros([BD], tl.float32)
    for row in tl.range(start, tl.minimum(start + rows_of_program, rows)):
        y = _columns(partial + row * partial_stride, c, D)
        d = _columns(d_merged + row * d_stride, c, D)
        gate = tl.load(scalars + row)
        slope = tl.load(scalars + 3 * rows + row)
        if HAS_GAIN:
            before = _columns(out + row * out_stride, c, D)
            mixed = before + gate * (y - before)
            norm = tl.load(scalars + rows + row)
            gain_sum += d * mixed * norm
            d = norm * d * _columns(gain, c, D) - tl.load(scalars + 2 * rows + row) * mixed
        tl.store(d_out + row * D + c, (d * (1.0 - gate)).to(d_out.dtype.element_ty), mask=c < D)
        dy = d * gate + slope * folded - tl.load(scalars + 4 * rows + row) * y
        if HAS_NEXT:
            dy += _columns(d_next + row * next_stride, c, D)
        tl.store(d_partial + row * D + c, dy.to(d_partial.dtype.element_ty), mask=c < D)
        total += slope * y
    place = tl.program_id(1).to(tl.int64) * D
    tl.store(d_folded + place + c, total, mask=c < D)
    if HAS_GAIN:
        tl.store(d_gain + place + c, gain_sum, mask=c < D)


def _vector(size: int, BD: int) -> int:
    """Neighbours in one thread: 16 bytes of them, or fewer where a warp has more threads than that."""
    return max(1, min(16 // size, BD // 32))


def queries_of_program(sources: int, count: int, most: int = MAX_QUERIES) -> int:
    """So many that their sums fit the registers, and equally many in each program."""
    groups = -(-count // (most if sources <= 8 else most // 2))
    return -(-count // groups)


def mix_config(sources: int, count: int, width: int, size: int, amd: bool = False) -> Config:
    """`size`: bytes of an element. Nothing here depends on the number of rows: a row has one result.

    One tile for all of a row where a thread's share of it, in float32, leaves room in the registers for the rest: then
    the compiler reads it once. Otherwise tiles of 16 bytes a thread; half of that for AMD, whose compiler unrolls a
    loop of so few tiles and then keeps them all in registers.
    """
    SB, NP, DP = queries_of_program(sources, count), power_of_two(sources, 1), power_of_two(width, 32)
    V = _vector(size, DP)
    warps = max(1, min(16, DP // (32 * V)))
    if NP * DP // (32 * warps) <= (64 if SB <= 2 else 16):
        BD = DP
    else:
        warps = min(warps, 8 if SB <= 2 else 4)
        BD = 32 * V * warps // (2 if amd else 1)
    return Config({"N": sources, "NP": NP, "SB": SB, "D": width, "BD": BD, "V": V}, warps, 1)


def score_config(sources: int, count: int, width: int, size: int, has_gain: bool) -> Config:
    """Bound by registers: three sums of a query for every source with an output norm, hence two queries a program.
    With two in float32 the assembler of Triton 3.9 spills 4 bytes to have a third program on a processor."""
    SB, DP = queries_of_program(sources, count, 2 if has_gain else MAX_QUERIES), power_of_two(width, 32)
    V = _vector(size, DP)
    warps = max(1, min(4, DP // (32 * V)))
    constants = {"N": sources, "NP": power_of_two(sources, 1), "SB": SB, "D": width, "BD": 32 * V * warps}
    return Config({**constants, "V": V}, warps, 1)


def coefficient_config(sources: int, width: int) -> Config:
    NT = power_of_two(sources, 1)
    return Config({"D": width, "NT": NT, "BR": max(1, 512 // NT)}, 4, 1)


def gradient_config(sources: int, count: int, width: int, size: int) -> Config:
    """Bound by registers, 255 in bfloat16 with 8 sources: a thread has 8 elements of each source and of each gradient
    in float32. Fewer sources in a launch would read the upstream gradients more often."""
    config = score_config(sources, count, width, size, has_gain=True)
    constants = {name: config.constants[name] for name in ("N", "NP", "SB", "D", "BD")}
    return config._replace(constants=constants)


def merge_config(width: int, size: int) -> Config:
    BD = min(8192, power_of_two(width, 32))
    return Config({"D": width, "BD": BD, "V": _vector(size, BD)}, max(1, min(8, BD // 512)), 1)


def merge_gradient_config(width: int) -> Config:
    BD = min(1024, power_of_two(width, 32))
    return Config({"D": width, "BD": BD}, max(1, BD // 256), 1)


def aot_variants() -> list[Variant]:
    """At the widths of Kimi Linear and Kimi K3: phase 1 for a group of sub-layers, direct, and chunks of many."""
    variants = []

    def add(
        name: str,
        kernel: Any,
        types: dict[str, Any],
        config: Config,
        backward: bool = False,
        amd: Config | None = None,
        **more: Any,
    ) -> None:
        strides = {argument: "i32" for argument in kernel.arg_names if argument.endswith("_stride")}
        signature = {a: {**types, **strides}[a] for a in kernel.arg_names if a in types or a in strides}
        config = config._replace(constants={**config.constants, **more})
        if amd is not None:
            amd = amd._replace(constants={**amd.constants, **more})
        variants.append(Variant(name, kernel, signature, config, backward, amd))

    integers = dict.fromkeys(("rows", "count", "sources_in_all", "before", "rows_of_program"), "i32")
    numbers = {**integers, "scale": "fp32", "eps": "fp32"}
    floats = (
        "carried", "carried_lse", "lse", "mixed", "factors", "logits", "along", "against", "mixed_squares",
        "mixed_pulls", "mixed_factors", "d_lse", "pulls", "shares", "slopes", "scalars", "d_folded", "d_gain",
    )  # fmt: skip
    for x, size, width in (("*bf16", 2, 2304), ("*bf16", 2, 7168), ("*fp32", 4, 7168)):
        wide = (
            "out", "d_out", "partial", "update", "merged", "next_partial", "d_merged", "d_next", "d_partial",
            "query", "queries", "weight", "weights", "gain",
        )  # fmt: skip
        types = {**numbers, **dict.fromkeys(floats, "*fp32"), **dict.fromkeys(wide, x)}
        for n, count, gain, carry in (
            (8, 1, True, False), (10, 1, True, False), (8, 2, False, False), (8, 4, False, False),
            (10, 4, False, False), (16, 4, False, True), (3, 1, False, True),
        ):  # fmt: skip
            sources = {"sources": (x,) * n, "strides": ("i32",) * n}
            config, amd = (mix_config(n, count, width, size, amd) for amd in (False, True))
            types_here = {**types, **sources}
            add("attnres_mix", mix_kernel, types_here, config, amd=amd, CARRY=carry, HAS_GAIN=gain)
        for n, count, gain in ((8, 4, False), (5, 1, False), (8, 4, True), (8, 1, True)):
            tuples = dict.fromkeys(("sources", "d_sources"), (x,) * n)
            tuples |= dict.fromkeys(("strides", "d_strides"), ("i32",) * n)
            config = score_config(n, count, width, size, gain)
            add("attnres_score", score_kernel, {**types, **tuples}, config, True, HAS_GAIN=gain)
            config = gradient_config(n, count, width, size)
            add("attnres_gradient", gradient_kernel, {**types, **tuples}, config, True, HAS_GAIN=gain)
        for gain in (False, True):
            config = coefficient_config(8, width)
            add("attnres_coefficient", coefficient_kernel, types, config, True, HAS_GAIN=gain)
            config = merge_config(width, size)
            add("attnres_merge", merge_kernel, types, config, HAS_UPDATE=False, HAS_GAIN=gain)
            add("attnres_step", merge_kernel, types, config, HAS_UPDATE=True, HAS_GAIN=gain)
            add("attnres_merge_score", merge_score_kernel, types, config, True, HAS_GAIN=gain)
            config = merge_gradient_config(width)
            add("attnres_merge_gradient", merge_gradient_kernel, types, config, True, HAS_NEXT=True, HAS_GAIN=gain)
    return variants
