"""The Triton kernel of the largest logits, and the configurations in which it is compiled. Needs triton.

A program takes a tile of queries of one head and goes through the keys that they see. It keeps the largest score of
each place in a tile of keys, in registers, and looks for the largest of those once, at its end. Rows of a tile behind
the last token repeat that token, which changes no maximum and spares the masks.

Whether a pair of tiles is masked, and how its products are summed, does not depend on where the sequence lies in a
batch: it has the same bits alone and packed.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._packing import first_slot, sequence_bounds, sequence_of_slot
from .._triton import Config, Variant, float32_products, power_of_two

# Of a head's width, this much stays in registers or shared memory while the keys go by.
HELD = 256


@triton.jit
def _part(x, from_channel, D: tl.constexpr, WIDTH: tl.constexpr):
    """Channels from_channel to from_channel + WIDTH of the rows that start at x; zeros from D on."""
    c = from_channel + tl.arange(0, WIDTH)[None, :]
    return tl.load(x + c, mask=c < D, other=0.0)


@triton.jit
def _whole_part(x, FROM: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """The same; without a mask where none is needed."""
    if FROM + WIDTH <= D:
        found = tl.load(x + (FROM + tl.arange(0, WIDTH))[None, :])
    else:
        found = _part(x, FROM, D, WIDTH)
    return found


@triton.jit
def _scores(
    x_row, y_row, x, x_rest, width,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, HOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """<q, k> [BM, BN] of the rows that start at x_row and y_row; x and x_rest are the queries, if they are held."""
    s = tl.zeros([BM, BN], tl.float32)
    if HOLD:
        s = tl.dot(x, tl.trans(_whole_part(y_row, 0, D, D1)), s, input_precision=PRECISION)
        if D2 > 0:
            s = tl.dot(x_rest, tl.trans(_whole_part(y_row, D1, D, D2)), s, input_precision=PRECISION)
    else:
        for channel in tl.range(0, width, D1):
            y = _part(y_row, channel, D, D1)
            s = tl.dot(_part(x_row, channel, D, D1), tl.trans(y), s, input_precision=PRECISION)
    return s


@triton.jit
def max_logit_kernel(
    q, k, cu_seqlens_q, cu_seqlens_k, closed, largest,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    T, S, N, groups, width, size,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, HOLD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NEGATIVE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """largest [H, slots] float32: over the visible pairs of a tile of BM queries; grid (slots, H).

    The scale is `size`, or -size if NEGATIVE: size * max <q, k> is the maximum of size * <q, k>, rounding included.
    If GATED, programs of the heads whose closed [H] is set do nothing. Slots of queries as in KDA's kernels.
    """
    slots = tl.num_programs(0)
    slot = (slots - 1 - tl.program_id(0)).to(tl.int64)  # the last tiles see most keys: they go first
    head = tl.program_id(1).to(tl.int64)
    at = largest + head * slots + slot
    tl.store(at, float("-inf"))
    is_closed = tl.load(closed + head) if GATED else False
    if is_closed:
        return
    n = sequence_of_slot(cu_seqlens_q, slot, T, N, BM, PACKED)
    first, length = sequence_bounds(cu_seqlens_q, n, T, PACKED)
    first_key, keys = sequence_bounds(cu_seqlens_k, n, S, PACKED)
    batch = n * 0 if PACKED else n
    start = (slot - first_slot(first, n, T, BM, PACKED)) * BM
    shift = keys - length  # the last query sees the last key
    seen, seen_by_all = keys, keys
    if CAUSAL:
        seen = tl.minimum(start + BM, length) + shift
        seen_by_all = tl.minimum(tl.maximum(start + 1 + shift, 0), seen)
    if (start >= length) | (seen <= 0):
        return
    row = tl.minimum(start + tl.arange(0, BM), length - 1)
    column = tl.arange(0, BN)
    x_row = (q + batch * q_stride_b + head * q_stride_h + (first + row) * q_stride_t)[:, None]
    x, x_rest = 0.0, 0.0
    if HOLD:
        x = _whole_part(x_row, 0, D, D1)
        x = -x if NEGATIVE else x
        if D2 > 0:
            x_rest = _whole_part(x_row, D1, D, D2)
            x_rest = -x_rest if NEGATIVE else x_rest
    y_head = k + batch * k_stride_b + (head // groups) * k_stride_h + first_key * k_stride_t
    best = tl.full([BM, BN], float("-inf"), tl.float32)
    whole = seen_by_all // BN * BN
    for key in tl.range(0, whole, BN):
        y_row = (y_head + (key + column) * k_stride_t)[:, None]
        s = _scores(x_row, y_row, x, x_rest, width, D, BM, BN, D1, D2, HOLD, PRECISION)
        s = -s if NEGATIVE and not HOLD else s
        best = tl.maximum(best, s, propagate_nan=tl.PropagateNan.ALL)
    for key in tl.range(whole, seen, BN):
        j = tl.minimum(key + column, seen - 1)
        y_row = (y_head + j * k_stride_t)[:, None]
        s = _scores(x_row, y_row, x, x_rest, width, D, BM, BN, D1, D2, HOLD, PRECISION)
        s = -s if NEGATIVE and not HOLD else s
        if CAUSAL:
            s = tl.where(j[None, :] <= (row + shift)[:, None], s, float("-inf"))
        best = tl.maximum(best, s, propagate_nan=tl.PropagateNan.ALL)
    # The maximum of a whole tile may pass over NaN.
    nan = tl.sum(tl.sum(tl.where(best != best, best, 0.0), axis=1), axis=0)
    tl.store(at, size * tl.max(tl.max(best, axis=1), axis=0) + nan)


def config(D: int, wide: bool) -> Config:
    """`wide`: float32 inputs. A head's width is held in one or two parts, without padding for Kimi's 192 = 128 + 64."""
    constants: dict[str, Any] = {"D": D, "PRECISION": float32_products()}
    part = power_of_two(D // 2 + 1)  # the largest power of two that is at most D, or 16
    over = D - part
    rest = power_of_two(over) if over > 0 else 0
    if wide or part + rest > HELD:
        part, side = (32, 64) if wide else (64, 128)
        return Config({**constants, "D1": part, "D2": 0, "HOLD": False, "BM": side, "BN": side}, 8, 2)
    BN = 128 if part + rest <= 128 else 64
    return Config({**constants, "D1": part, "D2": rest, "HOLD": True, "BM": 128, "BN": BN}, 8, 3)


def aot_variants() -> list[Variant]:
    """Grouped heads of 64 and 128, MLA's 192, the widest that is held, and absorbed MLA's 576."""
    integers = dict.fromkeys(("T", "S", "N", "groups", "width"), "i32")
    strides = {f"{name}_stride_{axis}": "i32" for name in "qk" for axis in "bth"}
    common = {**integers, **strides, "cu_seqlens_q": "*i32", "cu_seqlens_k": "*i32", "closed": "*i1",
              "largest": "*fp32", "size": "fp32"}  # fmt: skip
    variants = []
    for D, x in (*((D, "*bf16") for D in (64, 128, 192, 256, 576)), (192, "*fp32")):
        for causal in (True, False):
            types = {**common, "q": x, "k": x}
            signature: dict[str, Any] = {name: types[name] for name in max_logit_kernel.arg_names if name in types}
            kind = config(D, x == "*fp32")
            more = {"NEGATIVE": not causal, "CAUSAL": causal, "PACKED": causal, "GATED": causal}
            kind = kind._replace(constants={**kind.constants, **more})
            variants.append(Variant("max_logit", max_logit_kernel, signature, kind))
    return variants
