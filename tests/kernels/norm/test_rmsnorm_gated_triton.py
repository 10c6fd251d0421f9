"""The gated RMSNorm on Triton kernels, interpreted or on a GPU, against torch.nn.functional.rms_norm in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kimi_kernels import BackendError, _triton, rmsnorm_gated

pytest.importorskip("triton")
DEVICE = "cpu" if _triton.interpreting() else "cuda"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)

ACTIVATIONS = {"sigmoid": torch.sigmoid, "silu": F.silu}


@pytest.fixture(autouse=True)
def _forced(monkeypatch):
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "triton")


def norm(x, gate, weight, **options):
    return rmsnorm_gated(x.to(DEVICE), gate.to(DEVICE), weight.to(DEVICE), **options).cpu()


def oracle(x, gate, weight, activation="sigmoid", eps=1e-5):
    return F.rms_norm(x, (x.shape[-1],), weight, eps) * ACTIVATIONS[activation](gate)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 128), (2, 150, 3, 32), (7, 37), (0, 16), (1, 5), (5,), (2, 3, 2049)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_and_gradients_match_float64(dtype, shape, activation, accurate_with_gradients):
    x, gate = torch.randn(shape, dtype=dtype), 2 * torch.randn(shape).to(dtype)
    weight = torch.rand(shape[-1]).to(dtype)
    accurate_with_gradients(
        lambda *t: norm(*t, activation=activation),
        lambda *t: oracle(*t, activation=activation),
        [x, gate, weight],
    )


def test_saturated_gates_are_exact_limits():
    x, weight = torch.randn(2, 64), torch.rand(64)
    gate = torch.tensor([[1e4], [-1e4]]).expand(2, 64)
    y = norm(x, gate, weight)
    torch.testing.assert_close(y[0], F.rms_norm(x[0], (64,), weight, 1e-5))
    assert torch.equal(y[1], torch.zeros(64))


def test_dtypes_may_differ(accurate):
    x, gate, weight = torch.randn(9, 64).bfloat16(), torch.randn(9, 64), torch.rand(64)
    accurate("y", norm(x, gate, weight), oracle(x.double(), gate.double(), weight.double()))


def test_strided_inputs_and_expanded_gradients(accurate_with_gradients):
    wide, weight = torch.randn(6, 5, 4, 32), torch.rand(32)
    accurate_with_gradients(
        lambda t, w: norm(t[:, :, 1], t[:, :, 3].flip(0), w),
        lambda t, w: oracle(t[:, :, 1], t[:, :, 3].flip(0), w),
        [wide, weight],
    )
    x = torch.randn(4, 32, requires_grad=True)
    norm(x, x, weight).sum().backward()  # the gradient of sum() has stride 0
    exact = x.detach().double().requires_grad_()
    oracle(exact, exact, weight.double()).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_a_slice_of_a_projection_is_not_copied(monkeypatch):
    """Heads of a wider row, as a layer has them, reach the kernel where they lie."""
    seen = []
    launch = _triton.launch
    monkeypatch.setattr(_triton, "launch", lambda kernel, grid, like, x, *rest, **o: (
        seen.append(x.data_ptr()), launch(kernel, grid, like, x, *rest, **o)))  # fmt: skip
    row = torch.randn(5, 3 * 64, device=DEVICE)
    x = row[:, 64:].view(5, 2, 64)
    rmsnorm_gated(x, x, torch.rand(64, device=DEVICE))
    assert seen == [x.data_ptr()]


def test_a_row_has_the_same_bits_in_any_batch():
    x, gate, weight = torch.randn(40, 100).bfloat16(), torch.randn(40, 100).bfloat16(), torch.rand(100)
    whole = norm(x, gate, weight)
    for n in (0, 17, 39):
        assert torch.equal(norm(x[n : n + 1], gate[n : n + 1], weight), whole[n : n + 1])


def test_nan_stays_in_its_row():
    x = torch.randn(20, 24)
    x[7, 3] = float("nan")
    y = norm(x, torch.randn(20, 24), torch.rand(24))
    assert y.isnan().any(1).nonzero().flatten().tolist() == [7] and y[7].isnan().all()


@pytest.mark.slow
def test_opcheck():
    x, gate = (torch.randn(3, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    weight = torch.rand(8, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.kimi.rmsnorm_gated.default, (x, gate, weight, 1e-5, True))


@pytest.mark.slow
def test_compiles_as_one_graph():
    compiled = torch.compile(lambda *t: rmsnorm_gated(*t).sin(), fullgraph=True, backend="aot_eager")
    x, gate = torch.randn(4, 16, device=DEVICE, requires_grad=True), torch.randn(4, 16, device=DEVICE)
    weight = torch.rand(16, device=DEVICE)
    (grad,) = torch.autograd.grad(compiled(x, gate, weight).sum(), x)
    (expected,) = torch.autograd.grad(rmsnorm_gated(x, gate, weight).sin().sum(), x)
    assert torch.equal(grad, expected)


def test_bad_input_never_reaches_a_kernel(monkeypatch):
    monkeypatch.setattr(_triton, "launch", lambda *_, **__: pytest.fail("launched"))
    with pytest.raises(ValueError, match=r"gate must have the shape of x \(2, 8\), got \(2, 7\)"):
        norm(torch.randn(2, 8), torch.randn(2, 7), torch.rand(8))


def test_what_it_cannot_run_is_said():
    x = torch.randn(2, 8)
    with pytest.raises(BackendError, match="cannot run rmsnorm_gated: computes in float32, got float64 for weight"):
        norm(x, x, torch.rand(8, dtype=torch.float64))
    x = torch.randn(1, 8193)
    with pytest.raises(BackendError, match="takes rows of up to 8192, got 8193"):
        norm(x, x, x[0])
