"""KDA's backward in Triton, interpreted or on a GPU, against autograd through equation 1 in float64.

Tolerances: 2e-6 in float32, as for the forward in test_kda_triton. 8e-3 in bfloat16, where the forward has 5e-3: a
gradient comes from results of the forward that are rounded, and is rounded again. Twice that for beta's, a single sum
of products of two such results whose signs are random.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from kimi_kernels import _triton, chunk_kda, fused_recurrent_kda
from kimi_kernels.kda import ops

pytest.importorskip("triton")
DEVICE = "cpu" if _triton.interpreting() else "cuda"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)

ERROR = {torch.float32: 2e-6 if _triton.interpreting() else 1e-4, torch.bfloat16: 8e-3}
IN_KERNEL = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
NAMES = ("q", "k", "v", "g", "beta")


@pytest.fixture(autouse=True)
def _forced(backend):
    backend("triton")


def gradients(rule, inputs, more, weights, options, dtype=None):
    """Of the outputs and final states times `weights`, for all inputs and tensors in `more`."""
    device = DEVICE if dtype is None else "cpu"
    tensors = {**dict(zip(NAMES, inputs)), **more}
    leaves = {name: x.detach().to(device, dtype or x.dtype).requires_grad_() for name, x in tensors.items()}
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    outputs = rule(**leaves, output_final_state=True, **options)
    weights = [w.to(device, y.dtype) for w, y in zip(weights, outputs)]
    return dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), weights)))


def upstream(inputs, more, options):
    """Random gradients of the outputs and the final states."""
    q, v = inputs[0], inputs[2]
    offsets = options.get("cu_seqlens")
    count = len(q) if offsets is None else len(offsets) - 1
    sizes = (v.shape[3], q.shape[3]) if options.get("state_v_first") else (q.shape[3], v.shape[3])
    return torch.randn(v.shape).to(v.dtype), torch.randn(count, v.shape[2], *sizes)


def relative(actual, exact):
    return ((actual.cpu().double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def check(oracle, inputs, more=None, rule=chunk_kda, limit=None, **options):
    more = more or {}
    weights = upstream(inputs, more, options)
    found = gradients(rule, inputs, more, weights, options)
    exact = gradients(oracle, inputs, more, weights, options, torch.float64)
    for name, wanted in exact.items():
        assert found[name].dtype == {**dict(zip(NAMES, inputs)), **more}[name].dtype
        error = relative(found[name], wanted)
        most = limit or ERROR[inputs[2].dtype] * (2 if name == "beta" else 1)
        assert error <= most, f"gradient of {name}: error {error:.1e}"
    return found


@pytest.mark.parametrize("dtype, tokens", [(torch.float32, 1), (torch.float32, 35), (torch.bfloat16, 100)])
def test_plain(make, oracle, dtype, tokens):
    inputs = make(2, tokens, 1, 1, 32, 48, dtype=dtype)
    check(oracle, inputs, {"initial_state": torch.randn(2, 1, 32, 48)})


def test_of_the_recurrence(make, oracle):
    check(oracle, make(1, 18, 1, 2, 16, 16), rule=fused_recurrent_kda)


@pytest.mark.slow
@pytest.mark.parametrize("K, V", [(64, 64), (72, 40), (128, 128), (256, 64), (64, 256), (5, 7)])
def test_head_sizes(make, oracle, K, V):
    inputs = make(1, 66, 1, 1, K, V, dtype=torch.bfloat16)
    check(oracle, inputs, {"initial_state": torch.randn(1, 1, K, V)})


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_everything_in_the_kernel(oracle, lower_bound, dtype):
    """Both gates, grouped value heads, packed sequences of no, one and several tokens."""
    T = 20 if dtype == torch.float32 else 70
    q, k = torch.randn(2, 1, T, 1, 32).to(dtype)
    v, g, beta = (torch.randn(1, T, 2, *s).to(dtype) for s in ([48], [32], []))
    more = {"initial_state": torch.randn(4, 2, 48, 32), "A_log": torch.randn(2), "dt_bias": torch.randn(64)}
    options = dict(IN_KERNEL, lower_bound=lower_bound, scale=0.3, allow_neg_eigval=True, state_v_first=True)
    check(oracle, [q, k, v, g, beta], more, **options, cu_seqlens=torch.tensor([0, 1, 1, T - 2, T]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 5.0, 40.0, 1e4])
def test_decay_of_every_size(make, oracle, dtype, decay):
    """None, saturated and unbounded: nothing has to cancel in the gradient of g, so it is as exact as the others.

    Where a channel forgets at once its gradient is zero, to float64 as well.
    """
    q, k, v, g, beta = make(1, 30 if dtype == torch.float32 else 70, 1, 1, 16, 16, dtype=dtype)
    g = torch.full_like(g, -decay)
    if decay > 5:
        g = torch.where(torch.rand(g.shape) < 0.3, g, -torch.rand(g.shape).to(dtype))
    check(oracle, [q, k, v, g, beta])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slow_decay_with_repeated_keys(make, oracle, dtype):
    """What is written is nearly all erased again: bfloat16 operands cost more, as in the forward."""
    q, k, v, g, beta = make(1, 32 if dtype == torch.float32 else 70, 1, 1, 32, 32)
    k = F.normalize(k[:, :1] + 0.05 * k, dim=-1)
    inputs = [x.to(dtype) for x in (q, k, v, torch.full_like(g, -1e-3), torch.full_like(beta, 0.999))]
    check(oracle, inputs, limit=0.04 if dtype == torch.bfloat16 else None)


def test_packed_sequences_are_each_alone(make):
    """To the bit: what else is in the batch changes no gradient."""
    offsets = [0, 0, 1, 66, 90]
    inputs, states = make(1, 90, 1, 2, 16, 16, dtype=torch.bfloat16), torch.randn(4, 2, 16, 16)
    options = {"cu_seqlens": torch.tensor(offsets)}
    d_out, d_final = upstream(inputs, {}, options)
    packed = gradients(chunk_kda, inputs, {"initial_state": states}, (d_out, d_final), options)
    for n, (a, b) in enumerate(pairwise(offsets)):
        alone = gradients(
            chunk_kda, [x[:, a:b] for x in inputs], {"initial_state": states[n : n + 1]},
            (d_out[:, a:b], d_final[n : n + 1]), {},
        )  # fmt: skip
        for name in NAMES:
            assert torch.equal(alone[name], packed[name][:, a:b])
        assert torch.equal(alone["initial_state"][0], packed["initial_state"][n])


def test_beta_of_zero_and_strided_inputs(make, oracle):
    """Nothing is divided by beta; gradients that autograd expands arrive as well."""
    q, k, v, g, beta = make(1, 20, 1, 1, 16, 16)
    beta[:, ::2] = 0.0
    turned = [x.transpose(1, -1).contiguous().transpose(1, -1) for x in (q, k, v, g, beta)]
    check(oracle, turned)
    leaf = v.to(DEVICE).requires_grad_()
    chunk_kda(*(x.to(DEVICE) for x in (q, k)), leaf, *(x.to(DEVICE) for x in (g, beta)))[0].sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_no_tokens(make):
    inputs = make(1, 0, 1, 1, 16, 16)
    state = torch.randn(1, 1, 16, 16)
    weights = upstream(inputs, {}, {})
    found = gradients(chunk_kda, inputs, {"initial_state": state}, weights, {})
    assert torch.equal(found["initial_state"].cpu(), weights[1]), "the state passes through"


@pytest.mark.slow
def test_opcheck(make):
    inputs = [x.to(DEVICE).requires_grad_() for x in make(1, 5, 1, 2, 16, 16)]
    more = [torch.randn(*s, device=DEVICE, requires_grad=True) for s in ([2, 2, 16, 16], [2], [32])]
    offsets = torch.tensor([0, 3, 5], device=DEVICE)
    torch.library.opcheck(
        ops.chunk.default, (*inputs, *more, offsets, 0.3, True, True, True, False, -5.0, True)
    )


@pytest.mark.slow
def test_compiles_as_one_graph(make):
    inputs = [x.to(DEVICE).requires_grad_() for x in make(1, 5, 1, 1, 16, 16)]

    def loss(*x):
        out, final = chunk_kda(*x, output_final_state=True)
        return out.square().sum() + final.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs)
    ):
        assert torch.equal(actual, wanted)
