"""fla-core's own KDA test cases on our functions, its kernels as the peer on the same inputs.

The cases are those of tests/ops/test_kda.py at bc3b101 of fla-org/flash-linear-attention: its inputs, gates, layouts
and options, in its order. What an interpreter cannot afford is scaled: batches to at most 2, heads to 2, packed value
heads to 4, lengths to some 100 tokens with the same remainder of a chunk's 64; 8 to 70 where their kernel goes token by
token (gates without a bound, and the recurrence).

Both are compared with equation 1 in float64, and ours may err as much as theirs: 5 % more is the scatter of the
comparison itself, in float32 a part in a million. It is 25 % in half precision for gradients to which few roundings
contribute most: those of g and of the initial state where all but some channels are forgotten at once, of beta, and of
the gate's bias; and for final states of doubled betas, whose rounding ours sees twice. Over all cases the mean ratio of
each of them is 0.55 to 0.9. A_log has one number a head, whose ratio means nothing: many heads are compared together in
`test_gate_gradients_of_many_heads`, where none of these gradients needs more than 5 %.
"""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

from kimi_kernels import _triton, chunk_kda, fused_recurrent_kda, kda_gate

pytest.importorskip("triton")
pytest.importorskip("fla")
DEVICE = "cpu" if _triton.interpreting() else "cuda"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
    ),
]

MARGIN, FEW_ROUNDINGS, FLOOR = 1.05, 1.25, 1e-6
# fla-core's limits on the error of each result; a gate's gradients are its own.
LIMITS = {"o": 0.005, "ht": 0.005, "g": 0.02, "beta": 0.02, "A_log": 0.02}
OTHER_LIMIT = 0.008
f16, f32, bf16 = torch.float16, torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _forced(backend):
    backend("triton")


def run(rule, inputs, options, weights=None, dtype=None):
    """o, ht and, with weights of those two, the gradients of all inputs; by name, on the CPU."""
    device = "cpu" if dtype else DEVICE
    leaves = {name: x.detach().to(device, dtype or x.dtype) for name, x in inputs.items()}
    if weights:
        leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    known = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    o, ht = rule(**leaves, output_final_state=True, **known)
    found = {"o": o, "ht": ht}
    if weights:
        given = [w.to(device, y.dtype) for w, y in zip(weights, (o, ht))]
        found |= zip(leaves, torch.autograd.grad((o, ht), list(leaves.values()), given))
    return {name: x.detach().cpu() for name, x in found.items()}


def compare(oracle, ours, theirs, inputs, options, more=None, backward=True, pooled=False):
    """`more`: options of theirs that ours does not have. `pooled`: many heads, so that no result needs more room."""
    weights = None
    if backward:
        weights = torch.randn_like(inputs["v"]), torch.randn_like(inputs["initial_state"])
    exact = run(oracle, inputs, options, weights, torch.float64)
    peer = run(theirs, inputs, {**options, **(more or {})}, weights)
    roomy = {"ht"} if options.get("allow_neg_eigval") else set()
    if inputs["v"].dtype != f32 and not pooled:
        roomy |= {"g", "beta", "initial_state", "dt_bias"}
    worse = []
    for name, x in run(ours, inputs, options, weights).items():
        mine, other = (((y.double() - exact[name]).norm() / exact[name].norm()).item() for y in (x, peer[name]))
        above = mine > (FEW_ROUNDINGS if name in roomy else MARGIN) * other + FLOOR
        if (above and (pooled or name != "A_log")) or mine > LIMITS.get(name, OTHER_LIMIT):
            worse.append(f"{name}: error {mine:.2e}, fla-core's {other:.2e}")
    assert not worse, worse


def bounded(safe):
    return {"lower_bound": -5.0 if safe else None}


def dense(B, T, H, HV, D, dtype, normalizer=1.0, mask_p=0.0, gate=False, safe=False, l2norm=False, state=True):
    """Inputs of their tests on equal lengths: positive, hence correlated, queries and keys."""
    q, k = (torch.rand(B, T, H, D).to(dtype) for _ in range(2))
    if not l2norm:
        q, k = (F.normalize(x.float(), dim=-1).to(dtype) for x in (q, k))
    g = torch.randn(B, T, HV, D)
    if not gate:
        g = F.logsigmoid(g) / normalizer * (torch.rand(g.shape) > mask_p)
        g = g.clamp(-5, 0) if safe else g
    inputs = {"q": q, "k": k, "v": torch.rand(B, T, HV, D).to(dtype), "g": g.to(dtype if gate else f32)}
    inputs["beta"] = torch.randn(B, T, HV).sigmoid().to(dtype)
    inputs["initial_state"] = torch.randn(B, HV, D, D)
    return inputs


@pytest.mark.parametrize(
    "B, T, H, HV, D, scale, l2norm",
    [
        (1, 64, 1, 1, 64, 1, False),
        (2, 20, 2, 2, 60, 1, False),
        (2, 8, 2, 2, 100, 0.1, True),
        (2, 8, 2, 2, 128, 0.1, False),
        (2, 20, 1, 2, 60, 1, False),
        (2, 8, 1, 4, 128, 0.1, True),
    ],
)
def test_fused_recurrent(oracle, fla_kda, B, T, H, HV, D, scale, l2norm):
    options = {"scale": scale, "use_qk_l2norm_in_kernel": l2norm}
    inputs = dense(B, T, H, HV, D, f32, l2norm=l2norm)
    compare(oracle, fused_recurrent_kda, fla_kda.fused_recurrent_kda, inputs, options, backward=False)


@pytest.mark.parametrize("T, D, doubled", [(32, 64, False), (32, 64, True), (40, 60, True)])
def test_fused_recurrent_beta_sigmoid(oracle, fla_kda, T, D, doubled):
    inputs = dense(1, T, 2, 2, D, f32)
    inputs["beta"] = torch.randn(inputs["beta"].shape)
    options = {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": doubled}
    compare(oracle, fused_recurrent_kda, fla_kda.fused_recurrent_kda, inputs, options, backward=False)


@pytest.mark.parametrize("T, D, scale", [(64, 64, 1), (36, 60, 1), (24, 100, 0.1), (24, 128, 0.1)])
def test_fused_recurrent_state_v_first(oracle, fla_kda, T, D, scale):
    options = {"scale": scale, "state_v_first": True}
    inputs = dense(1, T, 2 if D < 100 else 1, 2, D, f32)
    compare(oracle, fused_recurrent_kda, fla_kda.fused_recurrent_kda, inputs, options, backward=False)


@pytest.mark.parametrize(
    "T, H, HV, D, scale, rate, bias, safe, dtype",
    [
        (64, 1, 1, 64, 1, True, False, False, f32),
        (32, 2, 2, 64, 1, True, True, False, f32),
        (40, 1, 2, 64, 0.1, True, True, True, f16),
        (16, 1, 4, 128, 1, True, False, False, f16),
        (20, 2, 2, 128, 0.1, True, True, True, f16),
        (64, 1, 1, 64, 1, False, False, True, f32),
        (32, 1, 2, 64, 1, False, True, True, f32),
    ],
)
def test_fused_recurrent_gate(oracle, fla_kda, T, H, HV, D, scale, rate, bias, safe, dtype):
    inputs = dense(1, T, H, HV, D, dtype, gate=True, l2norm=True)
    inputs["g"] = inputs["g"].float()
    if rate:
        inputs["A_log"] = torch.empty(HV).uniform_(1, 16).log()
    if bias:
        inputs["dt_bias"] = torch.randn(HV * D)
    options = {"scale": scale, "use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, **bounded(safe)}
    compare(oracle, fused_recurrent_kda, fla_kda.fused_recurrent_kda, inputs, options, backward=False)


@pytest.mark.parametrize(
    "B, H, D, scale, normalizer, l2norm, gate, safe, dtype",
    [
        (6, 2, 128, 0.1, 1.0, True, False, False, bf16),
        (8, 2, 64, 1.0, 1.0, False, False, False, f16),
        (7, 2, 128, 0.5, 0.5, True, False, False, bf16),
        (6, 2, 128, 0.1, 1.0, True, True, False, bf16),
        (8, 2, 64, 1.0, 1.0, False, True, False, f16),
        (7, 2, 128, 0.5, 0.5, True, True, True, bf16),
    ],
)
def test_one_token_each(oracle, fla_kda, B, H, D, scale, normalizer, l2norm, gate, safe, dtype):
    """Their continuous batching: one token of each of B sequences, whose states come from anywhere in a pool."""
    inputs = dense(1, B, H, H, D, dtype, normalizer, gate=gate, l2norm=l2norm)
    pool = torch.randn(3 * B, H, D, D)
    inputs["initial_state"] = pool[torch.randperm(3 * B)[:B]]
    options = {"scale": scale, "use_qk_l2norm_in_kernel": l2norm, "cu_seqlens": torch.arange(B + 1)}
    if gate:
        inputs |= {"A_log": torch.empty(H).uniform_(1, 16).log(), "dt_bias": torch.randn(H * D)}
        options |= {"use_gate_in_kernel": True, **bounded(safe)}
    compare(oracle, fused_recurrent_kda, fla_kda.fused_recurrent_kda, inputs, options, backward=False)


@pytest.mark.parametrize(
    "B, T, H, HV, D, scale, normalizer, mask_p, l2norm, gate, dtype, safe, chunk",
    [
        (1, 63, 1, 1, 64, 1, 1, 0, False, False, f16, True, 64),
        (2, 116, 1, 1, 60, 1, 1, 0, False, False, f16, True, 64),
        (1, 20, 2, 2, 64, 0.1, 1, 0.5, False, False, f16, False, 64),
        (1, 32, 1, 1, 100, 1, 0.1, 0, False, False, f16, False, 64),
        (1, 128, 1, 1, 128, 0.1, 1, 0, False, False, f16, True, 64),
        (1, 128, 1, 1, 128, 0.1, 1, 0, True, False, f16, True, 64),
        (1, 28, 1, 1, 128, 0.1, 10, 0, False, True, f16, False, 64),
        (1, 128, 2, 2, 64, 0.1, 1, 0, False, True, f16, True, 64),
        (1, 32, 1, 2, 64, 0.1, 1, 0, False, False, f16, False, 64),
        (1, 16, 1, 4, 64, 0.1, 1, 0, False, True, f16, False, 64),
        (1, 16, 1, 2, 128, 0.1, 1, 0, True, True, f16, False, 64),
        (1, 96, 1, 2, 64, 0.1, 1, 0, False, True, f16, True, 32),
        (1, 128, 1, 2, 64, 0.1, 1, 0, True, True, bf16, True, 64),
        (1, 32, 1, 2, 64, 0.1, 1, 0, False, True, bf16, False, 64),
        (1, 96, 1, 2, 64, 0.1, 1, 0, False, True, bf16, True, 32),
        (1, 12, 1, 4, 128, 0.1, 1, 0, True, True, bf16, False, 64),
    ],
)
def test_chunk(oracle, fla_kda, B, T, H, HV, D, scale, normalizer, mask_p, l2norm, gate, dtype, safe, chunk):
    inputs = dense(B, T, H, HV, D, dtype, normalizer, mask_p, gate, safe, l2norm)
    options = {"scale": scale, "use_qk_l2norm_in_kernel": l2norm}
    if gate:
        inputs |= {"A_log": torch.randn(HV), "dt_bias": torch.randn(HV * D)}
        options |= {"use_gate_in_kernel": True, **bounded(safe)}
    more = {"safe_gate": safe, "chunk_size": chunk, **({} if gate else bounded(safe))}
    compare(oracle, chunk_kda, fla_kda.chunk_kda, inputs, options, more)


@pytest.mark.parametrize("T, safe, dtype", [(48, True, bf16), (8, False, f16)])
def test_gate_gradients_of_many_heads(oracle, fla_kda, T, safe, dtype):
    """Ours: few numbers of each head say little about whose kernel is more exact."""
    inputs = dense(1, T, 4, 16, 16, dtype, gate=True, safe=safe, l2norm=True)
    inputs |= {"A_log": torch.randn(16), "dt_bias": torch.randn(16 * 16)}
    options = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, **bounded(safe)}
    compare(oracle, chunk_kda, fla_kda.chunk_kda, inputs, options, {"safe_gate": safe}, pooled=True)


@pytest.mark.parametrize("T, D, scale", [(63, 64, 1), (52, 60, 1), (32, 128, 0.1), (64, 64, 0.1)])
def test_chunk_state_v_first(oracle, fla_kda, T, D, scale):
    options = {"scale": scale, "state_v_first": True}
    compare(oracle, chunk_kda, fla_kda.chunk_kda, dense(1, T, 1, 1, D, f16), options)


@pytest.mark.parametrize("T, D, doubled, dtype", [(64, 128, False, bf16), (64, 128, True, bf16), (96, 64, True, f16)])
def test_chunk_beta_sigmoid(oracle, fla_kda, T, D, doubled, dtype):
    inputs = dense(1, T, 1, 1, D, dtype, safe=True)
    inputs["beta"] = torch.randn(inputs["beta"].shape).to(dtype)
    options = {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": doubled}
    more = {"safe_gate": True, "lower_bound": -5.0}
    compare(oracle, chunk_kda, fla_kda.chunk_kda, inputs, options, more)


def packed(offsets, D, mask_p, gate, safe):
    """Inputs of their packed tests, in half precision: some gates at -1000, which forgets everything or nothing."""
    T, N, H = offsets[-1], len(offsets) - 1, 1
    q, k = (F.normalize(torch.randn(1, T, H, D), dim=-1).half() for _ in range(2))
    g = torch.randn(1, T, H, D)
    if not gate:
        g = F.logsigmoid(g) * (torch.rand(g.shape) > mask_p)
    g = torch.where(torch.rand(g.shape) > mask_p, g, -1000.0)
    g = g.clamp(-5, 0) if safe else g
    inputs = {"q": q, "k": k, "v": torch.randn(1, T, H, D).half(), "g": g.half() if gate else g}
    inputs["beta"] = torch.rand(1, T, H).sigmoid().half()
    inputs["initial_state"] = torch.randn(N, H, D, D)
    options = {"cu_seqlens": torch.tensor(offsets)}
    if gate:
        inputs |= {"A_log": torch.empty(H).uniform_(1, 16).log(), "dt_bias": torch.randn(H * D)}
        options |= {"use_gate_in_kernel": True}
    return inputs, options


@pytest.mark.parametrize(
    "D, mask_p, offsets, gate, safe, chunk, backward",
    [
        (60, 0.1, [0, 15], True, False, 64, True),
        (64, 0.9, [0, 32, 63, 70], True, False, 64, True),
        (128, 0.5, [0, 20, 35, 42], False, False, 64, True),
        (100, 0, [0, 15, 27, 40], True, False, 64, True),
        (256, 0, [0, 36, 80], False, True, 64, True),
        (60, 0.1, [0, 31, 64], True, False, 32, True),
        (60, 0.1, [0, 96], True, False, 64, False),
        (64, 0.9, [0, 64, 70], True, False, 64, False),
        (128, 0.5, [0, 20, 34, 42], False, False, 64, False),
        (100, 0, [0, 15, 36, 44], True, False, 64, False),
        (256, 0, [0, 36, 50], False, True, 64, False),
    ],
)
def test_chunk_packed(oracle, fla_kda, D, mask_p, offsets, gate, safe, chunk, backward):
    """With and without gradients, as their two tests of packed sequences."""
    inputs, options = packed(offsets, D, mask_p, gate, safe)
    more = {"safe_gate": safe, "chunk_size": chunk, **(bounded(True) if safe else {})}
    compare(oracle, chunk_kda, fla_kda.chunk_kda, inputs, options, more, backward)


@pytest.mark.parametrize(
    "B, T, H, D, rate, bias, lower_bound",
    [
        (1, 2, 2, 12, True, False, -5.0),
        (1, 32, 2, 16, True, False, -5.0),
        (2, 64, 4, 32, True, False, -5.0),
        (4, 128, 8, 64, True, False, -5.0),
        (4, 128, 8, 128, True, False, None),
        (1, 2, 2, 12, True, True, None),
        (1, 32, 2, 16, True, True, None),
        (2, 64, 4, 32, True, True, None),
        (4, 128, 8, 64, True, True, None),
        (1, 2, 2, 12, False, False, -5.0),
        (2, 64, 4, 32, False, False, -5.0),
        (4, 128, 8, 64, False, True, -5.0),
    ],
)
def test_gate(backend, fla_kda, B, T, H, D, rate, bias, lower_bound):
    """`kda_gate`, whose function is their plain-torch gate, with their inputs: ten times a normal."""
    backend("")  # the best that there is on the device
    naive = inspect.getmodule(fla_kda.chunk_kda).__name__.rsplit(".", 1)[0] + ".gate"
    theirs = __import__(naive, fromlist=["gate"])
    g = torch.randn(B, T, H, D) * 10
    A_log = torch.empty(H).uniform_(1, 16).log() if rate else None
    dt_bias = torch.randn(H * D) if bias else None
    leaves = [x.requires_grad_() for x in (g, A_log, dt_bias) if x is not None]
    peer = theirs.naive_kda_gate if lower_bound is None else theirs.naive_kda_lowerbound_gate
    weight = torch.randn_like(g)
    want = peer(g, A_log, dt_bias)
    got = kda_gate(*(None if x is None else x.to(DEVICE) for x in (g, A_log, dt_bias)), lower_bound).cpu()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    pairs = zip(torch.autograd.grad(got, leaves, weight), torch.autograd.grad(want, leaves, weight))
    for mine, other in pairs:
        assert (mine - other).norm() <= 1e-4 * other.norm()
