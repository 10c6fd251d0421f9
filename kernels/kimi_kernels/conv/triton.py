"""The causal convolution on Triton kernels: float32 arithmetic, states in float32. The kernels are imported when first
run. Offsets stay on the device: there, wrong ones name other tokens, and tokens that no sequence has stay unwritten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton, dispatch
from .reference import offsets_of

MAX_WIDTH = 8  # taps are unrolled


def _refuses(x, weight, bias, initial_state, cu_seqlens, *rest) -> str | None:
    for name, t in (("x", x), ("weight", weight), ("bias", bias), ("initial_state", initial_state)):
        if t is not None and t.dtype == torch.float64:
            return f"computes in float32, got float64 for {name}"
    if not 1 <= weight.shape[1] <= MAX_WIDTH:
        return f"takes kernel widths 1 to {MAX_WIDTH}, got {weight.shape[1]}"
    return None


class _Problem:
    """One call: what the kernels over tokens and over states take alike."""

    def __init__(self, x, weight, bias, initial_state, cu_seqlens) -> None:
        if cu_seqlens is not None and not cu_seqlens.is_cuda:
            offsets_of(x, cu_seqlens)  # raises where they are wrong
        from . import triton_kernels as kernels

        self.x, self.weight, self.initial = _triton.rows(x), weight.contiguous(), initial_state
        self.bias = None if bias is None else bias.contiguous()
        self.offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
        batch, self.T, self.D = x.shape
        self.N = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.tokens, self.states = kernels.config(weight.shape[1]), kernels.state_config(weight.shape[1])
        BT = self.tokens.constants["BT"]
        slots = batch * -(-self.T // BT) if cu_seqlens is None else self.T // BT + self.N
        blocks = -(-self.D // self.tokens.constants["BD"])
        self.token_grid, self.state_grid = (slots if self.N else 0, blocks), (self.N, blocks)

    def launch(self, kernel, over_tokens: bool, *args, **constants: bool) -> None:
        config = self.tokens if over_tokens else self.states
        constants["PACKED"] = self.offsets is not None
        _triton.launch(
            kernel, self.token_grid if over_tokens else self.state_grid, self.x, *args,
            config=config._replace(constants={**config.constants, **constants}),
        )  # fmt: skip


def _strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()[:count]


@dispatch.register("causal_conv1d", "triton", _refuses)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    from . import triton_kernels as kernels

    p = _Problem(x, weight, bias, initial_state, cu_seqlens)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    count = p.N if output_final_state else 0
    final = torch.empty((count, *weight.shape), dtype=torch.float32, device=x.device)
    has_initial = p.initial is not None
    strides = *p.x.stride()[:2], *_strides(p.initial, 3), p.T
    p.launch(
        kernels.forward_kernel, True, p.x, p.weight, p.bias, p.initial, y, p.offsets, *strides, p.N, p.D,
        SILU=silu, HAS_BIAS=bias is not None, HAS_INITIAL=has_initial,
    )  # fmt: skip
    if output_final_state:
        p.launch(
            kernels.final_state_kernel, False, p.x, p.initial, final, p.offsets, *strides, p.D, HAS_INITIAL=has_initial
        )
    return y, final


@dispatch.register("causal_conv1d_backward", "triton", lambda dy, dfinal, *args: _refuses(*args))
def causal_conv1d_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of the taps are summed over a slot's tokens, and then over slots: the same bits each time."""
    from . import triton_kernels as kernels

    p = _Problem(x, weight, bias, initial_state, cu_seqlens)
    dy = _triton.rows(dy)
    dz = torch.empty(x.shape, dtype=torch.float32, device=x.device) if silu else dy
    width = weight.shape[1]
    sums = torch.zeros((p.token_grid[0], width + 1, p.D), dtype=torch.float32, device=x.device)
    p.launch(
        kernels.filter_gradient_kernel, True,
        dy, p.x, p.weight, p.bias, p.initial, dz, sums, p.offsets,
        *dy.stride()[:2], *p.x.stride()[:2], *_strides(p.initial, 3), p.T, p.N, p.D,
        SILU=silu, HAS_BIAS=bias is not None, HAS_INITIAL=p.initial is not None,
    )  # fmt: skip
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    strides = *dz.stride()[:2], *_strides(dfinal, 3), p.T
    has_final = dfinal is not None
    p.launch(
        kernels.input_gradient_kernel, True, dz, dfinal, p.weight, dx, p.offsets, *strides, p.N, p.D,
        HAS_FINAL=has_final,
    )  # fmt: skip
    dinitial = None
    if initial_state is not None:
        dinitial = torch.empty(initial_state.shape, dtype=initial_state.dtype, device=x.device)
        p.launch(
            kernels.initial_gradient_kernel, False, dz, dfinal, p.weight, dinitial, p.offsets, *strides, p.D,
            HAS_FINAL=has_final,
        )  # fmt: skip
    total = sums.sum(0)
    dbias = None if bias is None else total[width].to(bias.dtype)
    return dx, total[:width].T.to(weight.dtype).contiguous(), dbias, dinitial
