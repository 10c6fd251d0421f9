"""Triton kernels of KDA, and the configurations in which they are compiled. Needs triton.

The chunk form runs in two launches. `prepare_kernel` does, for all chunks at once, everything that does not need the
state: norm, gate, cumulative decay, and the two triangular matrices of a chunk. `scan_kernel` then goes from chunk to
chunk with a slice of the state in registers. Decays are exponents of 2 here, and every exponential is of a sum of
log decays of consecutive tokens, never of a difference of sums: none can overflow, cancel or be NaN, whatever the gate.

Sequences of any length share one grid: sequence n, which starts at token a of the packed row, owns the chunk slots
from a // BT + n on, which are as many as it can need. No table of chunks has to be made, or to reach the host.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._triton import Config, Variant, float32_products, power_of_two

LOG2E = tl.constexpr(1.4426950408889634)
NORM_EPS = tl.constexpr(1e-6)  # reference.L2_NORM_EPS
GATE_NONE, GATE_SOFTPLUS, GATE_LOWER_BOUND = 0, 1, 2


@triton.jit
def _sequence_bounds(cu_seqlens, n, T, PACKED: tl.constexpr):
    """First token in the packed row, and length, of sequence n; without offsets every sequence is a batch row."""
    if PACKED:
        first = tl.load(cu_seqlens + n).to(tl.int64)
        length = tl.load(cu_seqlens + n + 1).to(tl.int64) - first
    else:
        first = n.to(tl.int64) * 0
        length = first + T
    return first, length


@triton.jit
def _first_slot(first, n, T, BT: tl.constexpr, PACKED: tl.constexpr):
    if PACKED:
        slot = first // BT + n
    else:
        slot = n.to(tl.int64) * ((T + BT - 1) // BT)
    return slot


@triton.jit
def _sequence_of_slot(cu_seqlens, slot, T, N, BT: tl.constexpr, PACKED: tl.constexpr):
    """The last sequence whose slots start at or before this one."""
    if PACKED:
        low = slot * 0
        high = low + N - 1
        while low < high:
            middle = (low + high + 1) // 2
            starts = tl.load(cu_seqlens + middle).to(tl.int64) // BT + middle
            low = tl.where(starts <= slot, middle, low)
            high = tl.where(starts <= slot, high, middle - 1)
        n = low
    else:
        n = slot // ((T + BT - 1) // BT)
    return n


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
def _across(x, BT: tl.constexpr, HALF: tl.constexpr):
    """The entries of [BT, BT] whose row is in the upper and column in the lower half of one block of 2 HALF rows."""
    row, column = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    chosen = (row // (2 * HALF) == column // (2 * HALF)) & (row // HALF % 2 == 1) & (column // HALF % 2 == 0)
    return tl.where(chosen, x, 0.0)


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
    read_key, query, write_key, decay, solve, attend,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    g_stride_b, g_stride_t, g_stride_h, beta_stride_b, beta_stride_t, beta_stride_h,
    T, N, groups, width, scale, lower_bound, beta_scale,
    HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, LEVELS: tl.constexpr,
    GATE: tl.constexpr, HAS_RATE: tl.constexpr, HAS_BIAS: tl.constexpr, L2NORM: tl.constexpr,
    SIGMOID: tl.constexpr, PACKED: tl.constexpr, PER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Everything of one chunk and value head that does not need the state; grid (slots, HV).

    With G the decay from the chunk's start: read_key = k G, query = scale q G, write_key = k (decay up to its end),
    each [slots, HV, BT, KP]; decay [slots, HV, KP] = log2 G of the last row;
    solve = (I + beta A)^-1 diag(beta), attend = scale tril(q k^T decayed), each [slots, HV, BT, BT].
    """
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    n = _sequence_of_slot(cu_seqlens, slot, T, N, BT, PACKED)
    first, length = _sequence_bounds(cu_seqlens, n, T, PACKED)
    start = (slot - _first_slot(first, n, T, BT, PACKED)) * BT
    if start >= length:
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
        q_square = tl.zeros([BT], tl.float32)
        k_square = tl.zeros([BT], tl.float32)
        for channel in tl.range(0, width, BK):
            c = channel + tl.arange(0, BK)
            inside = live[:, None] & (c < K)[None, :]
            x = tl.load(q_row[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
            y = tl.load(k_row[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
            q_square += tl.sum(x * x, axis=1)
            k_square += tl.sum(y * y, axis=1)
        q_norm = tl.rsqrt(q_square + NORM_EPS)
        k_norm = tl.rsqrt(k_square + NORM_EPS)

    A = tl.zeros([BT, BT], tl.float32)
    P = tl.zeros([BT, BT], tl.float32)
    own = tl.zeros([BT], tl.float32)
    place = slot * HV + head
    tile = place * BT * KP + row[:, None] * KP
    # A few levels at a time: all in one loop would not fit the registers.
    for turn in tl.static_range(0, (LEVELS + PER - 1) // PER):
        for channel in tl.range(0, width, BK):
            c = channel + tl.arange(0, BK)
            inside = live[:, None] & (c < K)[None, :]
            next_inside = followed[:, None] & (c < K)[None, :]
            bias = tl.zeros([1, BK], tl.float32)
            if HAS_BIAS:
                bias = tl.load(dt_bias + head * K + c, mask=c < K, other=0.0).to(tl.float32)[None, :]
            x = (
                tl.load(q_row[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
                * (q_norm * scale)[:, None]
            )
            y = tl.load(k_row[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32) * k_norm[:, None]
            raw = tl.load(g_row[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
            step = tl.where(inside, _log2_decay(raw, bias, rate, lower_bound, GATE), 0.0)
            raw = tl.load((g_row + g_stride_t)[:, None] + c[None, :], mask=next_inside, other=0.0).to(
                tl.float32
            )
            after = tl.where(next_inside, _log2_decay(raw, bias, rate, lower_bound, GATE), 0.0)

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
    inverse = _inverse(strength[:, None] * A, BT, LEVELS, PRECISION)
    square = place * BT * BT + row[:, None] * BT + row[None, :]
    tl.store(solve + square, (inverse * strength[None, :]).to(solve.dtype.element_ty))
    P += tl.where(row[:, None] == row[None, :], own[:, None], 0.0)
    tl.store(attend + square, P.to(attend.dtype.element_ty))


@triton.jit
def scan_kernel(
    read_key, query, write_key, decay, solve, attend, v, initial, out, final, cu_seqlens,
    v_stride_b, v_stride_t, v_stride_h, out_stride_b, out_stride_t, out_stride_h,
    initial_stride_n, initial_stride_h, initial_stride_k, initial_stride_v,
    final_stride_n, final_stride_h, final_stride_k, final_stride_v,
    T,
    HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state of one sequence and value head from chunk to chunk, BV columns of it; grid (V / BV, N * HV)."""
    n = (tl.program_id(1) // HV).to(tl.int64)
    head = (tl.program_id(1) % HV).to(tl.int64)
    first, length = _sequence_bounds(cu_seqlens, n, T, PACKED)
    slot = _first_slot(first, n, T, BT, PACKED)
    batch = n * 0 if PACKED else n
    row, c = tl.arange(0, BT), tl.arange(0, KP)
    column = tl.program_id(0) * BV + tl.arange(0, BV)
    in_state = (c < K)[:, None] & (column < V)[None, :]
    state = tl.zeros([KP, BV], tl.float32)
    if HAS_INITIAL:
        at = initial + n * initial_stride_n + head * initial_stride_h
        at += c[:, None] * initial_stride_k + column[None, :] * initial_stride_v
        state = tl.load(at, mask=in_state, other=0.0).to(tl.float32)
    v_head = v + batch * v_stride_b + head * v_stride_h + column[None, :]
    out_head = out + batch * out_stride_b + head * out_stride_h + column[None, :]
    dtype = read_key.dtype.element_ty
    for start in tl.range(0, length, BT):
        place = (slot + start // BT) * HV + head
        tile = place * BT * KP + row[:, None] * KP + c[None, :]
        square = place * BT * BT + row[:, None] * BT + row[None, :]
        token = first + start + row
        inside = (start + row < length)[:, None] & (column < V)[None, :]
        old = state.to(dtype)
        x = tl.load(v_head + token[:, None] * v_stride_t, mask=inside, other=0.0).to(tl.float32)
        x -= tl.dot(tl.load(read_key + tile), old, input_precision=PRECISION)
        u = tl.dot(tl.load(solve + square), x.to(dtype), input_precision=PRECISION).to(dtype)
        o = tl.dot(tl.load(query + tile), old, input_precision=PRECISION)
        o += tl.dot(tl.load(attend + square), u, input_precision=PRECISION)
        tl.store(out_head + token[:, None] * out_stride_t, o.to(out.dtype.element_ty), mask=inside)
        state *= tl.exp2(tl.load(decay + place * KP + c))[:, None]
        state += tl.dot(tl.trans(tl.load(write_key + tile)), u, input_precision=PRECISION)
    at = final + n * final_stride_n + head * final_stride_h
    at += c[:, None] * final_stride_k + column[None, :] * final_stride_v
    tl.store(at, state, mask=in_state)


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
    first, length = _sequence_bounds(cu_seqlens, n, T, PACKED)
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


@triton.jit
def _convolved(
    qkv, conv_weight, history, channel, inside, first, i,
    qkv_stride_t, weight_stride_c, weight_stride_w, conv_stride_e, conv_stride_c, W: tl.constexpr,
):  # fmt: skip
    """SiLU of the short convolution at token i of a sequence, for some channels; `history`: its W-1 inputs before."""
    total = tl.zeros(channel.shape, tl.float32)
    for tap in tl.static_range(0, W):
        at = i + tap - (W - 1)
        new = tl.load(qkv + (first + at) * qkv_stride_t + channel, mask=inside & (at >= 0), other=0.0)
        if tap < W - 1:  # as the pool will hold it in the next step
            new = new.to(history.dtype.element_ty)
        old = tl.load(
            history + (i + tap) * conv_stride_e + channel * conv_stride_c, mask=inside & (at < 0), other=0.0
        )
        weight = tl.load(
            conv_weight + channel * weight_stride_c + tap * weight_stride_w, mask=inside, other=0.0
        )
        total += weight.to(tl.float32) * (new.to(tl.float32) + old.to(tl.float32))
    return total * tl.sigmoid(total)


@triton.jit
def _shift_history(
    qkv, pool, channel, inside, first, count, accepted, qkv_stride_t, conv_stride_e, conv_stride_c, W: tl.constexpr
):  # fmt: skip
    """Entries of a slot become the history without its oldest input, then this step's inputs."""
    for entry in tl.range(0, W - 2 + count):
        at = entry + 1 - (W - 1)
        new = tl.load(qkv + (first + at) * qkv_stride_t + channel, mask=inside & (at >= 0), other=0.0)
        # Entries are read above those that are written, so that the order of the loop suffices.
        kept = pool + (accepted + entry) * conv_stride_e + channel * conv_stride_c
        old = tl.load(kept, mask=inside & (at < 0), other=0.0)
        value = tl.where(at >= 0, new.to(old.dtype), old)
        tl.store(pool + entry * conv_stride_e + channel * conv_stride_c, value, mask=inside)


@triton.jit
def decode_kernel(
    qkv, g, beta, gate, conv_weight, conv_state, state, state_indices, A_log, dt_bias, norm_weight,
    cu_seqlens, num_accepted, out, raw_out,
    qkv_stride_t, g_stride_t, g_stride_h, beta_stride_t, beta_stride_h, gate_stride_t, gate_stride_h,
    weight_stride_c, weight_stride_w, conv_stride_n, conv_stride_e, conv_stride_c,
    state_stride_n, state_stride_h, state_stride_v, out_stride_t,
    tokens, slots, value_width, scale, lower_bound, norm_eps,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    BV: tl.constexpr, W: tl.constexpr, COLUMNS: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr, SPECULATIVE: tl.constexpr,
):  # fmt: skip
    """A layer's step for one sequence and one head of q and k, with all of its value heads; grid (N, H).

    One program owns the pool entries of its channels, so that they can be shifted in place. BV rows of the state are
    in registers at a time; raw_out [tokens, HV, V] float32 keeps the outputs until their norm is known.
    """
    n = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    c, r = tl.arange(0, KP), tl.arange(0, VP)
    in_key, in_value = c < K, r < V
    if PACKED:
        first = tl.load(cu_seqlens + n).to(tl.int64)
        end = tl.load(cu_seqlens + n + 1).to(tl.int64)
    else:
        first = n
        end = n + 1
    if n == tl.num_programs(0) - 1:  # tokens behind the last sequence are padding
        for token in tl.range(end, tokens):
            for group in tl.static_range(0, GROUPS):
                at = out + token * out_stride_t + (head * GROUPS + group) * V + r
                tl.store(at, tl.zeros([VP], out.dtype.element_ty), mask=in_value)
    own_slot = tl.load(state_indices + n * COLUMNS).to(tl.int64)
    accepted = first * 0 + 1
    if SPECULATIVE:
        accepted = tl.load(num_accepted + n).to(tl.int64)
    named = (accepted >= 1) & (accepted <= COLUMNS)
    start_slot = tl.load(state_indices + n * COLUMNS + accepted - 1, mask=named, other=-1).to(tl.int64)
    if (own_slot < 0) | (own_slot >= slots) | (start_slot < 0) | (start_slot >= slots):
        for token in tl.range(first, end):
            for group in tl.static_range(0, GROUPS):
                at = out + token * out_stride_t + (head * GROUPS + group) * V + r
                tl.store(at, tl.zeros([VP], out.dtype.element_ty), mask=in_value)
        return
    if end <= first:
        return
    pool = conv_state + own_slot * conv_stride_n
    history = pool + (accepted - 1) * conv_stride_e
    q_channel, k_channel = head * K + c, (H + head) * K + c
    for group in tl.static_range(0, GROUPS):
        value_head = head * GROUPS + group
        rate = tl.exp(tl.load(A_log + value_head).to(tl.float32))
        bias = tl.zeros([KP], tl.float32)
        if HAS_BIAS:
            bias = tl.load(dt_bias + value_head * K + c, mask=in_key, other=0.0).to(tl.float32)
        for block in tl.range(0, value_width, BV):
            b = block + tl.arange(0, BV)
            in_block = b < V
            v_channel = 2 * H * K + value_head * V + b
            inside = in_block[:, None] & in_key[None, :]
            at_head = state + value_head * state_stride_h + b[:, None] * state_stride_v + c[None, :]
            S = tl.load(at_head + start_slot * state_stride_n, mask=inside, other=0.0)
            for token in tl.range(first, end):
                i = token - first
                x = _convolved(qkv, conv_weight, history, q_channel, in_key, first, i, qkv_stride_t,
                               weight_stride_c, weight_stride_w, conv_stride_e, conv_stride_c, W)  # fmt: skip
                y = _convolved(qkv, conv_weight, history, k_channel, in_key, first, i, qkv_stride_t,
                               weight_stride_c, weight_stride_w, conv_stride_e, conv_stride_c, W)  # fmt: skip
                value = _convolved(qkv, conv_weight, history, v_channel, in_block, first, i, qkv_stride_t,
                                   weight_stride_c, weight_stride_w, conv_stride_e, conv_stride_c, W)  # fmt: skip
                x *= tl.rsqrt(tl.sum(x * x, axis=0) + NORM_EPS) * scale
                y *= tl.rsqrt(tl.sum(y * y, axis=0) + NORM_EPS)
                raw = tl.load(g + token * g_stride_t + value_head * g_stride_h + c, mask=in_key, other=0.0)
                S *= tl.exp2(_log2_decay(raw.to(tl.float32), bias, rate, lower_bound, GATE))[None, :]
                strength = tl.load(beta + token * beta_stride_t + value_head * beta_stride_h).to(tl.float32)
                u = tl.sigmoid(strength) * (value - tl.sum(S * y[None, :], axis=1))
                S += u[:, None] * y[None, :]
                o = tl.sum(S * x[None, :], axis=1)
                tl.store(raw_out + (token * H * GROUPS + value_head) * V + b, o, mask=in_block)
                slot = tl.load(state_indices + n * COLUMNS + i, mask=i < COLUMNS, other=-1).to(tl.int64)
                kept = (slot >= 0) & (slot < slots)
                tl.store(at_head + tl.where(kept, slot, 0) * state_stride_n, S, mask=inside & kept)
    tl.debug_barrier()  # all outputs are there, and every thread has read the history
    gain = tl.load(norm_weight + r, mask=in_value, other=0.0).to(tl.float32)
    for token in tl.range(first, end):
        for group in tl.static_range(0, GROUPS):
            value_head = head * GROUPS + group
            o = tl.load(raw_out + (token * H * GROUPS + value_head) * V + r, mask=in_value, other=0.0)
            o *= tl.rsqrt(tl.sum(o * o, axis=0) / V + norm_eps) * gain
            at = gate + token * gate_stride_t + value_head * gate_stride_h + r
            o *= tl.sigmoid(tl.load(at, mask=in_value, other=0.0).to(tl.float32))
            at = out + token * out_stride_t + value_head * V + r
            tl.store(at, o.to(out.dtype.element_ty), mask=in_value)
    count = end - first
    _shift_history(qkv, pool, q_channel, in_key, first, count, accepted,
                   qkv_stride_t, conv_stride_e, conv_stride_c, W)  # fmt: skip
    _shift_history(qkv, pool, k_channel, in_key, first, count, accepted,
                   qkv_stride_t, conv_stride_e, conv_stride_c, W)  # fmt: skip
    for group in tl.static_range(0, GROUPS):
        v_channel = 2 * H * K + (head * GROUPS + group) * V + r
        _shift_history(qkv, pool, v_channel, in_value, first, count, accepted,
                       qkv_stride_t, conv_stride_e, conv_stride_c, W)  # fmt: skip


def prepare_config(K: int, wide: bool) -> Config:
    """`wide`: float32 operands. It depends on the shape of a head only, so that a sequence gives the same bits alone
    and packed."""
    KP, BT = power_of_two(K), chunk_size(wide)
    constants: dict[str, Any] = {"K": K, "KP": KP, "BK": 16 if wide or K > 128 else min(32, KP), "BT": BT}
    constants |= {"LEVELS": BT.bit_length() - 1, "PER": 2, "PRECISION": precision(wide)}
    return Config(constants, 8, 1)


def scan_config(K: int, V: int, wide: bool) -> Config:
    BV = min(16 if wide or K > 128 else 32, power_of_two(V))
    constants = {"K": K, "KP": power_of_two(K), "V": V, "BV": BV, "BT": chunk_size(wide)}
    return Config({**constants, "PRECISION": precision(wide)}, 8 if wide else 4, 1 if wide or K > 128 else 2)


def recurrent_config(K: int, V: int) -> Config:
    return Config(
        {"K": K, "KP": power_of_two(K), "V": V, "BV": min(16, power_of_two(V))}, 4 if K > 64 else 1, 1
    )


def decode_config(K: int, V: int) -> Config:
    KP, VP = power_of_two(K), power_of_two(V)
    # A warp for 32 channels of the key: fewer threads would idle, more would hold the same values twice.
    return Config({"K": K, "KP": KP, "V": V, "VP": VP, "BV": min(VP, 32)}, max(1, KP // 32), 1)


def chunk_size(wide: bool) -> int:
    return 16 if wide else 64


def precision(wide: bool) -> str:
    """Of products of float32 values: where operands are bf16, the results are soon rounded to bf16 as well."""
    return float32_products() if wide else "tf32"


def _integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def _strides(**axes: str) -> dict[str, str]:
    return {f"{name}_stride_{axis}": "i32" for name, letters in axes.items() for axis in letters}


def aot_variants() -> list[Variant]:
    """The kernels as Kimi's models run them, and at the ends of the range of head sizes."""
    gate = {"GATE": GATE_LOWER_BOUND, "HAS_RATE": True, "HAS_BIAS": True, "L2NORM": True, "SIGMOID": True}
    tokens = _strides(q="bth", k="bth", g="bth", beta="bth")
    floats = dict.fromkeys(("scale", "lower_bound", "beta_scale"), "fp32")
    parameters = {"A_log": "*fp32", "dt_bias": "*fp32", "cu_seqlens": "*i32"}
    variants = []
    for K, V, wide in ((64, 64, False), (128, 128, False), (256, 256, False), (128, 128, True)):
        x = "*fp32" if wide else "*bf16"
        common = {"HV": 32, "PACKED": True}
        pairs = dict.fromkeys(("read_key", "query", "write_key", "solve", "attend"), x)
        config = prepare_config(K, wide)
        inputs = dict.fromkeys(("q", "k", "g", "beta"), x)
        signature = {
            **inputs,
            **parameters,
            **pairs,
            "decay": "*fp32",
            **tokens,
            **floats,
            **_integers("T", "N", "groups", "width"),
        }
        for name, kind in (("prepare", GATE_LOWER_BOUND), ("prepare_softplus", GATE_SOFTPLUS)):
            constants = {**config.constants, **common, **gate, "GATE": kind}
            variants.append(
                Variant(f"kda_{name}", prepare_kernel, signature, config._replace(constants=constants))
            )
        config = scan_config(K, V, wide)
        states = {"initial": "*fp32", "final": "*fp32", **_strides(initial="nhkv", final="nhkv")}
        ends = {"v": x, "out": x, **_strides(v="bth", out="bth"), **states}
        signature = {**pairs, "decay": "*fp32", "cu_seqlens": "*i32", **ends, "T": "i32"}
        config = config._replace(constants={**config.constants, **common, "HAS_INITIAL": True})
        variants.append(Variant("kda_scan", scan_kernel, signature, config))
        config = recurrent_config(K, V)
        signature = {**inputs, **parameters, **tokens, **ends, **floats, **_integers("T", "groups")}
        config = config._replace(constants={**config.constants, **common, **gate, "HAS_INITIAL": True})
        variants.append(Variant("kda_recurrent", recurrent_kernel, signature, config))
    for K, V in ((64, 64), (128, 128), (256, 256)):
        config = decode_config(K, V)
        inputs = dict.fromkeys(("qkv", "g", "beta", "gate", "conv_weight", "conv_state", "out"), "*bf16")
        fixed = dict.fromkeys(("state", "A_log", "dt_bias", "norm_weight", "raw_out"), "*fp32")
        offsets = dict.fromkeys(("state_indices", "cu_seqlens", "num_accepted"), "*i32")
        strides = _strides(
            qkv="t", g="th", beta="th", gate="th", weight="cw", conv="nec", state="nhvk", out="t"
        )
        numbers = {
            **_integers("tokens", "slots", "value_width"),
            **dict.fromkeys(("scale", "lower_bound", "norm_eps"), "fp32"),
        }
        signature = {**inputs, **fixed, **offsets, **strides, **numbers}
        layer = {"H": 32, "GROUPS": 1, "W": 4, "GATE": GATE_LOWER_BOUND, "HAS_BIAS": True}
        for name, many in (("kda_decode", False), ("kda_decode_speculative", True)):
            layer |= {"COLUMNS": 4 if many else 1, "PACKED": many, "SPECULATIVE": many}
            constants = {**config.constants, **layer}
            variants.append(Variant(name, decode_kernel, signature, config._replace(constants=constants)))
    return variants
