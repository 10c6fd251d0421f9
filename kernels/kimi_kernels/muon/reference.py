"""Newton-Schulz in plain torch, as the formula stands."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch


def unit_norm(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / (||x||_F + eps) of each matrix, wide side last, in `dtype`. The norm is at least float32."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.shape[-2] > x.shape[-1]:
        exact = exact.mT
    return (exact / (torch.linalg.vector_norm(exact, dim=(-2, -1), keepdim=True) + eps)).to(dtype)


def as_given(result: Tensor, x: Tensor) -> Tensor:
    """`result` with its sides and dtype as in x, contiguous."""
    if x.shape[-2] > x.shape[-1]:
        result = result.mT
    return result.to(x.dtype).contiguous()


@dispatch.register("newton_schulz", "reference")
def newton_schulz(x: Tensor, coefficients: list[float], eps: float, dtype: torch.dtype) -> Tensor:
    u = unit_norm(x, eps, dtype)
    for n in range(0, len(coefficients), 3):
        a, b, c = coefficients[n : n + 3]
        gram = u @ u.mT
        u = a * u + (b * gram + c * (gram @ gram)) @ u
    return as_given(u, x)
