"""Newton-Schulz in plain torch, as the formula stands."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch


def unit_norm(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / (||x||_F + eps) of each matrix, wide side last, in `dtype`."""
    acc = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
    # In two stages, the second in float64: one float32 sum over a million squares is off by 2e-5.
    of_rows = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=acc)
    norm = torch.linalg.vector_norm(of_rows, dim=-2, keepdim=True, dtype=torch.float64) + eps
    unit = (x.to(acc) / norm.to(acc)).to(dtype)
    return unit.mT if x.shape[-2] > x.shape[-1] else unit


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
