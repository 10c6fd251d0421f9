"""Triton kernels of the vision towers, and the configurations in which they are compiled. Needs triton.

Every kernel finds out for itself which image its patches are in, from the grid alone: no table of offsets has to be
made, or to reach the host. Sums are taken in an order that follows from the shapes: no atomics, the same bits each run.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._triton import Config, Variant, power_of_two

IMAGES = tl.constexpr(32)  # that are looked at at once
CUBIC = tl.constexpr(-0.75)  # reference.CUBIC


@triton.jit
def _shape(grid, n, inside, SIDES: tl.constexpr):
    """Frames, rows and columns of images n."""
    at = grid + n * SIDES
    if SIDES == 3:
        frames = tl.load(at, mask=inside, other=0).to(tl.int32)
    else:
        frames = inside.to(tl.int32)
    rows = tl.load(at + SIDES - 2, mask=inside, other=0).to(tl.int32)
    columns = tl.load(at + SIDES - 1, mask=inside, other=0).to(tl.int32)
    return frames, rows, columns


@triton.jit
def _merged_size(frames, rows, columns, KH: tl.constexpr, KW: tl.constexpr):
    return tl.where(frames > 0, (rows // KH) * (columns // KW), 0)


@triton.jit
def _find(grid, N, index, SIDES: tl.constexpr, MERGED: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr):
    """The image of each patch `index` (MERGED: merged patch), N behind the last one; patches and merged patches before
    it."""
    image = index * 0
    patches = index * 0
    merged = index * 0
    before = 0
    for start in tl.range(0, N, IMAGES):
        n = start + tl.arange(0, IMAGES)
        frames, rows, columns = _shape(grid, n, n < N, SIDES)
        count = frames * rows * columns
        merged_count = _merged_size(frames, rows, columns, KH, KW)
        searched = merged_count if MERGED else count
        ends = before + tl.cumsum(searched, 0)
        passed = (ends[None, :] <= index[:, None]) & (n < N)[None, :]
        image += tl.sum(passed.to(tl.int32), 1)
        patches += tl.sum(tl.where(passed, count[None, :], 0), 1)
        merged += tl.sum(tl.where(passed, merged_count[None, :], 0), 1)
        before += tl.sum(searched, 0)
    return image, patches, merged


@triton.jit
def _place(grid, N, index, SIDES: tl.constexpr):
    """Whether each patch is in an image; that image's frames, rows and columns; the patch's frame, row and column."""
    image, start, _ = _find(grid, N, index, SIDES, False, 1, 1)
    inside = image < N
    frames, rows, columns = _shape(grid, image, inside, SIDES)
    columns = tl.maximum(columns, 1)
    area = tl.maximum(rows * columns, 1)
    place = index - start
    within = place % area
    return inside, frames, rows, columns, place // area, within // columns, within % columns


@triton.jit
def _turns(PAIRS: tl.constexpr, RATIO: tl.constexpr, BITS: tl.constexpr):
    """Turns of each pair of channels per step of its position, RATIO**(pair // 2) / 2 pi, in two parts.

    The first part has 12 digits: its products with positions below 4096 are exact in float32.
    """
    step = tl.arange(0, PAIRS) // 2
    turns = tl.full([PAIRS], 0.15915494309189535, tl.float64)
    power = tl.full([PAIRS], RATIO, tl.float64)
    for bit in tl.static_range(0, BITS):
        turns = tl.where((step >> bit) & 1 == 1, turns * power, turns)
        power = power * power
    bits = turns.to(tl.float32).to(tl.int32, bitcast=True) & -4096
    high = bits.to(tl.float32, bitcast=True)
    return high, (turns - high.to(tl.float64)).to(tl.float32)


@triton.jit
def _sin_cos(turns):
    """Sine and cosine of 2 pi turns, |turns| < 1: Taylor's series over an eighth of a turn to both sides."""
    quarter = tl.floor(4.0 * turns + 0.5)
    z = turns - 0.25 * quarter
    s = z * z
    sine = z * (
        6.283185307179586 + s * (-41.34170224039976 + s * (81.60524927607504 + s * (
            -76.70585975306136 + s * (42.05869394489765 - 15.094642576822984 * s))))
    )  # fmt: skip
    cosine = 1.0 + s * (
        -19.739208802178716 + s * (64.93939402266829 + s * (-85.45681720669373 + s * (
            60.24464137187666 - 26.426256783374398 * s)))
    )  # fmt: skip
    q = quarter.to(tl.int32)
    swapped = q & 1 == 1
    sin = tl.where(swapped, cosine, sine)
    cos = tl.where(swapped, sine, cosine)
    return tl.where(q & 2 == 2, -sin, sin), tl.where((q + 1) & 2 == 2, -cos, cos)


@triton.jit
def _rotate_heads(
    x, out, stride_t, stride_h, out_stride_t, out_stride_h, token, live, cos, sin, first, H,
    D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, DP)
    row = token.to(tl.int64)
    for n in tl.static_range(0, HEADS):
        head = first + n
        inside = live[:, None] & (c < D)[None, :] & (head < H)
        at = x + (row * stride_t + head * stride_h)[:, None] + c[None, :]
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(value, [BT, DP // 2, 2]))
        turned = tl.interleave(even * cos - odd * sin, odd * cos + even * sin)
        at = out + (row * out_stride_t + head * out_stride_h)[:, None] + c[None, :]
        tl.store(at, turned.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rope_kernel(
    q, k, q_out, k_out, grid,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h,
    q_out_stride_t, q_out_stride_h, k_out_stride_t, k_out_stride_h,
    tokens, N, H, sign,
    SIDES: tl.constexpr, RATIO: tl.constexpr, BITS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Programs: blocks of BT patches, and HEADS heads of q or k. `sign`: -1.0 turns back."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    live = token < tokens
    inside, _, _, _, _, row, column = _place(grid, N, token, SIDES)
    high, low = _turns(DP // 2, RATIO, BITS)
    pair = tl.arange(0, DP // 2)
    position = tl.where((pair % 2 == 0)[None, :], column[:, None], row[:, None])
    position = tl.where(inside[:, None], position, 0).to(tl.float32)
    turns = position * high[None, :]
    turns -= tl.floor(turns)
    sin, cos = _sin_cos(turns + position * low[None, :])
    sin *= sign
    groups = (H + HEADS - 1) // HEADS
    group = tl.program_id(1)
    if group < groups:
        _rotate_heads(q, q_out, q_stride_t, q_stride_h, q_out_stride_t, q_out_stride_h,
                      token, live, cos, sin, group * HEADS, H, D, DP, BT, HEADS)  # fmt: skip
    else:
        _rotate_heads(k, k_out, k_stride_t, k_stride_h, k_out_stride_t, k_out_stride_h,
                      token, live, cos, sin, (group - groups) * HEADS, H, D, DP, BT, HEADS)  # fmt: skip


@triton.jit
def _axis(position, size, SIDE: tl.constexpr):
    """The entry of a table of SIDE entries at or before a position of an image of this size, and how far behind it."""
    numerator = (2 * position + 1) * SIDE - size
    size = tl.maximum(size, 1)
    first = (numerator + 2 * size) // (2 * size) - 1  # numerator > -2 size, and // rounds towards zero
    return first, (numerator - first * (2 * size)).to(tl.float32) / (2 * size).to(tl.float32)


@triton.jit
def _tap_weight(t, TAP: tl.constexpr, TAPS: tl.constexpr):
    if TAPS == 2:
        weight = t if TAP == 1 else 1.0 - t
    elif TAP == 1 or TAP == 2:
        d = t if TAP == 1 else 1.0 - t
        weight = ((CUBIC + 2.0) * d - (CUBIC + 3.0)) * d * d + 1.0
    else:
        d = 1.0 + t if TAP == 0 else 2.0 - t
        weight = ((CUBIC * d - 5.0 * CUBIC) * d + 8.0 * CUBIC) * d - 4.0 * CUBIC
    return weight


@triton.jit
def _tap_index(first, TAP: tl.constexpr, TAPS: tl.constexpr, SIDE: tl.constexpr):
    return tl.minimum(tl.maximum(first + (TAP - TAPS // 2 + 1), 0), SIDE - 1)


@triton.jit
def interpolate_kernel(
    x, weight, time_weight, out, grid, x_stride_t, out_stride_t, tokens, N, time_rows,
    SIDES: tl.constexpr, TAPS: tl.constexpr, HAS_TIME: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Programs: blocks of BT patches, blocks of BD channels."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    live = (token < tokens)[:, None] & (c < D)[None, :]
    inside, frames, rows, columns, frame, row, column = _place(grid, N, token, SIDES)
    y, ty = _axis(row, rows, ROWS)
    x0, tx = _axis(column, columns, COLUMNS)
    at = x + token.to(tl.int64)[:, None] * x_stride_t + c[None, :]
    sum = tl.load(at, mask=live, other=0.0).to(tl.float32)
    known = live & inside[:, None]
    for i in tl.static_range(0, TAPS):
        wy = _tap_weight(ty, i, TAPS)
        line = _tap_index(y, i, TAPS, ROWS) * COLUMNS
        for j in tl.static_range(0, TAPS):
            cell = (line + _tap_index(x0, j, TAPS, COLUMNS)).to(tl.int64)
            entry = tl.load(weight + cell[:, None] * D + c[None, :], mask=known, other=0.0).to(tl.float32)
            sum += (wy * _tap_weight(tx, j, TAPS))[:, None] * entry
    if HAS_TIME:
        at = time_weight + tl.minimum(frame, time_rows - 1)[:, None] * D + c[None, :]
        sum += tl.load(at, mask=known & (frames > 1)[:, None], other=0.0).to(tl.float32)
    at = out + token.to(tl.int64)[:, None] * out_stride_t + c[None, :]
    tl.store(at, sum.to(out.dtype.element_ty), mask=live)


@triton.jit
def _share(position, size, entry, SIDE: tl.constexpr, TAPS: tl.constexpr):
    """How much of a table's entry each position on a side of an image takes."""
    first, t = _axis(position, size, SIDE)
    share = t * 0.0
    for tap in tl.static_range(0, TAPS):
        share += tl.where(_tap_index(first, tap, TAPS, SIDE) == entry, _tap_weight(t, tap, TAPS), 0.0)
    return share


@triton.jit
def _users(entry, size, SIDE: tl.constexpr, TAPS: tl.constexpr):
    """The positions on a side of an image that have a tap at a table's entry: the first, and the one behind the last.

    Their centres are at most TAPS / 2 entries away.
    """
    low = (size * (2 * entry + 1 - TAPS) + SIDE - 1) // (2 * SIDE)
    high = (size * (2 * entry + 1 + TAPS) + SIDE - 1) // (2 * SIDE)
    return tl.maximum(low, 0), tl.minimum(high, size)


@triton.jit
def interpolate_back_kernel(
    d_out, d_weight, grid, d_out_stride_t, tokens, N,
    SIDES: tl.constexpr, TAPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Programs: entries of the table, blocks of BD channels. Each gathers from the patches that its entry is in."""
    entry = tl.program_id(0)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    entry_row = entry // COLUMNS
    entry_column = entry % COLUMNS
    sum = tl.zeros([BD], tl.float32)
    start = entry.to(tl.int64) * 0
    for n in tl.range(0, N):
        frames, rows, columns = _shape(grid, n, n < N, SIDES)
        low, high = _users(entry_row, rows, ROWS, TAPS)
        left, right = _users(entry_column, columns, COLUMNS, TAPS)
        for row in tl.range(low, high):
            wy = _share(row, rows, entry_row, ROWS, TAPS)
            for column_start in tl.range(left, right, BT):
                column = column_start + tl.arange(0, BT)
                share = wy * _share(column, columns, entry_column, COLUMNS, TAPS)
                share = tl.where(column < right, share, 0.0)
                for frame in tl.range(0, frames):
                    token = start + (frame * rows + row) * columns + column
                    live = (column < right) & (token < tokens)
                    at = d_out + token[:, None] * d_out_stride_t + c[None, :]
                    grad = tl.load(at, mask=live[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)
                    sum += tl.sum(share[:, None] * grad, 0)
        start += frames * rows * columns
    tl.store(d_weight + entry.to(tl.int64) * D + c, sum.to(d_weight.dtype.element_ty), mask=c < D)


@triton.jit
def merge_kernel(
    x, out, grid, x_stride_t, tokens, slots, N,
    SIDES: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Programs: blocks of BT rows of the merged patches, blocks of BD channels."""
    slot = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    token = slot // (KH * KW)
    image, start, merged = _find(grid, N, token, SIDES, True, KH, KW)
    inside = (image < N) & (slot < slots)
    frames, rows, columns = _shape(grid, image, inside, SIDES)
    across = tl.maximum(columns // KW, 1)
    token -= merged
    row = token // across * KH + slot % (KH * KW) // KW
    column = token % across * KW + slot % KW
    sum = tl.zeros([BT, BD], tl.float32)
    for frame in tl.range(0, tl.max(frames, 0)):
        source = (start + (frame * rows + row) * columns + column).to(tl.int64)
        live = inside & (frame < frames) & (source < tokens)
        at = x + source[:, None] * x_stride_t + c[None, :]
        sum += tl.load(at, mask=live[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)
    sum = sum / tl.maximum(frames, 1).to(tl.float32)[:, None]
    at = out + slot.to(tl.int64)[:, None] * D + c[None, :]
    tl.store(at, sum.to(out.dtype.element_ty), mask=(slot < slots)[:, None] & (c < D)[None, :])


@triton.jit
def merge_back_kernel(
    d_out, d_x, grid, d_out_stride_t, d_out_stride_s, tokens, merged_tokens, N,
    SIDES: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Programs: blocks of BT patches, blocks of BD channels."""
    patch = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    image, start, merged = _find(grid, N, patch, SIDES, False, KH, KW)
    inside = (image < N) & (patch < tokens)
    frames, rows, columns = _shape(grid, image, inside, SIDES)
    within = (patch - start) % tl.maximum(rows * columns, 1)
    row = within // tl.maximum(columns, 1)
    column = within % tl.maximum(columns, 1)
    across = columns // KW
    token = (merged + row // KH * across + column // KW).to(tl.int64)
    live = inside & (row // KH < rows // KH) & (column // KW < across) & (token < merged_tokens)
    place = row % KH * KW + column % KW
    at = d_out + (token * d_out_stride_t + place * d_out_stride_s)[:, None] + c[None, :]
    grad = tl.load(at, mask=live[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)
    grad = grad / tl.maximum(frames, 1).to(tl.float32)[:, None]
    at = d_x + patch.to(tl.int64)[:, None] * D + c[None, :]
    tl.store(at, grad.to(d_x.dtype.element_ty), mask=(patch < tokens)[:, None] & (c < D)[None, :])


def rope_config(D: int, theta: float) -> Config:
    """Constants follow from a head's shape only: a patch gets the same bits alone and packed."""
    bits = max(1, (D // 4 - 1).bit_length())
    constants = {"RATIO": theta ** (-4 / D), "BITS": bits, "D": D, "DP": power_of_two(D, 4)}
    return Config({**constants, "BT": 16, "HEADS": 8}, 4, 1)


def channel_config(D: int) -> Config:
    """Of the kernels that take a block of rows and a block of their channels."""
    return Config({"D": D, "BT": 16, "BD": min(128, power_of_two(D))}, 4, 1)


def interpolate_config(D: int) -> Config:
    """Half as many rows: the loads of 16 taps are in flight at once, and spill registers on sm_90 with more."""
    config = channel_config(D)
    return config._replace(constants={**config.constants, "BT": 8})


def aot_variants() -> list[Variant]:
    """The kernels as MoonViT (head size 72, width 1152) and K3's tower (128) run them, and at the largest head."""
    variants = []

    def add(
        name: str,
        kernel: Any,
        types: dict[str, str],
        config: Config,
        more: dict[str, Any],
        backward: bool = False,
    ) -> None:
        signature: dict[str, Any] = {n: types[n] for n in kernel.arg_names if n in types}
        config = config._replace(constants={**config.constants, **more})
        variants.append(Variant(name, kernel, signature, config, backward))

    counts = dict.fromkeys(("tokens", "N", "H", "time_rows", "slots", "merged_tokens"), "i32")
    for x in ("*bf16", "*fp32"):
        types = {**dict.fromkeys(("q", "k", "q_out", "k_out", "x", "out", "weight", "d_out", "d_weight", "d_x"), x),
                 **counts, "time_weight": "*fp32", "grid": "*i64", "sign": "fp32"}  # fmt: skip
        for name in ("q", "k", "q_out", "k_out"):
            types |= {f"{name}_stride_t": "i32", f"{name}_stride_h": "i32"}
        types |= dict.fromkeys(("x_stride_t", "out_stride_t", "d_out_stride_t", "d_out_stride_s"), "i32")
        for D in (72, 128, 256):
            add("rope_2d", rope_kernel, types, rope_config(D, 10000.0), {"SIDES": 3})
        config, table = channel_config(1152), {"SIDES": 3, "ROWS": 64, "COLUMNS": 64}
        for mode, taps in (("bicubic", 4), ("bilinear", 2)):
            more = {**table, "TAPS": taps}
            timed = {**more, "HAS_TIME": True}
            add(f"interpolate_{mode}", interpolate_kernel, types, interpolate_config(1152), timed)
            add(f"interpolate_{mode}_back", interpolate_back_kernel, types, config, more, backward=True)
        more = {"SIDES": 3, "KH": 2, "KW": 2}
        add("merge_patches", merge_kernel, types, config, more)
        add("merge_patches_back", merge_back_kernel, types, config, more, backward=True)
    return variants
