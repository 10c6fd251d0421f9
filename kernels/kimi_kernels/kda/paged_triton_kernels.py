"""Triton kernels of the serving ops: what surrounds the delta rule in a layer, and the decode step. Needs triton.

A prefill is four launches. `convolve_kernel` makes q, k and v from their projections, the two kernels of the chunk form
take them from the pool's states to its new ones, and `finish_kernel` normalises and gates what they give.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._packing import first_slot, sequence_bounds, sequence_of_slot
from .._triton import Config, Variant, power_of_two
from .triton_kernels import (
    GATE_LOWER_BOUND,
    NORM_EPS,
    _log2_decay,
    _pool_entry,
    aot_variant,
    integer_types,
    stride_types,
)


@triton.jit
def convolve_kernel(
    qkv, conv_weight, conv_state, convolved, state_indices, resumed, cu_seqlens,
    qkv_stride_t, weight_stride_c, weight_stride_w, conv_stride_n, conv_stride_e, conv_stride_c,
    T, N, pool_slots, channels, BT: tl.constexpr, BC: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """SiLU of the short convolution over packed sequences; grid (slots, channels / BC).

    Before its first token a sequence has the inputs in its pool entry, or zeros where resumed [N] is 0.
    convolved: contiguous [T, channels].
    """
    slot = tl.program_id(0).to(tl.int64)
    n = sequence_of_slot(cu_seqlens, slot, T, N, BT, True)
    first, length = sequence_bounds(cu_seqlens, n, T, True)
    start = (slot - first_slot(first, n, T, BT, True)) * BT
    named, entry = _pool_entry(state_indices, n, pool_slots)
    if (start < 0) | (start >= length) | (not named):
        return
    known = tl.load(resumed + n) != 0
    row = tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (start + row < length)[:, None] & (c < channels)[None, :]
    history = conv_state + entry * conv_stride_n + c[None, :] * conv_stride_c
    total = tl.zeros([BT, BC], tl.float32)
    for tap in tl.static_range(0, W):
        at = (start + row + tap - (W - 1))[:, None]
        new = tl.load(qkv + (first + at) * qkv_stride_t + c[None, :], mask=inside & (at >= 0), other=0.0)
        value = new.to(tl.float32)
        if tap < W - 1:
            old = inside & (at < 0) & known
            value += tl.load(history + (at + W - 1) * conv_stride_e, mask=old, other=0.0).to(tl.float32)
        weight = tl.load(conv_weight + c * weight_stride_c + tap * weight_stride_w, mask=c < channels, other=0.0)
        total += weight.to(tl.float32)[None, :] * value
    total *= tl.sigmoid(total)
    at = convolved + (first + start + row)[:, None] * channels + c[None, :]
    tl.store(at, total.to(convolved.dtype.element_ty), mask=inside)


@triton.jit
def _last_inputs(
    qkv, pool, channel, inside, known, first, length, qkv_stride_t, conv_stride_e, conv_stride_c, W: tl.constexpr
):  # fmt: skip
    """The first W-1 entries of a slot become the last inputs of a sequence that began with them."""
    for entry in tl.static_range(0, W - 1):
        at = length + entry - (W - 1)
        new = tl.load(qkv + (first + at) * qkv_stride_t + channel, mask=inside & (at >= 0), other=0.0)
        # Entries are read above those that are written, so that the order of the loop suffices.
        kept = pool + (length + entry) * conv_stride_e + channel * conv_stride_c
        old = tl.load(kept, mask=inside & (at < 0) & known, other=0.0)
        value = tl.where(at >= 0, new.to(old.dtype), old)
        tl.store(pool + entry * conv_stride_e + channel * conv_stride_c, value, mask=inside)


@triton.jit
def finish_kernel(
    out, gate, norm_weight, qkv, conv_state, state_indices, resumed, cu_seqlens,
    out_stride_t, gate_stride_t, gate_stride_h, qkv_stride_t, conv_stride_n, conv_stride_e, conv_stride_c,
    T, N, pool_slots, norm_eps,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    BT: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """RMSNorm and gate of the outputs, in place, and the last inputs into the pool; grid (slots, HV).

    The tokens behind the last sequence are one sequence more, without an entry of the pool: its outputs are zero.
    """
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    n = sequence_of_slot(cu_seqlens, slot, T, N + 1, BT, True)
    is_sequence = n < N
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens + n).to(tl.int64), 0), T)
    end = tl.load(cu_seqlens + n + 1, mask=is_sequence, other=T).to(tl.int64)
    length = tl.minimum(tl.maximum(end, first), T) - first
    start = (slot - first_slot(first, n, T, BT, True)) * BT
    if (start < 0) | (start >= length):
        return
    entry = tl.load(state_indices + n, mask=is_sequence, other=-1).to(tl.int64)
    named = (entry >= 0) & (entry < pool_slots)
    row, r = tl.arange(0, BT), tl.arange(0, VP)
    token = (first + start + row)[:, None]
    inside = (start + row < length)[:, None] & (r < V)[None, :]
    out_at = out + token * out_stride_t + head * V + r[None, :]
    o = tl.load(out_at, mask=inside & named, other=0.0).to(tl.float32)
    o *= tl.rsqrt(tl.sum(o * o, axis=1) / V + norm_eps)[:, None]
    o *= tl.load(norm_weight + r, mask=r < V, other=0.0).to(tl.float32)[None, :]
    gate_at = gate + token * gate_stride_t + head * gate_stride_h + r[None, :]
    o *= tl.sigmoid(tl.load(gate_at, mask=inside & named, other=0.0).to(tl.float32))
    tl.store(out_at, o.to(out.dtype.element_ty), mask=inside)
    if named & (start + BT >= length):
        known = tl.load(resumed + n) != 0
        pool = conv_state + entry * conv_stride_n
        c = tl.arange(0, KP)
        if head % GROUPS == 0:
            key_head = head // GROUPS
            _last_inputs(qkv, pool, key_head * K + c, c < K, known, first, length,
                         qkv_stride_t, conv_stride_e, conv_stride_c, W)  # fmt: skip
            _last_inputs(qkv, pool, (H + key_head) * K + c, c < K, known, first, length,
                         qkv_stride_t, conv_stride_e, conv_stride_c, W)  # fmt: skip
        _last_inputs(qkv, pool, 2 * H * K + head * V + r, r < V, known, first, length,
                     qkv_stride_t, conv_stride_e, conv_stride_c, W)  # fmt: skip


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
def _query_key(
    qkv, conv_weight, history, q_channel, k_channel, in_key, first, i, scale,
    qkv_stride_t, weight_stride_c, weight_stride_w, conv_stride_e, conv_stride_c, W: tl.constexpr,
):  # fmt: skip
    """q times the scale and k of a sequence's token i, after convolution and L2 norm; two of [KP] float32."""
    x = _convolved(qkv, conv_weight, history, q_channel, in_key, first, i, qkv_stride_t,
                   weight_stride_c, weight_stride_w, conv_stride_e, conv_stride_c, W)  # fmt: skip
    y = _convolved(qkv, conv_weight, history, k_channel, in_key, first, i, qkv_stride_t,
                   weight_stride_c, weight_stride_w, conv_stride_e, conv_stride_c, W)  # fmt: skip
    x *= tl.rsqrt(tl.sum(x * x, axis=0) + NORM_EPS) * scale
    y *= tl.rsqrt(tl.sum(y * y, axis=0) + NORM_EPS)
    return x, y


@triton.jit
def decode_kernel(
    qkv, g, beta, gate, conv_weight, conv_state, state, state_indices, A_log, dt_bias, norm_weight,
    cu_seqlens, num_accepted, out, raw_out, keys,
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
    in registers at a time; raw_out [tokens, HV, V] float32 keeps the outputs until their norm is known. Where a
    sequence may have several tokens, keys [tokens, H, 2, K] float32 has their q and k: made once for all rows of the
    state, and out of the way of the loop that needs the registers.
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
    if PACKED:
        for token in tl.range(first, end):
            x, y = _query_key(
                qkv, conv_weight, history, q_channel, k_channel, in_key, first, token - first, scale,
                qkv_stride_t, weight_stride_c, weight_stride_w, conv_stride_e, conv_stride_c, W,
            )  # fmt: skip
            at = keys + (token * H + head) * 2 * K + c
            tl.store(at, x, mask=in_key)
            tl.store(at + K, y, mask=in_key)
        tl.debug_barrier()
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
                if PACKED:
                    at = keys + (token * H + head) * 2 * K + c
                    x = tl.load(at, mask=in_key, other=0.0)
                    y = tl.load(at + K, mask=in_key, other=0.0)
                else:
                    x, y = _query_key(
                        qkv, conv_weight, history, q_channel, k_channel, in_key, first, i, scale,
                        qkv_stride_t, weight_stride_c, weight_stride_w, conv_stride_e, conv_stride_c, W,
                    )  # fmt: skip
                value = _convolved(qkv, conv_weight, history, v_channel, in_block, first, i, qkv_stride_t,
                                   weight_stride_c, weight_stride_w, conv_stride_e, conv_stride_c, W)  # fmt: skip
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


def convolve_config() -> Config:
    return Config({"BT": 16, "BC": 64}, 4, 1)


def finish_config(K: int, V: int) -> Config:
    VP = power_of_two(V)
    return Config({"K": K, "KP": power_of_two(K), "V": V, "VP": VP, "BT": max(1, 2048 // VP)}, 4, 1)


def decode_config(K: int, V: int) -> Config:
    KP, VP = power_of_two(K), power_of_two(V)
    # A warp for 32 channels of the key: fewer threads would idle, more would hold the same values twice.
    return Config({"K": K, "KP": KP, "V": V, "VP": VP, "BV": min(VP, 16)}, max(1, KP // 32), 1)


def aot_variants() -> list[Variant]:
    """The kernels as Kimi's models run them, and at the ends of the range of head sizes."""
    variants = []
    for K, V in ((64, 64), (128, 128), (256, 256)):
        inputs = dict.fromkeys(("qkv", "g", "beta", "gate", "conv_weight", "conv_state", "out"), "*bf16")
        fixed = dict.fromkeys(("state", "A_log", "dt_bias", "norm_weight", "raw_out", "keys"), "*fp32")
        offsets = dict.fromkeys(("state_indices", "cu_seqlens", "num_accepted"), "*i32")
        strides = stride_types(
            qkv="t", g="th", beta="th", gate="th", weight="cw", conv="nec", state="nhvk", out="t"
        )
        numbers = {
            **integer_types("tokens", "slots", "value_width"),
            **dict.fromkeys(("scale", "lower_bound", "norm_eps"), "fp32"),
        }
        types = {**inputs, **fixed, **offsets, **strides, **numbers}
        layer = {"H": 32, "GROUPS": 1, "W": 4, "GATE": GATE_LOWER_BOUND, "HAS_BIAS": True}
        for name, many in (("kda_decode", False), ("kda_decode_speculative", True)):
            layer |= {"COLUMNS": 4 if many else 1, "PACKED": many, "SPECULATIVE": many}
            variants.append(aot_variant(name, decode_kernel, types, decode_config(K, V), layer))
        types |= {"convolved": "*bf16", "resumed": "*u8", **integer_types("T", "N", "pool_slots", "channels")}
        name, layer = "kda_prefill_convolve", {"W": 4}
        variants.append(aot_variant(name, convolve_kernel, types, convolve_config(), layer))
        layer |= {"H": 32, "GROUPS": 1}
        variants.append(aot_variant("kda_prefill_finish", finish_kernel, types, finish_config(K, V), layer))
    return variants
