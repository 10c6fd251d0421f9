"""Triton kernels of the gated RMSNorm, and the configurations in which they are compiled. Needs triton."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._triton import Config, Variant, power_of_two

TURNS = 16  # tiles of rows of a backward program, whose part of the weight's gradient stays in registers


@triton.jit
def _rows(x, row, heads, stride_a, stride_b):
    """Where rows of x [A, heads, D] start, counted over both leading dimensions."""
    return x + (row // heads).to(tl.int64)[:, None] * stride_a + (row % heads).to(tl.int64)[:, None] * stride_b


@triton.jit
def forward_kernel(
    x, gate, weight, out, x_stride_a, x_stride_b, gate_stride_a, gate_stride_b, count, heads, eps,
    D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """out [count, D] = norm of x times act(gate), BR of the rows; grid (count / BR)."""
    row, c = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, DP)[None, :]
    inside = (row < count)[:, None] & (c < D)
    value = tl.load(_rows(x, row, heads, x_stride_a, x_stride_b) + c, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(_rows(gate, row, heads, gate_stride_a, gate_stride_b) + c, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, axis=1) / D + eps)
    act = tl.sigmoid(z)
    if SILU:
        act *= z
    found = value * factor[:, None] * gain * act
    tl.store(out + row.to(tl.int64)[:, None] * D + c, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dy, x, gate, weight, dx, dgate, dweights,
    dy_stride_a, dy_stride_b, x_stride_a, x_stride_b, gate_stride_a, gate_stride_b, count, heads, eps,
    D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr, TURNS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Gradients of TURNS tiles of BR rows: dx, dgate [count, D], and of the weight dweights [programs, D] float32."""
    c = tl.arange(0, DP)[None, :]
    gain = tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)
    total = tl.zeros([DP], tl.float32)
    first = tl.program_id(0) * TURNS * BR
    for start in tl.range(first, tl.minimum(first + TURNS * BR, count), BR):
        row = start + tl.arange(0, BR)
        inside = (row < count)[:, None] & (c < D)
        value = tl.load(_rows(x, row, heads, x_stride_a, x_stride_b) + c, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(_rows(gate, row, heads, gate_stride_a, gate_stride_b) + c, mask=inside, other=0.0)
        g = tl.load(_rows(dy, row, heads, dy_stride_a, dy_stride_b) + c, mask=inside, other=0.0).to(tl.float32)
        z = z.to(tl.float32)
        factor = tl.rsqrt(tl.sum(value * value, axis=1) / D + eps)[:, None]
        unit = value * factor
        s = tl.sigmoid(z)
        act, slope = s, s * (1.0 - s)
        if SILU:
            act, slope = z * s, s + z * slope
        d_unit = g * gain * act
        d_value = factor * (d_unit - unit * (tl.sum(d_unit * unit, axis=1) / D)[:, None])
        place = row.to(tl.int64)[:, None] * D + c
        tl.store(dx + place, d_value.to(dx.dtype.element_ty), mask=inside)
        tl.store(dgate + place, (g * unit * gain * slope).to(dgate.dtype.element_ty), mask=inside)
        total += tl.sum(g * unit * act, axis=0)
    channel = tl.arange(0, DP)
    tl.store(dweights + tl.program_id(0).to(tl.int64) * D + channel, total, mask=channel < D)


def config(D: int, backward: bool = False) -> Config:
    """It depends on the width only, so that a row has the same bits in any batch.

    The backward keeps a row and its sums in registers: with 16 warps, which have 128 each, the widest would spill.
    """
    DP = power_of_two(D)
    warps = min(8 if backward else 16, max(4, DP // 512))
    return Config({"D": D, "DP": DP, "BR": max(1, 2048 // DP)}, warps, 1)


def aot_variants() -> list[Variant]:
    """Heads of KDA, and the widest row."""
    variants = []
    strides = {f"{name}_stride_{axis}": "i32" for name in ("dy", "x", "gate") for axis in "ab"}
    common = {**strides, "count": "i32", "heads": "i32", "eps": "fp32", "dweights": "*fp32"}
    for D, kind in ((128, "*bf16"), (128, "*fp32"), (8192, "*bf16")):
        types = {**common, **dict.fromkeys(("dy", "x", "gate", "weight", "out", "dx", "dgate"), kind)}
        for silu in (False, True):
            for name, kernel, more in (
                ("rmsnorm_gated", forward_kernel, {}),
                ("rmsnorm_gated_backward", backward_kernel, {"TURNS": TURNS}),
            ):
                signature: dict[str, Any] = {name: types[name] for name in kernel.arg_names if name in types}
                chosen = config(D, bool(more))
                constants = {**chosen.constants, **more, "SILU": silu}
                variants.append(Variant(name, kernel, signature, chosen._replace(constants=constants), bool(more)))
    return variants
