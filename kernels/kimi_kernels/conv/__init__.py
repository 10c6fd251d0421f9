"""The short causal convolution in front of KDA."""

from __future__ import annotations

from torch import Tensor

from . import ops

__all__ = ["causal_conv1d"]


def _validate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, D], got shape {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(f"weight must be [{x.shape[2]}, W] to match x, got shape {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (x.shape[2],):
        raise ValueError(f"bias must have shape ({x.shape[2]},), got {tuple(bias.shape)}")
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")
    if cu_seqlens is not None and x.shape[0] != 1:
        raise ValueError(
            f"x must be packed into one row [1, T, D] when cu_seqlens is given, got B = {x.shape[0]}"
        )
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state_shape = (sequences, *weight.shape)
    if initial_state is not None and tuple(initial_state.shape) != state_shape:
        raise ValueError(
            f"initial_state must be [N, D, W] = {state_shape}, got shape {tuple(initial_state.shape)}"
        )


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y[t] = act(bias + sum_j weight[:, j] * x[t - W + 1 + j]), each channel by itself (Kimi Linear, section 4).

    Args:
        x: [B, T, D]; with `cu_seqlens` B is 1 and T counts the tokens of all sequences.
        weight: [D, W]; the last column meets the current token. W from 2 to 8 on the native path.
        bias: [D].
        activation: None or "silu" ("swish" is the same).
        initial_state: [N, D, W], the W inputs before each sequence, latest last; zeros when None.
        output_final_state: also return the state after each sequence.
        cu_seqlens: [N + 1] integers from 0 to T, offsets of the sequences; they may be empty. Without it N is B.

    Returns:
        (y [B, T, D] in x's dtype, final state [N, D, W] in float32 (float64 for float64 x), or None). Arithmetic
        is float32. Sequences may be cut anywhere: the final state of one part is the initial state of the next.

    Raises:
        ValueError: a shape, the activation or the offsets do not fit.
    """
    _validate(x, weight, bias, activation, initial_state, cu_seqlens)
    y, final = ops.causal_conv1d(
        x, weight, bias, initial_state, cu_seqlens, activation is not None, output_final_state
    )
    return y, final if output_final_state else None
