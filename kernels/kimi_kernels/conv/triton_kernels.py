"""Triton kernels of the causal convolution, and the configurations in which they are compiled. Needs triton.

Place t of a sequence is its token t, or for t < 0 the column W + t of its initial state. Sums over the taps run from
the earliest to the current token wherever a sequence is cut or packed, so that its results have the same bits.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._packing import first_slot, sequence_bounds, sequence_of_slot
from .._triton import Config, Variant, power_of_two


@triton.jit
def _tile(cu_seqlens, T, N, D, BT: tl.constexpr, BD: tl.constexpr, PACKED: tl.constexpr):
    """Of this program: sequence, batch row, first token and length of it, places, and channels, as a row."""
    slot = tl.program_id(0).to(tl.int64)
    n = sequence_of_slot(cu_seqlens, slot, T, N, BT, PACKED)
    first, length = sequence_bounds(cu_seqlens, n, T, PACKED)
    t = (slot - first_slot(first, n, T, BT, PACKED)) * BT + tl.arange(0, BT)
    channel = (tl.program_id(1) * BD + tl.arange(0, BD)).to(tl.int64)[None, :]
    return n, n * 0 if PACKED else n, first, length, t, channel


@triton.jit
def _inputs(
    x, initial, n, t, length, channel, D, x_stride_t, initial_stride_n, initial_stride_d, initial_stride_w,
    W: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """What stands at the places t of sequence n, which starts at x: [places, channels] float32; 0 outside."""
    inside = ((t >= 0) & (t < length))[:, None] & (channel < D)
    found = tl.load(x + t[:, None] * x_stride_t + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_INITIAL:
        before = ((t < 0) & (t >= -W))[:, None] & (channel < D)
        at = initial + n * initial_stride_n + channel * initial_stride_d + (W + t)[:, None] * initial_stride_w
        found += tl.load(at, mask=before, other=0.0).to(tl.float32)
    return found


@triton.jit
def _filtered(
    x, weight, bias, initial, n, t, length, channel, D, x_stride_t, initial_stride_n, initial_stride_d,
    initial_stride_w, W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """The convolution at the places t, before its activation: [places, channels] float32."""
    z = tl.zeros([t.shape[0], channel.shape[1]], tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + channel, mask=channel < D, other=0.0).to(tl.float32)
    for j in tl.static_range(0, W):
        tap = tl.load(weight + channel * W + j, mask=channel < D, other=0.0).to(tl.float32)
        z += tap * _inputs(x, initial, n, t - (W - 1 - j), length, channel, D, x_stride_t, initial_stride_n,
                           initial_stride_d, initial_stride_w, W, HAS_INITIAL)  # fmt: skip
    return z


@triton.jit
def forward_kernel(
    x, weight, bias, initial, y, cu_seqlens, x_stride_b, x_stride_t,
    initial_stride_n, initial_stride_d, initial_stride_w, T, N, D,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """y [B, T, D], contiguous; grid (slots, D / BD)."""
    n, batch, first, length, t, channel = _tile(cu_seqlens, T, N, D, BT, BD, PACKED)
    z = _filtered(
        x + batch * x_stride_b + first * x_stride_t, weight, bias, initial, n, t, length, channel,
        D, x_stride_t, initial_stride_n, initial_stride_d, initial_stride_w, W, HAS_BIAS, HAS_INITIAL,
    )  # fmt: skip
    if SILU:
        z *= tl.sigmoid(z)
    at = y + (batch * T + first + t)[:, None] * D + channel
    tl.store(at, z.to(y.dtype.element_ty), mask=(t < length)[:, None] & (channel < D))


@triton.jit
def final_state_kernel(
    x, initial, final, cu_seqlens, x_stride_b, x_stride_t, initial_stride_n, initial_stride_d, initial_stride_w, T, D,
    W: tl.constexpr, WP: tl.constexpr, BD: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """final [N, D, W] float32: the last W places of each sequence; grid (N, D / BD)."""
    n = tl.program_id(0).to(tl.int64)
    first, length = sequence_bounds(cu_seqlens, n, T, PACKED)
    batch = n * 0 if PACKED else n
    j = tl.arange(0, WP)
    channel = (tl.program_id(1) * BD + tl.arange(0, BD)).to(tl.int64)[None, :]
    found = _inputs(
        x + batch * x_stride_b + first * x_stride_t, initial, n, length - W + j, length, channel,
        D, x_stride_t, initial_stride_n, initial_stride_d, initial_stride_w, W, HAS_INITIAL,
    )  # fmt: skip
    at = final + (n * D + channel) * W + j[:, None]
    tl.store(at, found, mask=(j < W)[:, None] & (channel < D))


@triton.jit
def filter_gradient_kernel(
    dy, x, weight, bias, initial, dz, sums, cu_seqlens, dy_stride_b, dy_stride_t, x_stride_b, x_stride_t,
    initial_stride_n, initial_stride_d, initial_stride_w, T, N, D,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dz [B, T, D] float32, gradient before the activation (if SILU: without one it is dy); grid (slots, D / BD).

    sums [slots, W + 1, D] float32: a slot's part of the gradients of the taps, and of the bias.
    """
    n, batch, first, length, t, channel = _tile(cu_seqlens, T, N, D, BT, BD, PACKED)
    own = x + batch * x_stride_b + first * x_stride_t
    live = (t < length)[:, None] & (channel < D)
    at = dy + batch * dy_stride_b + (first + t)[:, None] * dy_stride_t + channel
    g = tl.load(at, mask=live, other=0.0).to(tl.float32)
    if SILU:
        z = _filtered(own, weight, bias, initial, n, t, length, channel, D, x_stride_t, initial_stride_n,
                      initial_stride_d, initial_stride_w, W, HAS_BIAS, HAS_INITIAL)  # fmt: skip
        s = tl.sigmoid(z)
        g = tl.where(live, g * (s + z * s * (1.0 - s)), 0.0)
        tl.store(dz + (batch * T + first + t)[:, None] * D + channel, g, mask=live)
    part = sums + tl.program_id(0).to(tl.int64) * (W + 1) * D + channel
    for j in tl.static_range(0, W):
        value = _inputs(own, initial, n, t - (W - 1 - j), length, channel, D, x_stride_t, initial_stride_n,
                        initial_stride_d, initial_stride_w, W, HAS_INITIAL)  # fmt: skip
        product = tl.where(live, g * value, 0.0)
        tl.store(part + j * D, tl.sum(product, axis=0)[None, :], mask=channel < D)
    tl.store(part + W * D, tl.sum(g, axis=0)[None, :], mask=channel < D)


@triton.jit
def _place_gradient(
    dz, dfinal, weight, n, t, length, channel, D, dz_stride_t, dfinal_stride_n, dfinal_stride_d, dfinal_stride_w,
    W: tl.constexpr, HAS_FINAL: tl.constexpr,
):  # fmt: skip
    """Gradient of the places t, from -W on, of sequence n: through tokens that they reach, and the final state."""
    found = tl.zeros([t.shape[0], channel.shape[1]], tl.float32)
    for j in tl.static_range(0, W):
        reached = t + (W - 1 - j)
        inside = ((reached >= 0) & (reached < length))[:, None] & (channel < D)
        g = tl.load(dz + reached[:, None] * dz_stride_t + channel, mask=inside, other=0.0).to(tl.float32)
        found += g * tl.load(weight + channel * W + j, mask=channel < D, other=0.0).to(tl.float32)
    if HAS_FINAL:
        kept = t - (length - W)
        at = dfinal + n * dfinal_stride_n + channel * dfinal_stride_d + kept[:, None] * dfinal_stride_w
        found += tl.load(at, mask=((kept >= 0) & (kept < W))[:, None] & (channel < D), other=0.0).to(tl.float32)
    return found


@triton.jit
def input_gradient_kernel(
    dz, dfinal, weight, dx, cu_seqlens, dz_stride_b, dz_stride_t,
    dfinal_stride_n, dfinal_stride_d, dfinal_stride_w, T, N, D,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, HAS_FINAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dx [B, T, D], contiguous; grid (slots, D / BD)."""
    n, batch, first, length, t, channel = _tile(cu_seqlens, T, N, D, BT, BD, PACKED)
    found = _place_gradient(
        dz + batch * dz_stride_b + first * dz_stride_t, dfinal, weight, n, t, length, channel, D,
        dz_stride_t, dfinal_stride_n, dfinal_stride_d, dfinal_stride_w, W, HAS_FINAL,
    )  # fmt: skip
    at = dx + (batch * T + first + t)[:, None] * D + channel
    tl.store(at, found.to(dx.dtype.element_ty), mask=(t < length)[:, None] & (channel < D))


@triton.jit
def initial_gradient_kernel(
    dz, dfinal, weight, dinitial, cu_seqlens, dz_stride_b, dz_stride_t,
    dfinal_stride_n, dfinal_stride_d, dfinal_stride_w, T, D,
    W: tl.constexpr, WP: tl.constexpr, BD: tl.constexpr, HAS_FINAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dinitial [N, D, W]; grid (N, D / BD)."""
    n = tl.program_id(0).to(tl.int64)
    first, length = sequence_bounds(cu_seqlens, n, T, PACKED)
    batch = n * 0 if PACKED else n
    j = tl.arange(0, WP)
    channel = (tl.program_id(1) * BD + tl.arange(0, BD)).to(tl.int64)[None, :]
    found = _place_gradient(
        dz + batch * dz_stride_b + first * dz_stride_t, dfinal, weight, n, j - W, length, channel,
        D, dz_stride_t, dfinal_stride_n, dfinal_stride_d, dfinal_stride_w, W, HAS_FINAL,
    )  # fmt: skip
    at = dinitial + (n * D + channel) * W + j[:, None]
    tl.store(at, found.to(dinitial.dtype.element_ty), mask=(j < W)[:, None] & (channel < D))


def config(W: int) -> Config:
    """Of the kernels over tokens."""
    return Config({"W": W, "BT": 32, "BD": channels_of_program(W)}, 8, 1)


def state_config(W: int) -> Config:
    """Of the kernels over states."""
    return Config({"W": W, "WP": power_of_two(W, least=1), "BD": channels_of_program(W)}, 4, 1)


def channels_of_program(W: int) -> int:
    """The values under all taps are in registers at once: for a wide filter, of half as many channels."""
    return 64 if W <= 4 else 32


def aot_variants() -> list[Variant]:
    """Kimi's width of 4, packed, with everything that may be there; and the widest."""
    names = {"x": "bt", "dy": "bt", "dz": "bt", "initial": "ndw", "dfinal": "ndw"}
    common = {f"{name}_stride_{axis}": "i32" for name, axes in names.items() for axis in axes}
    common |= {**dict.fromkeys("TND", "i32"), "cu_seqlens": "*i32"}
    common |= dict.fromkeys(("initial", "final", "dfinal", "dinitial", "dz", "sums"), "*fp32")
    variants = []
    for W, kind in ((4, "*bf16"), (8, "*bf16"), (4, "*fp32")):
        types = {**common, **dict.fromkeys(("x", "y", "dy", "dx", "weight", "bias"), kind)}
        for name, kernel, chosen, flags, backward in (
            ("causal_conv1d", forward_kernel, config(W), ("SILU", "HAS_BIAS", "HAS_INITIAL"), False),
            ("causal_conv1d_state", final_state_kernel, state_config(W), ("HAS_INITIAL",), False),
            ("causal_conv1d_filter", filter_gradient_kernel, config(W), ("SILU", "HAS_BIAS", "HAS_INITIAL"), True),
            ("causal_conv1d_input", input_gradient_kernel, config(W), ("HAS_FINAL",), True),
            ("causal_conv1d_initial", initial_gradient_kernel, state_config(W), ("HAS_FINAL",), True),
        ):
            signature: dict[str, Any] = {name: types[name] for name in kernel.arg_names if name in types}
            constants = {**chosen.constants, **dict.fromkeys(flags, True), "PACKED": True}
            variants.append(Variant(name, kernel, signature, chosen._replace(constants=constants), backward))
    return variants
