"""Gated RMSNorm against torch.nn.functional.rms_norm in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kimi_kernels import BackendError, rmsnorm_gated

ACTIVATIONS = {"sigmoid": torch.sigmoid, "silu": F.silu}


def oracle(x, gate, weight, activation="sigmoid", eps=1e-5):
    return F.rms_norm(x, (x.shape[-1],), weight, eps) * ACTIVATIONS[activation](gate)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 128), (2, 300, 5, 32), (7, 37), (0, 16), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_and_gradients_match_float64(isa, dtype, shape, activation, accurate_with_gradients):
    x, gate = torch.randn(shape, dtype=dtype), 2 * torch.randn(shape).to(dtype)
    weight = torch.rand(shape[-1]).to(dtype)
    accurate_with_gradients(
        lambda *t: rmsnorm_gated(*t, activation=activation),
        lambda *t: oracle(*t, activation=activation),
        [x, gate, weight],
    )


def test_saturated_gates_are_exact_limits(isa):
    x, weight = torch.randn(2, 64), torch.rand(64)
    gate = torch.tensor([[1e4], [-1e4]]).expand(2, 64)
    y = rmsnorm_gated(x, gate, weight)
    torch.testing.assert_close(y[0], F.rms_norm(x[0], (64,), weight, 1e-5))
    assert torch.equal(y[1], torch.zeros(64))


def test_weight_may_be_float32_beside_bfloat16(native, accurate):
    x, gate, weight = torch.randn(9, 64).bfloat16(), torch.randn(9, 64).bfloat16(), torch.rand(64)
    accurate("y", rmsnorm_gated(x, gate, weight), oracle(x.double(), gate.double(), weight.double()))


def test_strided_inputs_and_expanded_gradients(native, accurate_with_gradients):
    wide = torch.randn(6, 5, 4, 32)
    weight = torch.rand(32)
    accurate_with_gradients(
        lambda t, w: rmsnorm_gated(t[:, :, 1], t[:, :, 3].flip(0), w),
        lambda t, w: oracle(t[:, :, 1], t[:, :, 3].flip(0), w),
        [wide, weight],
    )
    x = torch.randn(4, 32, requires_grad=True)
    rmsnorm_gated(x, x, weight).sum().backward()  # the gradient of sum() has stride 0
    exact = x.detach().double().requires_grad_()
    oracle(exact, exact, weight.double()).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_in_float64(activation):
    inputs = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: rmsnorm_gated(*t, activation=activation), (*inputs, weight))


def test_gradients_do_not_depend_on_the_number_of_threads(native):
    x, gate = torch.randn(2000, 64), torch.randn(2000, 64)
    weight = torch.rand(64, requires_grad=True)
    before = torch.get_num_threads()
    grads = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            grads += torch.autograd.grad(rmsnorm_gated(x, gate, weight).square().sum(), weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(native, dtype):
    x, gate = (torch.randn(3, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.rand(8, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.kimi.rmsnorm_gated.default, (x, gate, weight, 1e-5, True))


def test_traces_without_graph_breaks(native):
    compiled = torch.compile(lambda *t: rmsnorm_gated(*t).sin(), fullgraph=True, backend="aot_eager")
    x, gate = torch.randn(4, 16, requires_grad=True), torch.randn(4, 16)
    weight = torch.rand(16)
    (grad,) = torch.autograd.grad(compiled(x, gate, weight).sum(), x)
    (expected,) = torch.autograd.grad(rmsnorm_gated(x, gate, weight).sin().sum(), x)
    assert torch.equal(grad, expected)


def test_errors_name_the_argument():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"gate must have the shape of x \(2, 8\), got \(2, 7\)"):
        rmsnorm_gated(x, torch.randn(2, 7), torch.rand(8))
    with pytest.raises(ValueError, match=r"weight must have shape \(8,\), got \(7,\)"):
        rmsnorm_gated(x, x, torch.rand(7))
    with pytest.raises(ValueError, match="activation must be 'sigmoid' or 'silu', got 'relu'"):
        rmsnorm_gated(x, x, torch.rand(8), activation="relu")


def test_forced_native_backend_refuses_float64(native, monkeypatch):
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "cpu")
    x = torch.randn(2, 8, dtype=torch.float64)
    with pytest.raises(BackendError, match=r"cannot run rmsnorm_gated: .*got torch.float64"):
        rmsnorm_gated(x, x, torch.rand(8))
