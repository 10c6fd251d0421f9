"""Newton-Schulz against singular value decompositions in float64, torch's own Muon, and the minimax quintics."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from kimi_kernels import BackendError, newton_schulz
from kimi_kernels.muon import COEFFICIENTS, cpu, schulz_triples

SHAPES = [(64, 64), (3, 96, 192), (2, 2, 192, 96), (1, 300), (5, 1), (4, 33, 17), (2, 16, 200)]


def exact(x: Tensor, steps: int = 5, coefficients="moonlight", eps: float = 1e-7) -> Tensor:
    """The polynomials on the singular values, in float64."""
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / (s.square().sum(-1, keepdim=True).sqrt() + eps)
    for a, b, c in schulz_triples(coefficients, steps):
        s = a * s + b * s**3 + c * s**5
    return u @ (s[..., None] * vt)


def error(actual: Tensor, wanted: Tensor) -> float:
    return ((actual.double() - wanted).norm() / wanted.norm()).item()


@pytest.fixture(params=["cpu", "reference"])
def backend(request, monkeypatch) -> str:
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_is_the_polynomial_of_the_singular_values(backend, shape, coefficients):
    x = torch.randn(shape, dtype=torch.float64)
    # 2^-53, grown by the slopes of five polynomials: 1020 for polar_express at 0, more at a single value of 1.
    assert error(newton_schulz(x, coefficients=coefficients), exact(x, 5, coefficients)) < 1e-9


# Of Gaussian matrices: some tens of roundings, of 2^-24 and 2^-9 (measured: 2e-6 and up to 3.4e-2).
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 5e-6), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("shape", [s for s in SHAPES if min(s[-2:]) > 1])
def test_lower_precision_stays_near_float64(backend, shape, dtype, limit):
    x = torch.randn(shape)
    y = newton_schulz(x, dtype=dtype)
    assert y.dtype == torch.float32 and y.shape == x.shape and y.is_contiguous()
    assert error(y, exact(x)) < limit


@pytest.mark.parametrize("triple", [(1.5, -0.5, 0.0), (1.2, 0.0, -0.1), (0.0, 0.7, 0.2), (2.0, 0.0, 0.0)])
def test_zeros_among_the_coefficients(backend, triple, monkeypatch):
    x = torch.randn(20, 30, dtype=torch.float64)
    assert error(newton_schulz(x, 3, [triple]), exact(x, 3, [triple])) < 1e-12
    monkeypatch.setattr(cpu, "_GRAM_ASPECT", 1)
    assert error(newton_schulz(x, 3, [triple], dtype=torch.bfloat16), exact(x, 3, [triple])) < 5e-2


@pytest.mark.parametrize("shape", [(2, 70, 90), (1, 64, 64)])
def test_symmetric_products_by_strips(shape, monkeypatch):
    monkeypatch.setattr(cpu, "_STRIP", 16)
    x = torch.randn(shape, dtype=torch.float64)
    assert error(newton_schulz(x), exact(x)) < 1e-11
    monkeypatch.setattr(cpu, "_GRAM_ASPECT", 1)
    assert error(newton_schulz(x.float(), dtype=torch.bfloat16), exact(x.float())) < 4e-4


@pytest.mark.parametrize("decay", [1, 3, 6])
def test_fast_path_is_as_accurate_as_the_formula_on_hard_spectra(decay, monkeypatch):
    """Singular values down to 10^-decay of the largest; 64x512 takes the Gram form."""
    for rows, columns in [(64, 512), (64, 96)]:
        u, _ = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64))
        v, _ = torch.linalg.qr(torch.randn(columns, rows, dtype=torch.float64))
        x = ((u * torch.logspace(0, -decay, rows, dtype=torch.float64)) @ v.mT).float()
        fast = error(newton_schulz(x, dtype=torch.bfloat16), exact(x))
        monkeypatch.setenv("KIMI_KERNELS_BACKEND", "reference")
        plain = error(newton_schulz(x, dtype=torch.bfloat16), exact(x))
        monkeypatch.delenv("KIMI_KERNELS_BACKEND")
        assert fast <= 1.3 * plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 96, 192), (3, 64, 512), (2, 1024, 1024)])
def test_a_matrix_has_the_same_bits_alone_and_in_a_batch(shape, dtype):
    x = torch.randn(shape)
    batch = newton_schulz(x, dtype=dtype)
    for matrix, wanted in zip(x, batch):
        assert torch.equal(newton_schulz(matrix, dtype=dtype), wanted)


def test_anchors_of_the_classic_triple(backend):
    x = torch.randn(256, 128, dtype=torch.float64)
    values = torch.linalg.svdvals(newton_schulz(x))
    assert values.min() > 0.67 and values.max() < 1.15
    rms = newton_schulz(x).square().mean().sqrt().item() * 256**0.5
    assert rms == pytest.approx(0.877, abs=0.005)  # so an update of scale 0.2 has an RMS of 0.175, not 0.2


def test_direction_and_scale(backend):
    x = torch.randn(40, 24, dtype=torch.float64)
    y = newton_schulz(x, eps=0.0)
    torch.testing.assert_close(newton_schulz(1e8 * x, eps=0.0), y)
    torch.testing.assert_close(newton_schulz(1e-9 * x, eps=0.0), y)
    torch.testing.assert_close(newton_schulz(-x, eps=0.0), -y)
    torch.testing.assert_close(newton_schulz(x.mT, eps=0.0), y.mT)
    rotation, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    torch.testing.assert_close(newton_schulz(rotation @ x, eps=0.0), rotation @ y)


def test_more_steps_of_a_convergent_polynomial_reach_the_polar_factor(backend):
    x = torch.randn(30, 50, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    y = newton_schulz(x, 40, [(1.875, -1.25, 0.375)])
    torch.testing.assert_close(y, u @ vt, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_and_nans(backend, dtype):
    x = torch.randn(4, 6, 8)
    x[1] = 0
    x[2, 3, 4] = float("nan")
    y = newton_schulz(x, dtype=dtype)
    assert torch.equal(y[1], torch.zeros(6, 8))
    assert y[2].isnan().all()
    assert y[[0, 3]].isfinite().all()


def test_empty_batches_and_strided_inputs(backend):
    assert newton_schulz(torch.empty(0, 4, 6)).shape == (0, 4, 6)
    x = torch.randn(5, 8, 2, 12, dtype=torch.float64)[:, ::2, 1]
    torch.testing.assert_close(newton_schulz(x), newton_schulz(x.contiguous()))


def test_large_values_do_not_overflow(backend):
    x = torch.randn(300, 500)
    assert error(newton_schulz(1e15 * x), exact(x)) < 5e-6


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (64, 64)])
def test_torch_muon_takes_the_same_step(shape):
    """torch.optim.Muon, which nobody here wrote: same coefficients, bfloat16, its RMS matched to AdamW's."""
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    optimizer = torch.optim.Muon(
        [theirs], lr=0.1, weight_decay=0.1, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw"
    )
    theirs.grad = torch.randn(shape)
    update = newton_schulz(theirs.grad, dtype=torch.bfloat16) * 0.2 * max(shape) ** 0.5
    wanted = ours.detach() * (1 - 0.1 * 0.1) - 0.1 * update
    optimizer.step()
    # Both round to bfloat16 in every step, at different places.
    assert error(theirs.detach() - ours.detach(), (wanted - ours.detach()).double()) < 2e-2


def quintic_minimax(low: float, high: float) -> tuple[float, float, float]:
    """(a, b, c) of the odd quintic nearest to 1 on [low, high]: Remez exchange."""
    points = np.linspace(low, high, 4)
    for _ in range(60):
        system = np.column_stack([points, points**3, points**5, [1, -1, 1, -1]])
        a, b, c, _ = np.linalg.solve(system, np.ones(4))
        roots = np.roots([5 * c, 0, 3 * b, 0, a])
        inner = np.sort(roots.real[(abs(roots.imag) < 1e-12) & (roots.real > low) & (roots.real < high)])
        points = np.array([low, *inner, high])
    return a, b, c


def test_polar_express_triples_are_the_minimax_quintics():
    """Each step's best quintic for what the steps before made of [1e-3, 1], computed here (paper, algorithm 1).

    A step does not look below a "cushion" of 0.02407 times the top, and is rescaled to be centred on 1.
    """
    low, high = 1e-3, 1.0
    for published in COEFFICIENTS["polar_express"]:
        a, b, c = quintic_minimax(max(low, 0.02407327424182761 * high), high)
        bottom, top = (a * s + b * s**3 + c * s**5 for s in (low, high))
        rescale = 2 / (bottom + top)
        np.testing.assert_allclose(published, (rescale * a, rescale * b, rescale * c), rtol=1e-6)
        low, high = rescale * bottom, rescale * top


@pytest.mark.parametrize(
    "name, low, high", [("moonlight", 0.67, 1.21), ("you", 0.65, 1.35), ("polar_express", 0.7, 1.3)]
)
def test_tables_bring_singular_values_near_one(name, low, high):
    s = torch.linspace(0.01, 1, 10_000, dtype=torch.float64)
    for a, b, c in schulz_triples(name, 5):
        s = a * s + b * s**3 + c * s**5
    assert low < s.min() and s.max() < high


def test_triples():
    assert schulz_triples("moonlight", 7) == COEFFICIENTS["moonlight"] * 7
    assert schulz_triples("you", 3) == COEFFICIENTS["you"][:3]
    assert schulz_triples([[1, 2, 3]], 2) == ((1.0, 2.0, 3.0),) * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 8, 12), (12, 8)])
def test_opcheck(shape, dtype):
    flat = list(itertools.chain(*schulz_triples("you", 5)))
    torch.library.opcheck(torch.ops.kimi.newton_schulz.default, (torch.randn(shape), flat, 1e-7, dtype))


def test_traces_without_graph_breaks():
    x = torch.randn(8, 12)
    compiled = torch.compile(lambda t: newton_schulz(t).sin(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), newton_schulz(x).sin())


def test_errors_name_the_argument():
    x = torch.randn(4, 4)
    with pytest.raises(ValueError, match=r"x must be \[..., n, m\], got shape \(4,\)"):
        newton_schulz(x[0])
    with pytest.raises(ValueError, match=r"x must be bfloat16, float32 or float64, got torch.int64"):
        newton_schulz(x.long())
    with pytest.raises(ValueError, match=r"dtype must be bfloat16, float32 or float64, got torch.float16"):
        newton_schulz(x, dtype=torch.float16)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        newton_schulz(x, 0)
    with pytest.raises(
        ValueError, match=r"coefficients must be one of moonlight, you, polar_express or .* 'simple'"
    ):
        newton_schulz(x, coefficients="simple")
    with pytest.raises(ValueError, match="steps must be at most 5, the triples in coefficients, got 6"):
        newton_schulz(x, 6, "you")
    with pytest.raises(ValueError, match=r"coefficients\[1\] must be \(a, b, c\), got 2 numbers"):
        newton_schulz(x, 2, [(1, 2, 3), (1, 2)])
    with pytest.raises(ValueError, match="coefficients is empty"):
        newton_schulz(x, coefficients=[])
    with pytest.raises(ValueError, match="eps must not be negative, got -1"):
        newton_schulz(x, eps=-1)
    with pytest.raises(ValueError, match="eps must not be negative, got nan"):
        newton_schulz(x, eps=float("nan"))


def test_forced_triton_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "triton")
    with pytest.raises(BackendError, match="cannot run newton_schulz"):
        newton_schulz(torch.randn(4, 4))
