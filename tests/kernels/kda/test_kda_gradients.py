"""Gradients of KDA against autograd through equation 1 in float64."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from kimi_kernels import chunk_kda, fused_recurrent_kda, kda_gate
from kimi_kernels.kda import reference

IN_KERNEL = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


def with_state(rule, options, names):
    """A function of tensors only: q, k, v, g, beta, then the named ones."""

    def call(*tensors):
        rest = dict(zip(names, tensors[5:]))
        return rule(*tensors[:5], output_final_state=True, **rest, **options)

    return call


@pytest.mark.parametrize(
    "T, H, HV, K, V", [(1, 1, 1, 32, 32), (16, 1, 1, 64, 64), (50, 2, 4, 24, 40), (33, 1, 2, 128, 128)]
)
@pytest.mark.parametrize("rule", [chunk_kda, fused_recurrent_kda])
def test_plain(isa, backend, make, oracle, accurate_with_gradients, rule, T, H, HV, K, V):
    backend("cpu")
    inputs = [*make(2, T, H, HV, K, V, decay=2.0), torch.randn(2, HV, K, V)]
    pair = (with_state(f, {}, ["initial_state"]) for f in (rule, oracle))
    accurate_with_gradients(*pair, inputs)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("allow_neg_eigval", [False, True])
def test_through_norm_gate_and_sigmoid(
    isa, backend, oracle, accurate_with_gradients, lower_bound, dtype, allow_neg_eigval
):
    backend("cpu")
    q, k = torch.randn(2, 1, 40, 2, 32).to(dtype)
    v, g, beta = (torch.randn(1, 40, 4, *s).to(dtype) for s in ([48], [32], []))
    offsets = torch.tensor([0, 5, 5, 39, 40])
    inputs = [q, k, v, g, beta, torch.randn(4, 4, 48, 32), torch.randn(4), torch.randn(4 * 32)]
    options = dict(IN_KERNEL, lower_bound=lower_bound, state_v_first=True, cu_seqlens=offsets, scale=0.3)
    options["allow_neg_eigval"] = allow_neg_eigval
    names = ["initial_state", "A_log", "dt_bias"]
    pair = (with_state(f, options, names) for f in (chunk_kda, oracle))
    accurate_with_gradients(*pair, inputs)


@pytest.mark.parametrize("scale", [5.0, 110.0])
def test_where_decay_is_extreme(isa, backend, make, oracle, accurate_with_gradients, scale):
    """Terms without decay cancel in the gradient of g: what is left must still be accurate."""
    backend("cpu")
    q, k, v, g, beta = make(1, 40, 1, 1, 32, 32)
    g = torch.where(torch.rand_like(g) < 0.5, torch.full_like(g, -scale), g)
    accurate_with_gradients(with_state(chunk_kda, {}, []), with_state(oracle, {}, []), [q, k, v, g, beta])


def test_repeated_keys(isa, backend, make, oracle, accurate_with_gradients):
    backend("cpu")
    q, k, v, g, beta = make(1, 64, 1, 1, 32, 32, decay=1e-3)
    k = F.normalize(k[:, :1] + 0.1 * k, dim=-1)
    inputs = [q, k, v, g, 0.9 + 0.1 * beta]
    accurate_with_gradients(with_state(chunk_kda, {}, []), with_state(oracle, {}, []), inputs)


def test_only_some_inputs_need_gradients(native, backend, make):
    """An expanded (stride 0) gradient arrives as well."""
    backend("cpu")
    q, k, v, g, beta = make(1, 20, 1, 1, 16, 16)
    v.requires_grad_()
    chunk_kda(q, k, v, g, beta)[0].sum().backward()
    assert v.grad is not None and q.grad is None


@pytest.mark.parametrize("core", ["chunk_kda", "fused_recurrent_kda"])
@pytest.mark.parametrize("lower_bound", [None, -3.0])
def test_finite_differences_of_the_reference(core, lower_bound):
    q, k = torch.randn(2, 1, 5, 1, 3, dtype=torch.float64)
    v, g, beta = (torch.randn(1, 5, 2, *s, dtype=torch.float64) for s in ([2], [3], []))
    state = torch.randn(1, 2, 3, 2, dtype=torch.float64)
    A_log, dt_bias = torch.randn(2, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    options = reference.Options(0.7, True, True, True, True, lower_bound, False)
    function = getattr(reference, core)
    tensors = [x.requires_grad_() for x in (q, k, v, g, beta, state, A_log, dt_bias)]
    assert torch.autograd.gradcheck(lambda *x: function(*x, None, options), tensors)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate(isa, accurate_with_gradients, lower_bound, with_bias, dtype):
    def exact(g, A_log, dt_bias):
        z = g if dt_bias is None else g + dt_bias.view(4, 24)
        rate = A_log.exp()[:, None]
        return (
            -rate * F.softplus(z, threshold=50) if lower_bound is None else lower_bound * (rate * z).sigmoid()
        )

    g = 10 * torch.randn(3, 5, 4, 24).to(dtype)
    dt_bias = torch.randn(4 * 24) if with_bias else None
    accurate_with_gradients(
        functools.partial(kda_gate, lower_bound=lower_bound), exact, [g, torch.randn(4), dt_bias]
    )
