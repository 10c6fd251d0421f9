"""Triton kernels of Newton-Schulz, and the configurations in which they are compiled. Needs triton.

A product that is symmetric, X X^T or one of two symmetric matrices that commute, is computed once per pair of tiles
(i, j), i <= j, and written to both places: half the work. All kernels take a batch of matrices of one shape; which
tiles a matrix gets does not depend on the others, so that it has the same bits alone and in a batch.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._triton import Config, Variant, float32_products, power_of_two

# Rows from which bfloat16 matrices are cut into tiles of 128, which need half the traffic of those of 64 but leave most
# of an H100's 132 processors without work if a small matrix comes alone: 36 pairs of tiles at 1024 rows. There
# flash-muon, which has such tiles too, reports 0.90 of the library's speed for one matrix on an H800; 1.19 at 2048
# rows, 1.61 at 4096, 1.56 at 8192. Kimi's matrices below 2048 rows are experts', which come in batches.
LARGE = 1024


@triton.jit
def _triangle(p):
    """(i, j), i <= j: the pair in place p >= 0 where all pairs of column j come before those of column j + 1."""
    j = ((tl.sqrt(8.0 * p.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > p, j - 1, j)  # the root is rounded
    j = tl.where((j + 1) * (j + 2) // 2 <= p, j + 1, j)
    return p - j * (j + 1) // 2, j


@triton.jit
def pair_of_tiles(p, tiles, GROUP: tl.constexpr):
    """(i, j), i <= j < tiles, of place p of tiles (tiles + 1) / 2.

    GROUP columns at a time, row by row, so that programs that run together read few different tiles.
    """
    _, column = _triangle(p)
    first = column // GROUP * GROUP
    width = tl.minimum(GROUP, tiles - first)
    inner = p - first * (first + 1) // 2
    above = first * width  # pairs of the group above its own triangle
    i, j = _triangle(tl.maximum(inner - above, 0))
    i = tl.where(inner < above, inner // width, first + i)
    j = tl.where(inner < above, first + inner % width, first + j)
    return i, j


@triton.jit
def _starts(x, row, N, stride):
    """Where the given rows of x [N, K] start. Rows behind the last repeat it: what they give is not stored."""
    return x + tl.minimum(row, N - 1).to(tl.int64)[:, None] * stride


@triton.jit
def symmetric_kernel(
    left, right, base, out,
    left_stride_b, left_stride_n, right_stride_b, right_stride_n, base_stride_b, base_stride_n,
    out_stride_b, out_stride_n, N, K, tiles, pairs, alpha, beta, diagonal,
    HAS_BASE: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = alpha left @ right^T + beta base + diagonal I, where that is symmetric; grid (pairs * batch).

    left, right [batch, N, K], base and out [batch, N, N], rows contiguous. Of base the pairs i <= j are read. EVEN: K
    is a multiple of BK.
    """
    n = (tl.program_id(0) // pairs).to(tl.int64)
    i, j = pair_of_tiles(tl.program_id(0) % pairs, tiles, GROUP)
    row, column = i * BN + tl.arange(0, BN), j * BN + tl.arange(0, BN)
    at_left = _starts(left + n * left_stride_b, row, N, left_stride_n)
    at_right = _starts(right + n * right_stride_b, column, N, right_stride_n)
    acc = tl.zeros([BN, BN], tl.float32)
    for start in tl.range(0, K, BK):
        c = start + tl.arange(0, BK)[None, :]
        if EVEN:
            x, y = tl.load(at_left + c), tl.load(at_right + c)
        else:
            x, y = tl.load(at_left + c, mask=c < K, other=0.0), tl.load(at_right + c, mask=c < K, other=0.0)
        acc = tl.dot(x, tl.trans(y), acc, input_precision=PRECISION)
    acc *= alpha
    inside = (row < N)[:, None] & (column < N)[None, :]
    r, c = row.to(tl.int64), column.to(tl.int64)
    if HAS_BASE:
        at = base + n * base_stride_b + r[:, None] * base_stride_n + c[None, :]
        acc += beta * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    acc += tl.where(row[:, None] == column[None, :], diagonal, 0.0)
    found = acc.to(out.dtype.element_ty)
    own = out + n * out_stride_b
    tl.store(own + r[:, None] * out_stride_n + c[None, :], found, mask=inside)
    if i != j:
        mirrored = own + c[:, None] * out_stride_n + r[None, :]
        tl.store(mirrored, tl.trans(found), mask=(column < N)[:, None] & (row < N)[None, :])


@triton.jit
def product_kernel(
    left, right, base, out,
    left_stride_b, left_stride_n, right_stride_b, right_stride_k, base_stride_b, base_stride_n,
    out_stride_b, out_stride_n, N, M, K, down, across, beta,
    HAS_BASE: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = left @ right + beta base; grid (down * across * batch), the tiles of BN rows and BM columns.

    left [batch, N, K], right [batch, K, M], base and out [batch, N, M], rows contiguous. EVEN: K is a multiple of BK
    and M of BM.
    """
    tiles = down * across
    n = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles
    first = p // (GROUP * across) * GROUP  # GROUP rows of tiles at a time, column by column
    height = tl.minimum(GROUP, down - first)
    inner = p % (GROUP * across)
    row = (first + inner % height) * BN + tl.arange(0, BN)
    column = inner // height * BM + tl.arange(0, BM)
    at_left = _starts(left + n * left_stride_b, row, N, left_stride_n)
    at_right = right + n * right_stride_b + column[None, :]
    inside = (column < M)[None, :]
    acc = tl.zeros([BN, BM], tl.float32)
    for start in tl.range(0, K, BK):
        c = start + tl.arange(0, BK)
        at = at_right + c.to(tl.int64)[:, None] * right_stride_k
        if EVEN:
            x, y = tl.load(at_left + c[None, :]), tl.load(at)
        else:
            x = tl.load(at_left + c[None, :], mask=(c < K)[None, :], other=0.0)
            y = tl.load(at, mask=inside & (c < K)[:, None], other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    inside &= (row < N)[:, None]
    r = row.to(tl.int64)[:, None]
    if HAS_BASE:
        at = base + n * base_stride_b + r * base_stride_n + column[None, :]
        acc += beta * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = out + n * out_stride_b + r * out_stride_n + column[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def squares_kernel(x, sums, x_stride_b, x_stride_n, x_stride_m, N, M, BN: tl.constexpr, BM: tl.constexpr):
    """sums [batch, blocks] float64: of the squares of BN rows each; grid (batch, blocks)."""
    n = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    at = x + n * x_stride_b + row.to(tl.int64)[:, None] * x_stride_n
    total = tl.zeros([BN, BM], tl.float64)
    for start in tl.range(0, M, BM):
        column = start + tl.arange(0, BM)
        inside = (row < N)[:, None] & (column < M)[None, :]
        value = tl.load(at + column.to(tl.int64)[None, :] * x_stride_m, mask=inside, other=0.0)
        value = value.to(tl.float32).to(tl.float64)
        total += value * value
    tl.store(sums + n * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit
def unit_kernel(
    x, sums, out, x_stride_b, x_stride_n, x_stride_m, out_stride_b, out_stride_n, N, M, blocks, eps,
    BN: tl.constexpr, BM: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """out = x / (||x||_F + eps) of each matrix [N, M]; grid (batch, tiles down, tiles across).

    x has any strides; rows of out are contiguous.
    """
    n = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    column = tl.program_id(2) * BM + tl.arange(0, BM)
    block = tl.arange(0, BLOCKS)
    square = tl.sum(tl.load(sums + n * blocks + block, mask=block < blocks, other=0.0), axis=0)
    norm = (tl.sqrt(square) + eps).to(tl.float32)
    inside = (row < N)[:, None] & (column < M)[None, :]
    r, c = row.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    value = tl.load(x + n * x_stride_b + r * x_stride_n + c * x_stride_m, mask=inside, other=0.0)
    value = value.to(tl.float32) / norm
    tl.store(out + n * out_stride_b + r * out_stride_n + c, value.to(out.dtype.element_ty), mask=inside)


def symmetric_config(rows: int, inner: int, wide: bool) -> Config:
    """`wide`: float32 operands. `inner`: the side that is summed over."""
    BN, BK = (64, 32) if wide else (128 if rows >= LARGE else 64, 64)
    constants = {"EVEN": inner % BK == 0, "BN": BN, "BK": BK, "GROUP": 8, "PRECISION": float32_products()}
    return Config(constants, 8 if BN == 128 else 4, 3)


def product_config(rows: int, inner: int, columns: int, wide: bool) -> Config:
    config = symmetric_config(rows, inner, wide)
    BM = config.constants["BN"]
    even = config.constants["EVEN"] and columns % BM == 0
    return config._replace(constants={**config.constants, "EVEN": even, "BM": BM})


def squares_config() -> Config:
    return Config({"BN": 32, "BM": 64}, 4, 1)


def unit_config(blocks: int) -> Config:
    return Config({"BN": 64, "BM": 64, "BLOCKS": power_of_two(blocks)}, 4, 1)


def aot_variants() -> list[Variant]:
    """The kernels at the sizes of Kimi K2's matrices, and with sides that no tile divides."""
    variants = []

    def strides(**axes: str) -> dict[str, str]:
        return {f"{name}_stride_{axis}": "i32" for name, letters in axes.items() for axis in letters}

    def add(name: str, kernel: Any, types: dict[str, str], config: Config, **more: Any) -> None:
        signature: dict[str, Any] = {name: types[name] for name in kernel.arg_names if name in types}
        config = config._replace(constants={**config.constants, **more})
        variants.append(Variant(name, kernel, signature, config))

    integers = dict.fromkeys(("N", "M", "K", "tiles", "pairs", "down", "across", "blocks"), "i32")
    floats = dict.fromkeys(("alpha", "beta", "diagonal", "eps"), "fp32")
    common = {**integers, **floats, **strides(left="bn", right="bnk", base="bn", out="bn", x="bnm"), "sums": "*fp64"}
    for rows, inner, operands, result in (
        (2048, 7168, "*bf16", "*bf16"), (2048, 7169, "*bf16", "*bf16"), (512, 16384, "*bf16", "*fp32"),
        (512, 512, "*fp32", "*fp32"),
    ):  # fmt: skip
        types = {**common, **dict.fromkeys(("left", "right", "base"), operands), "out": result}
        wide = operands == "*fp32"
        for has in (False, True) if inner == 7168 else (True,):
            add("muon_symmetric", symmetric_kernel, types, symmetric_config(rows, inner, wide), HAS_BASE=has)
            config = product_config(rows, rows, inner, wide)
            add("muon_product", product_kernel, types, config, HAS_BASE=has)
    for operands in ("*bf16", "*fp32"):
        types = {**common, "x": operands, "out": "*bf16"}
        add("muon_squares", squares_kernel, types, squares_config())
        add("muon_unit", unit_kernel, types, unit_config(64))
    return variants
