"""Norms fused with what follows them."""

from __future__ import annotations

from torch import Tensor

from . import ops

__all__ = ["rmsnorm_gated"]


def _validate(x: Tensor, gate: Tensor, weight: Tensor, activation: str) -> None:
    if gate.shape != x.shape:
        raise ValueError(f"gate must have the shape of x {tuple(x.shape)}, got {tuple(gate.shape)}")
    if tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(f"weight must have shape ({x.shape[-1]},), got {tuple(weight.shape)}")
    if activation not in ("sigmoid", "silu"):
        raise ValueError(f"activation must be 'sigmoid' or 'silu', got {activation!r}")


def rmsnorm_gated(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-5, activation: str = "sigmoid"
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight * act(gate), the output norm of a KDA head (Kimi Linear, section 4).

    Args:
        x: [..., D]; the mean runs over D.
        gate: [..., D], before its activation.
        weight: [D], gain of the norm.
        eps: added to the mean square.
        activation: "sigmoid" or "silu", applied to gate.

    Returns:
        [..., D] in x's dtype; arithmetic is float32 (float64 for float64 inputs).
    """
    _validate(x, gate, weight, activation)
    return ops.rmsnorm_gated(x, gate, weight, eps, activation == "silu")
