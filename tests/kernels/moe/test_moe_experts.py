"""The expert mixture against one float64 feed-forward per token and choice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kimi_kernels import BackendError, moe_experts


def experts(tokens, chosen, count, width, inner, dtype=torch.float32):
    x = torch.randn(tokens, width)
    w13 = torch.randn(count, 2 * inner, width) / width**0.5
    w2 = torch.randn(count, width, inner) / inner**0.5
    ids = torch.rand(tokens, count).argsort(1)[:, :chosen].int()
    return x.to(dtype), w13.to(dtype), w2.to(dtype), ids, torch.rand(tokens, chosen)


def oracle(x, w13, w2, topk_ids, topk_weights):
    out = torch.zeros(x.shape, dtype=torch.float64)
    inner = w2.shape[2]
    for t, (ids, factors) in enumerate(zip(topk_ids.tolist(), topk_weights.double())):
        for expert, factor in zip(ids, factors):
            if 0 <= expert < w13.shape[0]:
                gate, up = (w13[expert].double() @ x[t].double()).split(inner)
                out[t] += factor * (w2[expert].double() @ (F.silu(gate) * up))
    return out


# (tokens, choices, experts, D, I): one token, few, enough to widen bf16 rows, odd sizes, nothing at all.
@pytest.mark.parametrize(
    "sizes", [(1, 2, 4, 32, 16), (7, 3, 5, 37, 21), (90, 4, 6, 64, 48), (40, 1, 3, 18, 33), (0, 2, 4, 16, 8)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_float64(isa, sizes, dtype, accurate):
    arguments = experts(*sizes, dtype)
    # Where the CPU multiplies bfloat16 itself, the hidden layer is rounded to it, as torch does.
    accurate("out", moe_experts(*arguments), oracle(*arguments), roundings=2 if isa == "avx512bf16" else 1)


def test_reference_matches_float64():
    x, w13, w2, ids, factors = experts(9, 2, 4, 16, 8)
    out = moe_experts(x.double(), w13.double(), w2.double(), ids, factors)
    torch.testing.assert_close(out, oracle(x, w13, w2, ids, factors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_bits_it_has_alone(isa, dtype):
    x, w13, w2, ids, factors = experts(50, 2, 3, 40, 24, dtype)
    together = moe_experts(x, w13, w2, ids, factors)
    for t in (0, 17, 49):
        row = slice(t, t + 1)
        assert torch.equal(moe_experts(x[row], w13, w2, ids[row], factors[row]), together[row])


def test_ids_of_no_expert_add_nothing(isa, accurate):
    x, w13, w2, ids, factors = experts(6, 3, 4, 16, 8)
    ids[1] = -1
    ids[2, 0] = 4
    ids[3, 2] = -1
    out = moe_experts(x, w13, w2, ids, factors)
    accurate("out", out, oracle(x, w13, w2, ids, factors))
    assert torch.equal(out[1], torch.zeros(16))
    torch.testing.assert_close(moe_experts(x.double(), w13.double(), w2.double(), ids, factors).float(), out)


def test_one_expert_twice_counts_twice(isa, accurate):
    x, w13, w2, _, factors = experts(3, 2, 2, 16, 8)
    ids = torch.tensor([[1, 1], [0, 0], [0, 1]])
    accurate("out", moe_experts(x, w13, w2, ids, factors), oracle(x, w13, w2, ids, factors))


def test_opcheck_and_trace(native):
    arguments = experts(5, 2, 4, 16, 8)
    torch.library.opcheck(torch.ops.kimi.moe_experts.default, arguments)
    compiled = torch.compile(moe_experts, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), moe_experts(*arguments))


def test_errors_name_the_argument():
    x, w13, w2, ids, factors = experts(5, 2, 4, 16, 8)
    with pytest.raises(ValueError, match=r"w2 must be \[E, 16, I\] to match x"):
        moe_experts(x, w13, w2.transpose(1, 2), ids, factors)
    with pytest.raises(
        ValueError, match=r"w13 must be \[E, 2 I, D\] = \(4, 16, 16\), got shape \(4, 8, 16\)"
    ):
        moe_experts(x, w13[:, :8], w2, ids, factors)
    with pytest.raises(ValueError, match=r"topk_ids must be \[5, k\], got shape \(4, 2\)"):
        moe_experts(x, w13, w2, ids[:4], factors)
    with pytest.raises(ValueError, match=r"topk_weights must have the shape of topk_ids \(5, 2\)"):
        moe_experts(x, w13, w2, ids, factors[:, :1])


def test_forced_native_backend_says_why_it_cannot(native, monkeypatch):
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "cpu")
    x, w13, w2, ids, factors = experts(5, 2, 4, 16, 8)
    with pytest.raises(
        BackendError, match=r"takes one dtype for all tensors, got torch.bfloat16 and torch.float32"
    ):
        moe_experts(x.bfloat16(), w13, w2, ids, factors)
