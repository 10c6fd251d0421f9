"""Triton kernels of KDA, and the configurations in which they are compiled. Needs triton.

The chunk form runs in two launches. `prepare_kernel` does, for all chunks at once, everything that does not need the
state: norm, gate, cumulative decay, and the two triangular matrices of a chunk. `scan_kernel` then goes from chunk to
chunk with a slice of the state in registers. Gradients take four: these two again, `scan_back_kernel` from the last
chunk to the first, and `gradient_kernel` for all chunks at once.

Decays are exponents of 2 here, and every exponential is of a sum of log decays of consecutive tokens, never of a
difference of sums: none can overflow, cancel or be NaN, whatever the gate.

Sequences of any length share one grid, a program for each slot of `_packing`: a slot is a chunk.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._packing import first_slot, sequence_bounds, sequence_of_slot
from .._triton import Config, Variant, float32_products, power_of_two

LOG2E = tl.constexpr(1.4426950408889634)
NORM_EPS = tl.constexpr(1e-6)  # reference.L2_NORM_EPS
GATE_NONE, GATE_SOFTPLUS, GATE_LOWER_BOUND = 0, 1, 2


@triton.jit
def _pool_entry(state_indices, n, pool_slots):
    """Whether sequence n names an entry of the pool of states, and which."""
    entry = tl.load(state_indices + n).to(tl.int64)
    return (entry >= 0) & (entry < pool_slots), entry


@triton.jit
def _log2_decay(raw, bias, rate, lower_bound, GATE: tl.constexpr):
    """log2 of a token's decay from the gate's input; `kda_gate` of the reference."""
    if GATE == 0:
        decay = raw
    else:
        z = raw + bias
        if GATE == 1:
            small = tl.exp(-tl.abs(z))
            one_more = 1.0 + small
            # log(1 + x) without losing a small x to the rounding of 1 + x
            log1p = tl.where(one_more == 1.0, small, tl.log(one_more) * small / (one_more - 1.0))
            decay = -rate * (tl.maximum(z, 0.0) + log1p)
        else:
            decay = lower_bound * tl.sigmoid(rate * z)
    return decay * LOG2E


@triton.jit
def _half_decays(g, after, BT: tl.constexpr, BK: tl.constexpr, HALF: tl.constexpr):
    """Decay between each row and the middle of its block of 2 HALF rows: from the middle on, or up to it.

    `g` and `after` are log decays of the rows and of the rows behind them. The decay from row j to row i of two
    halves of a block is the product of theirs.
    """
    row = tl.arange(0, BT)
    if HALF == 1:
        since = g
        until = tl.zeros([BT, BK], tl.float32)
    else:
        since = tl.reshape(tl.cumsum(tl.reshape(g, [BT // HALF, HALF, BK]), axis=1), [BT, BK])
        inner = tl.where((row % HALF < HALF - 1)[:, None], after, 0.0)
        until = tl.cumsum(tl.reshape(inner, [BT // HALF, HALF, BK]), axis=1, reverse=True)
        until = tl.reshape(until, [BT, BK])
    upper = (row // HALF) % 2 == 1
    return tl.exp2(tl.where(upper[:, None], since, until))


@triton.jit
def _norms(q_row, k_row, live, width, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """1 / |q| and 1 / |k| of a chunk's rows."""
    q_square = tl.zeros([BT], tl.float32)
    k_square = tl.zeros([BT], tl.float32)
    for channel in tl.range(0, width, BK):
        c = channel + tl.arange(0, BK)
        inside = live[:, None] & (c < K)[None, :]
        x = tl.load(q_row[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(k_row[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
        q_square += tl.sum(x * x, axis=1)
        k_square += tl.sum(y * y, axis=1)
    return tl.rsqrt(q_square + NORM_EPS), tl.rsqrt(k_square + NORM_EPS)


@triton.jit
def _channels(
    q_row, k_row, g_row, g_stride_t, bias, c, live, followed, q_factor, k_factor, rate, lower_bound,
    K: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Some channels of a chunk: q and k times their factors, log2 decays of its rows and of the rows behind them."""
    inside = live[:, None] & (c < K)[None, :]
    next_inside = followed[:, None] & (c < K)[None, :]
    x = tl.load(q_row[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32) * q_factor[:, None]
    y = tl.load(k_row[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32) * k_factor[:, None]
    raw = tl.load(g_row[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
    step = tl.where(inside, _log2_decay(raw, bias, rate, lower_bound, GATE), 0.0)
    raw = tl.load((g_row + g_stride_t)[:, None] + c[None, :], mask=next_inside, other=0.0).to(tl.float32)
    after = tl.where(next_inside, _log2_decay(raw, bias, rate, lower_bound, GATE), 0.0)
    return x, y, step, after


@triton.jit
def _across(x, BT: tl.constexpr, HALF: tl.constexpr, BOTH: tl.constexpr = False):
    """The entries of [BT, BT] whose row is in the upper and column in the lower half of one block of 2 HALF rows.

    BOTH: also those whose row is in the lower and column in the upper half.
    """
    row, column = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    chosen = (row // (2 * HALF) == column // (2 * HALF)) & (row // HALF != column // HALF)
    return tl.where(chosen if BOTH else chosen & (row > column), x, 0.0)


@triton.jit
def _inverse(A, BT: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^-1 of a strictly lower triangular A, exactly, by blocks of twice the size in each step."""
    row, column = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    inverse = tl.where(row == column, 1.0, 0.0) - _across(A, BT, 1)
    for level in tl.static_range(1, LEVELS):
        step = tl.dot(_across(A, BT, 2**level), inverse, input_precision=PRECISION)
        inverse -= tl.dot(inverse, step, input_precision=PRECISION)
    return inverse


@triton.jit
def prepare_kernel(
    q, k, g, beta, A_log, dt_bias, cu_seqlens,
    read_key, query, write_key, decay, solve, attend, solve_back, strengths,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    g_stride_b, g_stride_t, g_stride_h, beta_stride_b, beta_stride_t, beta_stride_h,
    T, N, groups, width, scale, lower_bound, beta_scale,
    HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, LEVELS: tl.constexpr,
    GATE: tl.constexpr, HAS_RATE: tl.constexpr, HAS_BIAS: tl.constexpr, L2NORM: tl.constexpr,
    SIGMOID: tl.constexpr, PACKED: tl.constexpr, PER: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Everything of one chunk and value head that does not need the state; grid (slots, HV).

    With G the decay from the chunk's start: read_key = k G, query = q G, write_key = k (decay up to its end),
    each [slots, HV, BT, KP]; decay [slots, HV, KP] = log2 G of the last row;
    solve = (I + beta A)^-1 diag(beta), attend = scale tril(q k^T decayed), each [slots, HV, BT, BT].
    To KEEP for gradients: solve = (I + A diag(beta))^-1 - I without the factor beta, solve_back = (I + beta A)^-1 - I,
    and strengths [slots, HV, BT] = beta. Without the identity, whose product is not rounded then.
    """
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    n = sequence_of_slot(cu_seqlens, slot, T, N, BT, PACKED)
    first, length = sequence_bounds(cu_seqlens, n, T, PACKED)
    start = (slot - first_slot(first, n, T, BT, PACKED)) * BT
    if (start < 0) | (start >= length):
        return
    batch = n * 0 if PACKED else n
    row = tl.arange(0, BT)
    token = first + start + row
    live = start + row < length
    followed = (row < BT - 1) & (start + row + 1 < length)
    key_head = head // groups
    q_row = q + batch * q_stride_b + token * q_stride_t + key_head.to(tl.int64) * q_stride_h
    k_row = k + batch * k_stride_b + token * k_stride_t + key_head.to(tl.int64) * k_stride_h
    g_row = g + batch * g_stride_b + token * g_stride_t + head.to(tl.int64) * g_stride_h
    beta_at = beta + batch * beta_stride_b + token * beta_stride_t + head.to(tl.int64) * beta_stride_h
    if HAS_RATE:
        rate = tl.exp(tl.load(A_log + head).to(tl.float32))
    else:
        rate = 1.0

    q_norm = tl.full([BT], 1.0, tl.float32)
    k_norm = tl.full([BT], 1.0, tl.float32)
    if L2NORM:
        q_norm, k_norm = _norms(q_row, k_row, live, width, K, BT, BK)

    A = tl.zeros([BT, BT], tl.float32)
    P = tl.zeros([BT, BT], tl.float32)
    own = tl.zeros([BT], tl.float32)
    place = slot * HV + head
    tile = place * BT * KP + row[:, None] * KP
    # A few levels at a time: all in one loop would not fit the registers.
    for turn in tl.static_range(0, (LEVELS + PER - 1) // PER):
        for channel in tl.range(0, width, BK):
            c = channel + tl.arange(0, BK)
            bias = tl.zeros([1, BK], tl.float32)
            if HAS_BIAS:
                bias = tl.load(dt_bias + head * K + c, mask=c < K, other=0.0).to(tl.float32)[None, :]
            x, y, step, after = _channels(
                q_row, k_row, g_row, g_stride_t, bias, c, live, followed, q_norm, k_norm, rate, lower_bound, K, GATE
            )  # fmt: skip

            if turn == 0:
                grown = tl.exp2(tl.cumsum(step, axis=0))
                left = tl.exp2(tl.cumsum(after, axis=0, reverse=True))
                tl.store(read_key + tile + c[None, :], (y * grown).to(read_key.dtype.element_ty))
                tl.store(query + tile + c[None, :], (x * grown).to(query.dtype.element_ty))
                tl.store(write_key + tile + c[None, :], (y * left).to(write_key.dtype.element_ty))
                tl.store(decay + place * KP + c, tl.sum(step, axis=0))
                own += tl.sum(x * y, axis=1)
            for level in tl.static_range(turn * PER, min(turn * PER + PER, LEVELS)):
                weight = _half_decays(step, after, BT, BK, 2**level)
                key = y * weight
                earlier = tl.trans(key)
                A += _across(tl.dot(key, earlier, input_precision=PRECISION), BT, 2**level)
                P += _across(tl.dot(x * weight, earlier, input_precision=PRECISION), BT, 2**level)

    strength = tl.load(beta_at, mask=live, other=0.0).to(tl.float32)
    if SIGMOID:
        strength = tl.sigmoid(strength)
    strength = tl.where(live, strength * beta_scale, 0.0)
    inverse = _inverse(A * strength[None, :], BT, LEVELS, PRECISION)
    square = place * BT * BT + row[:, None] * BT + row[None, :]
    if KEEP:
        tl.store(strengths + place * BT + row, strength)
        below = tl.where(row[:, None] > row[None, :], inverse, 0.0)
        tl.store(solve + square, below.to(solve.dtype.element_ty))
        other = -strength[:, None] * tl.dot(inverse, A, input_precision=PRECISION)
        tl.store(solve_back + square, other.to(solve_back.dtype.element_ty))
    else:
        tl.store(solve + square, (strength[:, None] * inverse).to(solve.dtype.element_ty))
    P = scale * tl.where(row[:, None] == row[None, :], own[:, None], P)
    tl.store(attend + square, P.to(attend.dtype.element_ty))


@triton.jit
def _segment(s, segments, length, BT: tl.constexpr, LEAST: tl.constexpr):
    """First token of segment s of a sequence, and that of the next. Those of a short sequence are empty at the end."""
    chunks = tl.maximum(tl.cdiv(tl.cdiv(length, BT), segments), LEAST)
    return tl.minimum(s * chunks * BT, length), tl.minimum((s + 1) * chunks * BT, length)


@triton.jit
def scan_kernel(
    read_key, query, write_key, decay, solve, attend, strengths, v, initial, out, final, states, written, cu_seqlens,
    state_indices, resumed, starts, boundaries,
    v_stride_b, v_stride_t, v_stride_h, out_stride_b, out_stride_t, out_stride_h,
    initial_stride_n, initial_stride_h, initial_stride_k, initial_stride_v,
    final_stride_n, final_stride_h, final_stride_k, final_stride_v,
    boundaries_stride_n, boundaries_stride_h, boundaries_stride_k, boundaries_stride_v,
    T, pool_slots, interval, scale,
    HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    LEAST: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr, POOLED: tl.constexpr,
    SEGMENTED: tl.constexpr, BOUNDARIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state of one sequence and value head from chunk to chunk, BV columns of it; grid (V / BV, N * HV, segments).

    POOLED: initial and final are one pool of states, updated in place. state_indices [N] names a sequence's entry;
    one that names none is skipped. Where resumed [N] is 0 the state is zeros at first.
    SEGMENTED: starts [N * HV, segments, KP, V] float32 has the state before each segment.
    BOUNDARIES: also the state after every interval-th token, a multiple of BT; `chunk_kda_states` says where.
    To KEEP for gradients, in place of outputs: states [slots, HV, KP, V] before each chunk, and what it writes to
    them without the factor beta, written [slots, HV, BT, V] float32.
    """
    n = (tl.program_id(1) // HV).to(tl.int64)
    head = (tl.program_id(1) % HV).to(tl.int64)
    first, length = sequence_bounds(cu_seqlens, n, T, PACKED)
    slot = first_slot(first, n, T, BT, PACKED)
    batch = n * 0 if PACKED else n
    row, c = tl.arange(0, BT), tl.arange(0, KP)
    column = tl.program_id(0) * BV + tl.arange(0, BV)
    in_state = (c < K)[:, None] & (column < V)[None, :]
    entry = n
    known = n >= 0
    if POOLED:
        named, entry = _pool_entry(state_indices, n, pool_slots)
        if (not named) | (length == 0):
            return
        known = tl.load(resumed + n) != 0
    begin, end = length * 0, length
    state = tl.zeros([KP, BV], tl.float32)
    if SEGMENTED:
        s = tl.program_id(2)
        begin, end = _segment(s, tl.num_programs(2), length, BT, LEAST)
        if (s > 0) & (begin == length):
            return
        at = starts + ((n * HV + head) * tl.num_programs(2) + s) * KP * V + c[:, None] * V + column[None, :]
        state = tl.load(at, mask=in_state, other=0.0)
    elif HAS_INITIAL:
        at = initial + entry * initial_stride_n + head * initial_stride_h
        at += c[:, None] * initial_stride_k + column[None, :] * initial_stride_v
        state = tl.load(at, mask=in_state & known, other=0.0).to(tl.float32)
    v_head = v + batch * v_stride_b + head * v_stride_h + column[None, :]
    if not KEEP:
        out_head = out + batch * out_stride_b + head * out_stride_h + column[None, :]
    if BOUNDARIES:
        mark = first // interval if PACKED else n * (T // interval)
        marks = boundaries + mark * boundaries_stride_n + head * boundaries_stride_h
    dtype = read_key.dtype.element_ty
    for start in tl.range(begin, end, BT):
        place = (slot + start // BT) * HV + head
        tile = place * BT * KP + row[:, None] * KP + c[None, :]
        square = place * BT * BT + row[:, None] * BT + row[None, :]
        token = first + start + row
        inside = (start + row < length)[:, None] & (column < V)[None, :]
        old = state.to(dtype)
        x = tl.load(v_head + token[:, None] * v_stride_t, mask=inside, other=0.0).to(tl.float32)
        x -= tl.dot(tl.load(read_key + tile), old, input_precision=PRECISION)
        u = tl.dot(tl.load(solve + square), x.to(dtype), input_precision=PRECISION)
        if KEEP:
            u += x
            in_value = (column < V)[None, :]
            tl.store(states + place * KP * V + c[:, None] * V + column[None, :], old, mask=in_value)
            tl.store(written + place * BT * V + row[:, None] * V + column[None, :], u, mask=in_value)
            u *= tl.load(strengths + place * BT + row)[:, None]
        u = u.to(dtype)
        if not KEEP:
            o = scale * tl.dot(tl.load(query + tile), old, input_precision=PRECISION)
            o += tl.dot(tl.load(attend + square), u, input_precision=PRECISION)
            tl.store(out_head + token[:, None] * out_stride_t, o.to(out.dtype.element_ty), mask=inside)
        state *= tl.exp2(tl.load(decay + place * KP + c))[:, None]
        state += tl.dot(tl.trans(tl.load(write_key + tile)), u, input_precision=PRECISION)
        if BOUNDARIES:
            done = start + BT
            here = (done % interval == 0) & (done <= length)
            # Addresses that did not depend on the loop would be kept for it, in registers that it needs.
            within = c[:, None] * tl.where(here, boundaries_stride_k, 0)
            within += column[None, :] * tl.where(here, boundaries_stride_v, 0)
            tl.store(marks + (done // interval - 1) * boundaries_stride_n + within, state, mask=in_state & here)
    if not KEEP:
        at = final + entry * final_stride_n + head * final_stride_h
        at += c[:, None] * final_stride_k + column[None, :] * final_stride_v
        tl.store(at, state, mask=in_state & (end == length))


@triton.jit
def segment_kernel(
    read_key, write_key, decay, solve, v, initial, cu_seqlens, state_indices, resumed, starts, carries,
    v_stride_b, v_stride_t, v_stride_h,
    initial_stride_n, initial_stride_h, initial_stride_k, initial_stride_v,
    T, pool_slots,
    HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    LEAST: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr, POOLED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What a segment makes of the state before it, carry state + rest; grid (V / BV + KP / BV, N * HV, segments - 1).

    The first programs of a segment s take BV columns of the rest through its chunks, to starts[:, s + 1]: those of the
    first segment begin with the initial state, so that they are done, and write it to starts[:, 0]. The others take
    columns of the identity through, to carries [N * HV, segments, KP, KP] float32. All arguments as in `scan_kernel`.
    """
    n = (tl.program_id(1) // HV).to(tl.int64)
    head = (tl.program_id(1) % HV).to(tl.int64)
    s = tl.program_id(2)
    segments = tl.num_programs(2) + 1
    blocks: tl.constexpr = (V + BV - 1) // BV
    of_carry = tl.program_id(0) >= blocks
    first, length = sequence_bounds(cu_seqlens, n, T, PACKED)
    begin, end = _segment(s, segments, length, BT, LEAST)
    if ((s > 0) & (begin == length)) | (of_carry & (s == 0)):
        return
    slot = first_slot(first, n, T, BT, PACKED)
    batch = n * 0 if PACKED else n
    row, c = tl.arange(0, BT), tl.arange(0, KP)
    column = (tl.program_id(0) - tl.where(of_carry, blocks, 0)) * BV + tl.arange(0, BV)
    in_rest = (column < V) & (not of_carry)
    in_state = (c < K)[:, None] & in_rest[None, :]
    place = (n * HV + head) * segments + s
    rest = starts + place * KP * V + c[:, None] * V + column[None, :]
    entry = n
    known = s == 0
    if POOLED:
        named, entry = _pool_entry(state_indices, n, pool_slots)
        if not named:
            return
        known &= tl.load(resumed + n) != 0
    state = tl.where((c[:, None] == column[None, :]) & of_carry, 1.0, 0.0)
    if HAS_INITIAL:
        at = initial + entry * initial_stride_n + head * initial_stride_h
        at += c[:, None] * initial_stride_k + column[None, :] * initial_stride_v
        state += tl.load(at, mask=in_state & known, other=0.0).to(tl.float32)
    tl.store(rest, state, mask=in_rest[None, :] & (s == 0))
    v_head = v + batch * v_stride_b + head * v_stride_h + column[None, :]
    dtype = read_key.dtype.element_ty
    for start in tl.range(begin, end, BT):
        chunk = (slot + start // BT) * HV + head
        tile = chunk * BT * KP + row[:, None] * KP + c[None, :]
        square = chunk * BT * BT + row[:, None] * BT + row[None, :]
        token = first + start + row
        inside = (start + row < length)[:, None] & in_rest[None, :]
        x = tl.load(v_head + token[:, None] * v_stride_t, mask=inside, other=0.0).to(tl.float32)
        x -= tl.dot(tl.load(read_key + tile), state.to(dtype), input_precision=PRECISION)
        u = tl.dot(tl.load(solve + square), x.to(dtype), input_precision=PRECISION)
        state *= tl.exp2(tl.load(decay + chunk * KP + c))[:, None]
        state += tl.dot(tl.trans(tl.load(write_key + tile)), u.to(dtype), input_precision=PRECISION)
    tl.store(rest + KP * V, state, mask=in_rest[None, :])
    carry = carries + place * KP * KP + c[:, None] * KP + column[None, :]
    tl.store(carry, state, mask=(column < KP)[None, :] & of_carry)


@triton.jit
def merge_kernel(
    starts, carries, cu_seqlens, segments, width, T,
    HV: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    LEAST: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the rests in starts [N * HV, segments, KP, V] to the states before the segments; grid (V / BV, N * HV).

    width: KP, where the compiler does not unroll.
    """
    n = (tl.program_id(1) // HV).to(tl.int64)
    _, length = sequence_bounds(cu_seqlens, n, T, PACKED)
    c, block = tl.arange(0, KP), tl.arange(0, BK)
    column = tl.program_id(0) * BV + tl.arange(0, BV)
    in_value = (column < V)[None, :]
    first = tl.program_id(1).to(tl.int64) * segments
    for s in tl.range(1, segments - 1):
        begin, _ = _segment(s + 1, segments, length, BT, LEAST)
        if begin < length:
            before = starts + (first + s) * KP * V + column[None, :]
            after = before + KP * V + c[:, None] * V
            carry = carries + (first + s) * KP * KP + c[:, None] * KP
            state = tl.load(after, mask=in_value, other=0.0)
            for k in tl.range(0, width, BK):
                x = tl.load(before + (k + block)[:, None] * V, mask=in_value, other=0.0)
                state += tl.dot(tl.load(carry + (k + block)[None, :]), x, input_precision=PRECISION)
            tl.store(after, state, mask=in_value)
            tl.debug_barrier()  # the next turn reads it


@triton.jit
def scan_back_kernel(
    read_key, query, write_key, decay, solve_back, attend, strengths, written, d_out, d_final, d_initial,
    dv, d_states, d_written, d_strengths, cu_seqlens,
    d_out_stride_b, d_out_stride_t, d_out_stride_h, dv_stride_b, dv_stride_t, dv_stride_h,
    d_final_stride_n, d_final_stride_h, d_final_stride_k, d_final_stride_v,
    d_initial_stride_n, d_initial_stride_h, d_initial_stride_k, d_initial_stride_v,
    T, scale,
    HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state from the last chunk to the first, BV columns of it; grid (V / BV, N * HV).

    d_states [slots, HV, KP, V]: gradient of the state behind each chunk. d_written [slots, HV, BT, V]: gradient of what
    the chunk writes, through all that it reaches; times beta it is dv, times what is written a term of beta's
    gradient: d_strengths [slots, HV, V / BV, BT] float32. That is formed here, where the first is not yet rounded.
    """
    n = (tl.program_id(1) // HV).to(tl.int64)
    head = (tl.program_id(1) % HV).to(tl.int64)
    first, length = sequence_bounds(cu_seqlens, n, T, PACKED)
    slot = first_slot(first, n, T, BT, PACKED)
    batch = n * 0 if PACKED else n
    row, c = tl.arange(0, BT), tl.arange(0, KP)
    column = tl.program_id(0) * BV + tl.arange(0, BV)
    in_value = (column < V)[None, :]
    in_state = (c < K)[:, None] & in_value
    at = d_final + n * d_final_stride_n + head * d_final_stride_h
    at += c[:, None] * d_final_stride_k + column[None, :] * d_final_stride_v
    d_state = tl.load(at, mask=in_state, other=0.0).to(tl.float32)
    d_out_head = d_out + batch * d_out_stride_b + head * d_out_stride_h + column[None, :]
    dv_head = dv + batch * dv_stride_b + head * dv_stride_h + column[None, :]
    dtype = read_key.dtype.element_ty
    chunks = (length + BT - 1) // BT
    for turn in tl.range(0, chunks):
        chunk = chunks - 1 - turn
        place = (slot + chunk) * HV + head
        tile = place * BT * KP + row[:, None] * KP + c[None, :]
        square = place * BT * BT + row[:, None] * BT + row[None, :]
        token = first + chunk * BT + row
        inside = (chunk * BT + row < length)[:, None] & in_value
        behind = d_state.to(dtype)
        tl.store(d_states + place * KP * V + c[:, None] * V + column[None, :], behind, mask=in_value)
        do = tl.load(d_out_head + token[:, None] * d_out_stride_t, mask=inside, other=0.0)
        du = tl.dot(tl.trans(tl.load(attend + square)), do, input_precision=PRECISION)
        du += tl.dot(tl.load(write_key + tile), behind, input_precision=PRECISION)
        # In two parts: where keys are alike the sum cancels, and what du lost in rounding would be most of it.
        back = tl.trans(tl.load(solve_back + square))
        high = du.to(dtype)
        dw = du + tl.dot(back, high, input_precision=PRECISION)
        if dtype != tl.float32:
            dw += tl.dot(back, (du - high.to(tl.float32)).to(dtype), input_precision=PRECISION)
        value_tile = place * BT * V + row[:, None] * V + column[None, :]
        tl.store(d_written + value_tile, dw.to(dtype), mask=in_value)
        term = tl.sum(dw * tl.load(written + value_tile, mask=in_value, other=0.0), axis=1)
        tl.store(d_strengths + (place * tl.num_programs(0) + tl.program_id(0)) * BT + row, term)
        dx = dw * tl.load(strengths + place * BT + row)[:, None]
        tl.store(dv_head + token[:, None] * dv_stride_t, dx.to(dv.dtype.element_ty), mask=inside)
        d_state *= tl.exp2(tl.load(decay + place * KP + c))[:, None]
        d_state += scale * tl.dot(tl.trans(tl.load(query + tile)), do, input_precision=PRECISION)
        d_state -= tl.dot(tl.trans(tl.load(read_key + tile)), dx.to(dtype), input_precision=PRECISION)
    if HAS_INITIAL:
        at = d_initial + n * d_initial_stride_n + head * d_initial_stride_h
        at += c[:, None] * d_initial_stride_k + column[None, :] * d_initial_stride_v
        tl.store(at, d_state, mask=in_state)


@triton.jit
def gradient_kernel(
    q, k, g, beta, A_log, dt_bias, cu_seqlens, d_out, states, d_states, written, d_written, strengths, d_strengths,
    dq_hat, dk_hat, dq, dk, dg, dbeta, d_rate, d_bias,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    g_stride_b, g_stride_t, g_stride_h, beta_stride_b, beta_stride_t, beta_stride_h,
    d_out_stride_b, d_out_stride_t, d_out_stride_h,
    T, N, groups, width, value_width, strength_terms, scale, lower_bound, beta_scale,
    HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    BT: tl.constexpr, LEVELS: tl.constexpr, GATE: tl.constexpr, HAS_RATE: tl.constexpr, HAS_BIAS: tl.constexpr,
    L2NORM: tl.constexpr, SIGMOID: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk and value head, the states at its ends and their gradients given; grid (slots, HV).

    The gradient of a log decay is a sum over the pairs of tokens around it, and over those only: terms that do not
    contain the decay never enter, so nothing has to cancel, however small the result.

    dq, dk, dg: contiguous [B, T, HV, K]; dbeta [B, T, HV]; dq_hat, dk_hat like dq, float32: gradients of the
    normalised q and k on their way. d_rate [slots, HV] and d_bias [slots, HV, KP] float32: terms of the gradients of
    A_log and dt_bias.
    """
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    n = sequence_of_slot(cu_seqlens, slot, T, N, BT, PACKED)
    first, length = sequence_bounds(cu_seqlens, n, T, PACKED)
    start = (slot - first_slot(first, n, T, BT, PACKED)) * BT
    if (start < 0) | (start >= length):
        return
    batch = n * 0 if PACKED else n
    row, column = tl.arange(0, BT), tl.arange(0, BT)[None, :]
    token = first + start + row
    live = start + row < length
    followed = (row < BT - 1) & (start + row + 1 < length)
    key_head = head // groups
    q_row = q + batch * q_stride_b + token * q_stride_t + key_head.to(tl.int64) * q_stride_h
    k_row = k + batch * k_stride_b + token * k_stride_t + key_head.to(tl.int64) * k_stride_h
    g_row = g + batch * g_stride_b + token * g_stride_t + head.to(tl.int64) * g_stride_h
    d_out_row = d_out + batch * d_out_stride_b + token * d_out_stride_t + head.to(tl.int64) * d_out_stride_h
    grad_row = (batch * T + token) * HV + head
    place = slot * HV + head
    rate = 1.0
    if HAS_RATE:
        rate = tl.exp(tl.load(A_log + head).to(tl.float32))
    q_norm = tl.full([BT], 1.0, tl.float32)
    k_norm = tl.full([BT], 1.0, tl.float32)
    if L2NORM:
        q_norm, k_norm = _norms(q_row, k_row, live, width, K, BT, BK)

    # Gradients of the two triangular matrices.
    strength = tl.load(strengths + place * BT + row)
    dP = tl.zeros([BT, BT], tl.float32)
    dA = tl.zeros([BT, BT], tl.float32)
    value_tile = place * BT * V + row[:, None] * V
    for block in tl.range(0, value_width, BV):
        b = block + tl.arange(0, BV)
        in_block = (b < V)[None, :]
        w = tl.load(written + value_tile + b[None, :], mask=in_block, other=0.0)
        w = tl.trans(w.to(d_out.dtype.element_ty))
        do = tl.load(d_out_row[:, None] + b[None, :], mask=live[:, None] & in_block, other=0.0)
        dP += tl.dot(do, w, input_precision=PRECISION)
        dw = tl.load(d_written + value_tile + b[None, :], mask=in_block, other=0.0)
        dA += tl.dot(dw, w, input_precision=PRECISION)
    d_strength = tl.zeros([BT], tl.float32)
    for term in tl.range(0, strength_terms):
        d_strength += tl.load(d_strengths + (place * strength_terms + term) * BT + row)
    d_strength *= beta_scale
    if SIGMOID:
        at = beta + batch * beta_stride_b + token * beta_stride_t + head.to(tl.int64) * beta_stride_h
        sigmoid = tl.sigmoid(tl.load(at, mask=live, other=0.0).to(tl.float32))
        d_strength *= sigmoid * (1.0 - sigmoid)
    tl.store(dbeta + grad_row, d_strength.to(dbeta.dtype.element_ty), mask=live)
    dP = tl.where(row[:, None] >= column, dP * strength[None, :], 0.0)
    own = tl.sum(tl.where(row[:, None] == column, dP, 0.0), axis=1)
    dA = tl.where(row[:, None] > column, -dA * strength[:, None] * strength[None, :], 0.0)
    dA += tl.trans(dA)

    q_along = tl.zeros([BT], tl.float32)
    k_along = tl.zeros([BT], tl.float32)
    rate_sum = tl.zeros([BT], tl.float32)
    for channel in tl.range(0, width, BK):
        c = channel + tl.arange(0, BK)
        inside = live[:, None] & (c < K)[None, :]
        bias = tl.zeros([1, BK], tl.float32)
        if HAS_BIAS:
            bias = tl.load(dt_bias + head * K + c, mask=c < K, other=0.0).to(tl.float32)[None, :]
        x, y, step, after = _channels(
            q_row, k_row, g_row, g_stride_t, bias, c, live, followed, q_norm * scale, k_norm, rate, lower_bound,
            K, GATE,
        )  # fmt: skip

        # Through the states: reads of the one before the chunk, writes to the one behind it.
        d_read_query = tl.zeros([BT, BK], tl.float32)
        d_read_key = tl.zeros([BT, BK], tl.float32)
        d_write_key = tl.zeros([BT, BK], tl.float32)
        through = tl.zeros([BK], tl.float32)
        for block in tl.range(0, value_width, BV):
            b = block + tl.arange(0, BV)
            in_block = (b < V)[None, :]
            state_tile = place * KP * V + c[:, None] * V + b[None, :]
            S = tl.load(states + state_tile, mask=in_block, other=0.0)
            dS = tl.load(d_states + state_tile, mask=in_block, other=0.0)
            through += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=1)
            do = tl.load(d_out_row[:, None] + b[None, :], mask=live[:, None] & in_block, other=0.0)
            dw = tl.load(d_written + value_tile + b[None, :], mask=in_block, other=0.0)
            w = tl.load(written + value_tile + b[None, :], mask=in_block, other=0.0).to(do.dtype)
            d_read_query += tl.dot(do, tl.trans(S), input_precision=PRECISION)
            d_read_key -= tl.dot(dw, tl.trans(S), input_precision=PRECISION)
            d_write_key += tl.dot(w, tl.trans(dS), input_precision=PRECISION)
        grown = tl.exp2(tl.cumsum(step, axis=0))
        dx = d_read_query * grown
        dy = d_read_key * grown * strength[:, None]
        through *= tl.exp2(tl.sum(step, axis=0))
        since = tl.where(row[:, None] <= column, 1.0, 0.0)
        d_step = tl.dot(since, x * dx + y * dy, input_precision=PRECISION) + through[None, :]
        d_write_key *= tl.exp2(tl.cumsum(after, axis=0, reverse=True)) * strength[:, None]
        until = tl.where(row[:, None] > column, 1.0, 0.0)
        d_step += tl.dot(until, y * d_write_key, input_precision=PRECISION)
        dy += d_write_key

        # Between the tokens of the chunk: a level has the pairs of the two halves of its blocks.
        dx += own[:, None] * y
        dy += own[:, None] * x
        # Always so; what does not depend on the loop would be kept for it, a matrix for each level.
        in_loop = channel < width
        for level in tl.static_range(0, LEVELS):
            weight = _half_decays(step, after, BT, BK, 2**level)
            key = y * weight
            pairs = _across(tl.where(in_loop, dP, 0.0), BT, 2**level)
            level_dx = weight * tl.dot(pairs, key, input_precision=PRECISION)
            level_dy = tl.dot(tl.trans(pairs), x * weight, input_precision=PRECISION)
            pairs = _across(tl.where(in_loop, dA, 0.0), BT, 2**level, True)
            level_dy += tl.dot(pairs, key, input_precision=PRECISION)
            level_dy *= weight
            half, own_half = row[:, None] // (2**level), column // (2**level)
            upper = half % 2 == 1
            around = (half == own_half) & (
                (upper & (row[:, None] <= column)) | (~upper & (row[:, None] > column))
            )
            d_step += tl.dot(
                tl.where(around, 1.0, 0.0), x * level_dx + y * level_dy, input_precision=PRECISION
            )
            dx += level_dx
            dy += level_dy

        grad = grad_row[:, None] * K + c[None, :]
        if L2NORM:
            q_along += tl.sum(x * dx, axis=1)
            k_along += tl.sum(y * dy, axis=1)
            tl.store(dq_hat + grad, scale * dx, mask=inside)
            tl.store(dk_hat + grad, dy, mask=inside)
        else:
            tl.store(dq + grad, (scale * dx).to(dq.dtype.element_ty), mask=inside)
            tl.store(dk + grad, dy.to(dk.dtype.element_ty), mask=inside)
        if GATE != 0:
            raw = tl.load(g_row[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
            z = raw + bias
            if GATE == 1:
                rate_sum += tl.sum(tl.where(inside, d_step * step, 0.0), axis=1) / LOG2E
                d_step *= -rate * tl.sigmoid(z)
            else:
                opened = tl.sigmoid(rate * z)
                d_step *= lower_bound * rate * opened * (1.0 - opened)
                rate_sum += tl.sum(tl.where(inside, d_step * z, 0.0), axis=1)
            if HAS_BIAS:
                tl.store(d_bias + place * KP + c, tl.sum(tl.where(inside, d_step, 0.0), axis=0))
        tl.store(dg + grad, d_step.to(dg.dtype.element_ty), mask=inside)
    if HAS_RATE:
        tl.store(d_rate + place, tl.sum(rate_sum, axis=0))
    if L2NORM:
        tl.debug_barrier()  # all of dq_hat and dk_hat are there
        for channel in tl.range(0, width, BK):
            c = channel + tl.arange(0, BK)
            inside = live[:, None] & (c < K)[None, :]
            grad = grad_row[:, None] * K + c[None, :]
            x = tl.load(q_row[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32) * q_norm[:, None]
            dx = tl.load(dq_hat + grad, mask=inside, other=0.0)
            tl.store(
                dq + grad,
                ((dx - x * q_along[:, None]) * q_norm[:, None]).to(dq.dtype.element_ty),
                mask=inside,
            )
            y = tl.load(k_row[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32) * k_norm[:, None]
            dy = tl.load(dk_hat + grad, mask=inside, other=0.0)
            tl.store(
                dk + grad,
                ((dy - y * k_along[:, None]) * k_norm[:, None]).to(dk.dtype.element_ty),
                mask=inside,
            )


@triton.jit
def recurrent_kernel(
    q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial, out, final,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    g_stride_b, g_stride_t, g_stride_h, beta_stride_b, beta_stride_t, beta_stride_h,
    v_stride_b, v_stride_t, v_stride_h, out_stride_b, out_stride_t, out_stride_h,
    initial_stride_n, initial_stride_h, initial_stride_k, initial_stride_v,
    final_stride_n, final_stride_h, final_stride_k, final_stride_v,
    T, groups, scale, lower_bound, beta_scale,
    HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, HAS_RATE: tl.constexpr, HAS_BIAS: tl.constexpr, L2NORM: tl.constexpr,
    SIGMOID: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Token after token, BV columns of the state in registers; grid (V / BV, N * HV)."""
    n = (tl.program_id(1) // HV).to(tl.int64)
    head = (tl.program_id(1) % HV).to(tl.int64)
    first, length = sequence_bounds(cu_seqlens, n, T, PACKED)
    batch = n * 0 if PACKED else n
    c = tl.arange(0, KP)
    column = tl.program_id(0) * BV + tl.arange(0, BV)
    in_state = (c < K)[:, None] & (column < V)[None, :]
    state = tl.zeros([KP, BV], tl.float32)
    if HAS_INITIAL:
        at = initial + n * initial_stride_n + head * initial_stride_h
        at += c[:, None] * initial_stride_k + column[None, :] * initial_stride_v
        state = tl.load(at, mask=in_state, other=0.0).to(tl.float32)
    rate = 1.0
    if HAS_RATE:
        rate = tl.exp(tl.load(A_log + head).to(tl.float32))
    bias = tl.zeros([KP], tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + head * K + c, mask=c < K, other=0.0).to(tl.float32)
    q_at = q + batch * q_stride_b + first * q_stride_t + head // groups * q_stride_h + c
    k_at = k + batch * k_stride_b + first * k_stride_t + head // groups * k_stride_h + c
    g_at = g + batch * g_stride_b + first * g_stride_t + head * g_stride_h + c
    beta_at = beta + batch * beta_stride_b + first * beta_stride_t + head * beta_stride_h
    v_at = v + batch * v_stride_b + first * v_stride_t + head * v_stride_h + column
    out_at = out + batch * out_stride_b + first * out_stride_t + head * out_stride_h + column
    for _ in tl.range(0, length):
        x = tl.load(q_at, mask=c < K, other=0.0).to(tl.float32)
        y = tl.load(k_at, mask=c < K, other=0.0).to(tl.float32)
        if L2NORM:
            x *= tl.rsqrt(tl.sum(x * x, axis=0) + NORM_EPS)
            y *= tl.rsqrt(tl.sum(y * y, axis=0) + NORM_EPS)
        raw = tl.load(g_at, mask=c < K, other=0.0).to(tl.float32)
        state *= tl.exp2(_log2_decay(raw, bias, rate, lower_bound, GATE))[:, None]
        strength = tl.load(beta_at).to(tl.float32)
        if SIGMOID:
            strength = tl.sigmoid(strength)
        value = tl.load(v_at, mask=column < V, other=0.0).to(tl.float32)
        u = strength * beta_scale * (value - tl.sum(state * y[:, None], axis=0))
        state += y[:, None] * u[None, :]
        o = tl.sum(state * (x * scale)[:, None], axis=0)
        tl.store(out_at, o.to(out.dtype.element_ty), mask=column < V)
        q_at += q_stride_t
        k_at += k_stride_t
        g_at += g_stride_t
        beta_at += beta_stride_t
        v_at += v_stride_t
        out_at += out_stride_t
    at = final + n * final_stride_n + head * final_stride_h
    at += c[:, None] * final_stride_k + column[None, :] * final_stride_v
    tl.store(at, state, mask=in_state)


def prepare_config(K: int, wide: bool) -> Config:
    """`wide`: float32 operands. It depends on the shape of a head only, so that a sequence gives the same bits alone
    and packed."""
    KP, BT = power_of_two(K), chunk_size(wide)
    constants: dict[str, Any] = {"K": K, "KP": KP, "BK": 16 if wide or K > 128 else min(32, KP), "BT": BT}
    constants |= {"LEVELS": BT.bit_length() - 1, "PER": 2, "PRECISION": precision(wide)}
    return Config(constants, 8, 1)


def scan_config(K: int, V: int, wide: bool, more: bool = False) -> Config:
    """`more`: than the outputs, segments or states on the way; their addresses take registers."""
    BV = min(8 if wide and more else 16 if wide or K > 128 else 32, power_of_two(V))
    constants = {"K": K, "KP": power_of_two(K), "V": V, "BV": BV, "BT": chunk_size(wide)}
    warps = 4 if wide and more else 8 if wide or (more and K > 128) else 4
    return Config({**constants, "PRECISION": precision(wide)}, warps, 1 if wide or K > 128 else 2)


def scan_back_config(K: int, V: int, wide: bool) -> Config:
    return scan_config(K, V, wide)


def segment_config(K: int, V: int, wide: bool) -> Config:
    return scan_config(K, V, wide)


def merge_config(K: int, V: int, wide: bool) -> Config:
    names = ("KP", "V", "BV", "BT")
    constants = {name: value for name, value in scan_config(K, V, wide).constants.items() if name in names}
    return Config({**constants, "BK": min(32, power_of_two(K)), "PRECISION": float32_products()}, 8, 1)


def gradient_config(K: int, V: int, wide: bool) -> Config:
    """The one kernel that spills (0.4 to 2 KB a thread on sm_90): the gradients of both triangular matrices stay in
    registers through all levels and channels. The other way is to write them to memory and read them back per level."""
    config = prepare_config(K, wide)
    constants = {name: config.constants[name] for name in ("K", "KP", "BK", "BT", "LEVELS", "PRECISION")}
    return config._replace(constants={**constants, "V": V, "BV": min(16 if wide else 32, power_of_two(V))})


def recurrent_config(K: int, V: int) -> Config:
    return Config(
        {"K": K, "KP": power_of_two(K), "V": V, "BV": min(16, power_of_two(V))}, 4 if K > 64 else 1, 1
    )


def chunk_size(wide: bool) -> int:
    return 16 if wide else 64


def precision(wide: bool) -> str:
    """Of products of float32 values: where operands are bf16, the results are soon rounded to bf16 as well."""
    return float32_products() if wide else "tf32"


def aot_variant(
    name: str, kernel: Any, types: dict[str, str], config: Config, more: dict[str, Any]
) -> Variant:
    """`kernel` with `config` and `more` constants; `types` may name arguments that it does not have."""
    signature = {argument: types[argument] for argument in kernel.arg_names if argument in types}
    config = config._replace(constants={**config.constants, **more})
    return Variant(name, kernel, signature, config)


def integer_types(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def stride_types(**axes: str) -> dict[str, str]:
    return {f"{name}_stride_{axis}": "i32" for name, letters in axes.items() for axis in letters}


def state_types(*names: str) -> dict[str, str]:
    return {**dict.fromkeys(names, "*fp32"), **stride_types(**dict.fromkeys(names, "nhkv"))}


def aot_variants() -> list[Variant]:
    """The kernels as Kimi's models run them, and at the ends of the range of head sizes."""
    from . import paged_triton_kernels

    gate = {"GATE": GATE_LOWER_BOUND, "HAS_RATE": True, "HAS_BIAS": True, "L2NORM": True, "SIGMOID": True}
    tokens = stride_types(q="bth", k="bth", g="bth", beta="bth")
    floats = dict.fromkeys(("scale", "lower_bound", "beta_scale"), "fp32")
    parameters = {"A_log": "*fp32", "dt_bias": "*fp32", "cu_seqlens": "*i32"}
    variants: list[Variant] = []

    def add(*row: Any, backward: bool = False) -> None:
        variants.append(aot_variant(*row)._replace(backward=backward))

    for K, V, wide in ((64, 64, False), (128, 128, False), (256, 256, False), (128, 128, True)):
        # With the unbounded gate the registers differ by a few: one width shows it.
        gates = [("", GATE_LOWER_BOUND), *([("_softplus", GATE_SOFTPLUS)] if K == 128 else [])]
        x = "*fp32" if wide else "*bf16"
        common = {"HV": 32, "PACKED": True}
        inputs = dict.fromkeys(("q", "k", "g", "beta"), x)
        pairs = dict.fromkeys(("read_key", "query", "write_key", "solve", "solve_back", "attend"), x)
        pairs |= {"decay": "*fp32", "strengths": "*fp32"}
        ends = {"v": x, "out": x, **stride_types(v="bth", out="bth"), **state_types("initial", "final"), "T": "i32"}
        chunks = {
            **inputs,
            **parameters,
            **pairs,
            **tokens,
            **floats,
            **integer_types("T", "N", "groups", "width"),
        }
        scan = {**pairs, **ends, "states": x, "written": "*fp32", "cu_seqlens": "*i32"}
        scan |= {"state_indices": "*i32", "resumed": "*u8", "starts": "*fp32", "carries": "*fp32"}
        scan |= {**state_types("boundaries"), **integer_types("pool_slots", "interval", "segments", "width")}
        scan["scale"] = "fp32"
        whole = {**common, "LEAST": 8, "HAS_INITIAL": True, "POOLED": False, "SEGMENTED": False, "BOUNDARIES": False}
        for suffix, kept in (("", {"KEEP": False}), ("_kept", {"KEEP": True})):
            for kind, constant in gates:
                constants = {**common, **gate, **kept, "GATE": constant}
                add(f"kda_prepare{kind}{suffix}", prepare_kernel, chunks, prepare_config(K, wide), constants)
            add(f"kda_scan{suffix}", scan_kernel, scan, scan_config(K, V, wide), {**whole, **kept})
        whole["KEEP"] = False
        kinds = {"pooled": {"POOLED": True}, "states": {"BOUNDARIES": True}}
        if not wide:
            kinds["segmented"] = {"POOLED": True, "SEGMENTED": True}
        for name, more in kinds.items():
            config = scan_config(K, V, wide, name != "pooled")
            add(f"kda_scan_{name}", scan_kernel, scan, config, {**whole, **more})
        constants = {**common, "LEAST": 8, "HAS_INITIAL": True, "POOLED": True}
        if not wide:
            add("kda_segment", segment_kernel, scan, segment_config(K, V, wide), constants)
            add("kda_merge", merge_kernel, scan, merge_config(K, V, wide), {**common, "LEAST": 8})
        grads = {
            **dict.fromkeys(("d_out", "dv", "d_states", "d_written"), x),
            **stride_types(d_out="bth", dv="bth"),
        }
        grads |= {"written": "*fp32", "d_strengths": "*fp32", "strength_terms": "i32"}
        back = {**pairs, **grads, **state_types("d_initial", "d_final"), "cu_seqlens": "*i32", "T": "i32"}
        back["scale"] = "fp32"
        constants = {**common, "HAS_INITIAL": True}
        add("kda_scan_back", scan_back_kernel, back, scan_back_config(K, V, wide), constants, backward=True)
        back = {**chunks, **grads, **dict.fromkeys(("states", "dq", "dk", "dg", "dbeta"), x)}
        back |= {**dict.fromkeys(("dq_hat", "dk_hat", "d_rate", "d_bias"), "*fp32"), "value_width": "i32"}
        for kind, constant in gates:
            constants = {**common, **gate, "GATE": constant}
            add(
                f"kda_gradient{kind}",
                gradient_kernel,
                back,
                gradient_config(K, V, wide),
                constants,
                backward=True,
            )
        signature = {**inputs, **parameters, **tokens, **ends, **floats, "groups": "i32"}
        constants = {**common, **gate, "HAS_INITIAL": True}
        add("kda_recurrent", recurrent_kernel, signature, recurrent_config(K, V), constants)
    return variants + paged_triton_kernels.aot_variants()
