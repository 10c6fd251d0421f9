"""Newton-Schulz on torch's batched matrix products, the sums fused into them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .reference import as_given, unit_norm


@dispatch.register("newton_schulz", "cpu", native=False)
def newton_schulz(x: Tensor, coefficients: list[float], eps: float, dtype: torch.dtype) -> Tensor:
    u = unit_norm(x, eps, dtype).reshape(-1, min(x.shape[-2:]), max(x.shape[-2:]))
    for n in range(0, len(coefficients), 3):
        a, b, c = coefficients[n : n + 3]
        gram = torch.bmm(u, u.mT)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        u = torch.baddbmm(u, poly, u, beta=a)
    return as_given(u.view(*x.shape[:-2], *u.shape[1:]), x)
