"""Newton-Schulz, beside the same steps on torch's own products; and the symmetric product of which it is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import OURS, Case, Size
from kimi_kernels import newton_schulz
from kimi_kernels.muon.triton import symmetric_product

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Moonlight, section 2.1
TORCH = "torch's products"
SYMMETRIC_GOAL = 1.6  # times the library's product, from 4096 on
GOAL = 1.3  # of the whole: two of three products in a step are symmetric, at that speed


def steps_in_torch(x: Tensor) -> Tensor:
    """Moonlight's five steps in bfloat16, as torch.optim.Muon takes them, on a batch."""
    a, b, c = COEFFICIENTS
    u = x.to(torch.bfloat16)
    tall = u.shape[-2] > u.shape[-1]
    if tall:
        u = u.mT
    u = u / u.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(STEPS):
        gram = u @ u.mT
        u = torch.baddbmm(u, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), u, beta=a)
    return u.mT if tall else u


def case(batch: int, rows: int, columns: int, goal: float | None = None) -> Case:
    def make(device: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        x = torch.randn(batch, rows, columns, device=device).to(torch.bfloat16)
        return {OURS: lambda: lambda: newton_schulz(x, steps=STEPS), TORCH: lambda: lambda: steps_in_torch(x)}

    least = min(rows, columns)
    flops = STEPS * batch * (4 * least * rows * columns + 2 * least**3)
    return Case(
        "Newton-Schulz", f"{batch}x{rows}x{columns}", make, 2 * 2 * batch * rows * columns, flops,
        {} if goal is None else {TORCH: goal}, error=0.1,
    )  # fmt: skip


def product(rows: int, inner: int, goal: float | None = None) -> Case:
    """x x^T, bfloat16."""

    def make(device: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        x = (torch.randn(rows, inner, device=device) / inner**0.5).to(torch.bfloat16)
        return {OURS: lambda: lambda: symmetric_product(x[None], x[None]), TORCH: lambda: lambda: torch.mm(x, x.mT)}

    return Case(
        "symmetric product", f"{rows}x{inner}", make, 2 * (rows * inner + rows * rows), 2 * rows * rows * inner,
        {} if goal is None else {TORCH: goal},
    )  # fmt: skip


def cases(size: Size) -> list[Case]:
    if size == "tiny":
        return [case(2, 40, 48), case(1, 64, 32), product(70, 40)]
    first = [product(4096, 4096, SYMMETRIC_GOAL), case(1, 4096, 4096, GOAL), case(8, 2048, 1408)]
    if size == "quick":
        return first
    return [
        *first, product(8192, 8192, SYMMETRIC_GOAL), case(1, 8192, 8192, GOAL), case(1, 2048, 7168),
        *(product(n, n) for n in (1024, 2048)), case(1, 1024, 1024),
    ]  # fmt: skip
