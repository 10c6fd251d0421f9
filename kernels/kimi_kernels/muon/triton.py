"""Newton-Schulz on Triton kernels, float32 or bfloat16. The kernels are imported when first run.

Symmetric products are always the kernel's, which does half the work. Other products are the library's where it is
ahead: in bfloat16, for matrices that fill a GPU by themselves, one call for each. One call for a batch would let the
library choose its algorithm, and so the bits, by the size of the batch; smaller matrices therefore go through our
product kernel, which takes a batch in one launch and gives each matrix the same bits in any. In float32 the library
either leaves the matrix units unused or, if the process allows TF32, loses half the digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton, dispatch
from .reference import as_given

# Cost of a float32 product in bfloat16 ones: on NVIDIA three in TF32 at half the rate, on AMD (MI300X) the matrix
# units' own float32 at an eighth; vendors' peak rates.
_FLOAT32_COST = 8 if torch.version.hip else 6
# Rows from which a bfloat16 matrix fills a GPU by itself: 2048 x 2048 is two tiles of 128 a processor on an H100.
_LIBRARY_ROWS = 2048
_LIBRARY_ALIGNMENT = 16  # bytes; what the library assumes of a matrix alone must hold for each of a batch

Triple = tuple[float, ...]


def _refuses(x: Tensor, coefficients: list[float], eps: float, dtype: torch.dtype) -> str | None:
    for name, kind in (("x", x.dtype), ("dtype", dtype)):
        if kind == torch.float64:
            return f"computes in float32, got float64 for {name}"
    return None


@dispatch.register("newton_schulz", "triton", _refuses)
def newton_schulz(x: Tensor, coefficients: list[float], eps: float, dtype: torch.dtype) -> Tensor:
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    triples = [tuple(coefficients[n : n + 3]) for n in range(0, len(coefficients), 3)]
    u = _unit(x, eps, dtype)
    rows, columns = u.shape[1:]
    if dtype == torch.bfloat16 and gram_form_pays(rows, columns, len(triples)):
        u = _on_gram(u, triples)
    else:
        u = _on_matrix(u, triples)
    return as_given(u.view(*x.shape[:-2], rows, columns), x)


def gram_form_pays(rows: int, columns: int, steps: int) -> bool:
    """Whether the Gram form takes less time than steps on the whole matrix, by count of multiplications.

    In units of rows^2, with half of each symmetric product: a step on the matrix is columns / 2 for X X^T, rows / 2 for
    its square and columns for P X. The Gram form is columns / 2 for R, 2 columns for Q X with Q in two parts, and in
    float32 a half of 4 rows a step (R^2, Q P, and two for P R P) without the three halves that the ends spare. For
    five steps it pays from 9.7 columns a row (NVIDIA). A count, not measured on a GPU yet.
    """
    on_matrix = steps * (1.5 * columns + 0.5 * rows)
    on_gram = 2.5 * columns + _FLOAT32_COST * (2 * steps - 1.5) * rows
    return on_gram < on_matrix


def _on_matrix(u: Tensor, triples: list[Triple]) -> Tensor:
    for a, b, c in triples:
        gram = symmetric_product(u, u)
        u = _product(symmetric_product(gram, gram, base=gram, alpha=c, beta=b), u, base=u, beta=a)
    return u


def _on_gram(u: Tensor, triples: list[Triple]) -> Tensor:
    """The same steps on R = u u^T, as R <- P R P and Q <- P Q with P = a + b R + c R^2; the result is Q u.

    All of it is float32, as on the CPU: R has the squares of the singular values, for which bfloat16 is too narrow.
    Q spreads as far, so it is multiplied as the sum of two bfloat16 parts.
    """
    gram = symmetric_product(u, u, dtype=torch.float32)
    product = None
    for n, (a, b, c) in enumerate(triples):
        step = symmetric_product(gram, gram, base=gram, alpha=c, beta=b, diagonal=a)
        product = step if product is None else symmetric_product(product, step)
        if n + 1 < len(triples):
            gram = symmetric_product(symmetric_product(gram, step), step)
    assert product is not None
    upper = product.to(u.dtype)
    parts = torch.cat([upper, (product - upper.float()).to(u.dtype)], dim=2)
    return _product(parts, torch.cat([u, u], dim=1))


def _unit(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / (||x||_F + eps) of each matrix: [batch, rows, columns] in `dtype`, contiguous, wide side last."""
    from . import triton_kernels as kernels

    x = x.reshape(-1, *x.shape[-2:])
    x = x.mT if x.shape[1] > x.shape[2] else x
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    batch, rows, columns = x.shape
    config = kernels.squares_config()
    blocks = -(-rows // config.constants["BN"])
    sums = torch.empty((batch, blocks), dtype=torch.float64, device=x.device)
    _triton.launch(
        kernels.squares_kernel, (batch, blocks), x, x, sums, *x.stride(), rows, columns, config=config
    )
    config = kernels.unit_config(blocks)
    grid = (batch, -(-rows // config.constants["BN"]), -(-columns // config.constants["BM"]))
    _triton.launch(
        kernels.unit_kernel, grid, x,
        x, sums, out, *x.stride(), *out.stride()[:2], rows, columns, blocks, eps, config=config,
    )  # fmt: skip
    return out


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if x is None else x.stride()[:2]


def symmetric_product(
    left: Tensor,
    right: Tensor,
    base: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    diagonal: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """alpha left @ right^T + beta base + diagonal I [batch, N, N], where symmetric; in left's dtype by default."""
    from . import triton_kernels as kernels

    batch, rows, inner = left.shape
    out = torch.empty((batch, rows, rows), dtype=dtype or left.dtype, device=left.device)
    config = kernels.symmetric_config(rows, inner, left.dtype == torch.float32)
    tiles = -(-rows // config.constants["BN"])
    pairs = tiles * (tiles + 1) // 2
    _triton.launch(
        kernels.symmetric_kernel, (pairs * batch,), left,
        left, right, base, out, *_strides(left), *_strides(right), *_strides(base), *_strides(out),
        rows, inner, tiles, pairs, alpha, beta, diagonal,
        config=config._replace(constants={**config.constants, "HAS_BASE": base is not None}),
    )  # fmt: skip
    return out


def _product(left: Tensor, right: Tensor, base: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """left [batch, N, K] @ right [batch, K, M] + beta base."""
    from . import triton_kernels as kernels

    (batch, rows, inner), columns = left.shape, right.shape[2]
    out = torch.empty((batch, rows, columns), dtype=left.dtype, device=left.device)
    sides = rows * inner, inner * columns, rows * columns
    aligned = all(side * left.itemsize % _LIBRARY_ALIGNMENT == 0 for side in sides)
    if left.dtype == torch.bfloat16 and rows >= _LIBRARY_ROWS and aligned:
        for n in range(batch):
            if base is None:
                torch.mm(left[n], right[n], out=out[n])
            else:
                torch.addmm(base[n], left[n], right[n], beta=beta, out=out[n])
        return out
    config = kernels.product_config(rows, inner, columns, left.dtype == torch.float32)
    down, across = -(-rows // config.constants["BN"]), -(-columns // config.constants["BM"])
    _triton.launch(
        kernels.product_kernel, (down * across * batch,), left,
        left, right, base, out, *_strides(left), *_strides(right), *_strides(base), *_strides(out),
        rows, columns, inner, down, across, beta,
        config=config._replace(constants={**config.constants, "HAS_BASE": base is not None}),
    )  # fmt: skip
    return out
