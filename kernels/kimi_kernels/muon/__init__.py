"""Newton-Schulz orthogonalisation, the heart of Muon (Moonlight, arXiv 2502.16982, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops

__all__ = ["COEFFICIENTS", "newton_schulz", "schulz_triples"]

Triple = tuple[float, float, float]

# (a, b, c) of each step X <- a X + b (X X^T) X + c (X X^T)^2 X. A table of one triple serves any number of steps.
COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    # Keller Jordan, "Muon: an optimizer for hidden layers", 2024; Moonlight and Kimi K2 use it with five steps.
    # A steep slope at 0: small singular values reach [0.68, 1.14] fast and then stay there, never at 1 itself.
    "moonlight": ((3.4445, -4.7750, 2.0315),),
    # Jiacheng You, in the modded-nanogpt records, 2025: one triple a step, tuned together for five steps.
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Polar Express, arXiv 2505.16932, algorithm 1: at each step the best odd quintic for singular values that
    # started in [1e-3, 1]. Without the safety factor that the paper offers for bfloat16.
    "polar_express": (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    ),
}


def schulz_triples(coefficients: str | Sequence[Triple], steps: int) -> tuple[Triple, ...]:
    """The triple of each of `steps` steps.

    Args:
        coefficients: a name in COEFFICIENTS, or the triples themselves: one for all steps, or one a step.
        steps: how many steps; fewer than a table holds take its first ones.

    Raises:
        ValueError: an unknown name, a triple that is none, steps < 1 or beyond the table.
    """
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(
                f"coefficients must be one of {', '.join(COEFFICIENTS)} or a sequence of (a, b, c), "
                f"got {coefficients!r}"
            )
        table = COEFFICIENTS[coefficients]
    else:
        table = tuple(tuple(float(c) for c in triple) for triple in coefficients)  # type: ignore[misc]
        for n, triple in enumerate(table):
            if len(triple) != 3:
                raise ValueError(f"coefficients[{n}] must be (a, b, c), got {len(triple)} numbers")
        if not table:
            raise ValueError("coefficients is empty: pass at least one (a, b, c)")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if len(table) == 1:
        return table * steps
    if steps > len(table):
        raise ValueError(f"steps must be at most {len(table)}, the triples in coefficients, got {steps}")
    return table[:steps]


def newton_schulz(
    x: Tensor,
    steps: int = 5,
    coefficients: str | Sequence[Triple] = "moonlight",
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """An approximation of the orthogonal polar factor U V^T of each matrix x = U S V^T.

    Every singular value s of x / (||x||_F + eps) goes through the same odd polynomials, which drive it towards 1;
    the singular vectors stay. With "moonlight" and five steps values end in about [0.68, 1.14]. There is no
    gradient.

    Args:
        x: [..., n, m], floating point, any strides; leading dimensions are matrices of their own.
        steps: iterations.
        coefficients: a name in COEFFICIENTS ("moonlight", "you", "polar_express"), or a sequence of (a, b, c),
            one for all steps or one a step.
        eps: added to the Frobenius norm.
        dtype: of the matrix products, at least: bfloat16 as in the papers, float32 or float64. None takes x's own.

    Returns:
        [..., n, m] in x's dtype. A zero matrix gives zeros; a NaN or infinity spoils its own matrix only.

    Raises:
        ValueError: a shape, dtype, steps or coefficients do not fit.
    """
    if x.dim() < 2:
        raise ValueError(f"x must be [..., n, m], got shape {tuple(x.shape)}")
    dtype = x.dtype if dtype is None else dtype
    for name, kind in (("x", x.dtype), ("dtype", dtype)):
        if kind not in (torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{name} must be bfloat16, float32 or float64, got {kind}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    flat = [c for triple in schulz_triples(coefficients, steps) for c in triple]
    return ops.newton_schulz(x.detach(), flat, eps, dtype)
