"""Attention Residuals against a direct softmax over depth in float64, and the paper's identities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kimi_kernels import BackendError, attn_res, attn_res_merge, attn_res_phase1, attn_res_step


def oracle(query, residuals, rms_weight, output_rms_weight=None, rms_eps=1e-6, scale=1.0):
    values = torch.stack(list(residuals))
    keys = F.rms_norm(values, (query.shape[0],), rms_weight, rms_eps)
    mixed = ((keys @ query * scale).softmax(0).unsqueeze(-1) * values).sum(0)
    if output_rms_weight is None:
        return mixed
    return F.rms_norm(mixed, (query.shape[0],), output_rms_weight, rms_eps)


def phase1_oracle(queries, residuals, rms_weights, rms_eps=1e-6, scale=1.0):
    values = torch.stack(list(residuals))
    pairs = [
        (F.rms_norm(values, (q.shape[0],), w, rms_eps) @ q * scale, q) for q, w in zip(queries, rms_weights)
    ]
    out = torch.stack([(logits.softmax(0).unsqueeze(-1) * values).sum(0) for logits, _ in pairs])
    return out, torch.stack([logits.logsumexp(0) for logits, _ in pairs])


def weights(width, dtype=torch.float32):
    return (0.3 * torch.randn(width)).to(dtype), (0.5 + torch.rand(width)).to(dtype)


# 67 is no multiple of a vector; 130 rows take three of the backward's groups of rows.
@pytest.mark.parametrize("with_output_norm", [False, True])
@pytest.mark.parametrize(
    "sources, shape", [(1, (5, 32)), (10, (2, 65, 64)), (64, (3, 67)), (2, (0, 16)), (3, (8,))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_and_gradients_match_float64(
    isa, dtype, sources, shape, with_output_norm, accurate_with_gradients
):
    query, rms_weight = weights(shape[-1], dtype)
    residuals = [torch.randn(shape).to(dtype) for _ in range(sources)]
    gain = [torch.rand(shape[-1]).to(dtype)] if with_output_norm else []
    if sources == 1 and not with_output_norm:
        # One source gets weight 1: the output is the source, and query and gain have no gradient but rounding.
        assert torch.equal(attn_res(query, residuals, rms_weight), residuals[0])
        return

    def call(function):
        return lambda q, w, *rest: function(
            q, rest[:sources], w, rest[sources] if with_output_norm else None, scale=0.7
        )

    if sources == 1:  # as above, query and gain stay out of the comparison
        accurate_with_gradients(
            lambda *rest: call(attn_res)(query, rms_weight, *rest),
            lambda *rest: call(oracle)(query.double(), rms_weight.double(), *rest),
            [*residuals, *gain],
        )
    else:
        accurate_with_gradients(call(attn_res), call(oracle), [query, rms_weight, *residuals, *gain])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_phase1_and_gradients_match_float64(isa, dtype, accurate_with_gradients):
    queries = (0.3 * torch.randn(6, 48)).to(dtype)
    gains = (0.5 + torch.rand(6, 48)).to(dtype)
    residuals = [torch.randn(4, 9, 48).to(dtype) for _ in range(5)]
    accurate_with_gradients(
        lambda q, w, *r: attn_res_phase1(q, r, w, scale=1.3),
        lambda q, w, *r: phase1_oracle(q, r, w, scale=1.3),
        [queries, gains, *residuals],
    )


@pytest.mark.parametrize("with_output_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_gradients_match_float64(isa, dtype, with_output_norm, accurate_with_gradients):
    query, rms_weight = weights(50, dtype)
    out, partial = torch.randn(3, 70, 50).to(dtype), torch.randn(3, 70, 50).to(dtype)
    lse = torch.randn(3, 70)
    gain = [torch.rand(50).to(dtype)] if with_output_norm else []

    def merged(out, lse, partial, query, rms_weight, gain=None):
        logit = F.rms_norm(partial, (50,), rms_weight, 1e-6) @ query
        gate = torch.sigmoid(logit - lse).unsqueeze(-1)
        mixed = out + gate * (partial - out)
        return mixed if gain is None else F.rms_norm(mixed, (50,), gain, 1e-6)

    accurate_with_gradients(attn_res_merge, merged, [out, lse, partial, query, rms_weight, *gain])


@pytest.mark.parametrize("with_output_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_step_is_addition_and_merge(native, dtype, with_output_norm):
    """To the bit, and its gradients are those of the two but for the rounding of a sum."""
    inputs = [torch.randn(s).to(dtype) for s in ((3, 70, 50), (3, 70), *[(3, 70, 50)] * 2, *[(50,)] * 3)]
    inputs[1] = inputs[1].to(torch.float32)
    inputs = inputs if with_output_norm else inputs[:-1]
    mine, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    found = attn_res_step(*mine, scale=0.7)
    total = theirs[2] + theirs[3]
    wanted = attn_res_merge(theirs[0], theirs[1], total, *theirs[4:], scale=0.7), total
    weights = [torch.randn_like(x) for x in wanted]
    for a, b in zip(found, wanted):
        assert torch.equal(a, b)
    for a, b in zip(torch.autograd.grad(found, mine, weights), torch.autograd.grad(wanted, theirs, weights)):
        assert a.dtype == b.dtype and (a - b).norm() <= torch.finfo(dtype).eps * b.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_two_phases_equal_one(native, dtype, tolerance):
    blocks = [torch.randn(7, 40, dtype=dtype) for _ in range(4)]
    partial = torch.randn(7, 40, dtype=dtype)
    queries, gains = torch.randn(3, 40, dtype=dtype), torch.rand(3, 40, dtype=dtype)
    output_gain = torch.rand(40, dtype=dtype)
    out, lse = attn_res_phase1(queries, blocks, gains)
    for s in range(3):
        # The first sub-layer of a block has no partial sum yet: phase 1 alone is its input.
        torch.testing.assert_close(
            out[s], attn_res(queries[s], blocks, gains[s]), rtol=tolerance, atol=tolerance
        )
        torch.testing.assert_close(
            attn_res_merge(out[s], lse[s], partial, queries[s], gains[s], output_gain),
            attn_res(queries[s], [*blocks, partial], gains[s], output_gain),
            rtol=tolerance,
            atol=tolerance,
        )
        merged, total = attn_res_step(out[s], lse[s], partial, blocks[0], queries[s], gains[s], output_gain)
        direct = attn_res(queries[s], [*blocks, total], gains[s], output_gain)
        torch.testing.assert_close(merged, direct, rtol=tolerance, atol=tolerance)


def test_zero_query_averages_the_sources(isa):
    residuals = [torch.randn(5, 33) for _ in range(8)]
    mixed = attn_res(torch.zeros(33), residuals, torch.rand(33))
    torch.testing.assert_close(mixed, torch.stack(residuals).mean(0), rtol=1e-6, atol=1e-6)


def test_one_source_is_returned_as_it_is(isa):
    source = torch.randn(5, 33)
    assert torch.equal(attn_res(torch.randn(33), [source], torch.rand(33)), source)


def test_large_scores_select_one_source(isa):
    query = torch.randn(32)
    residuals = [torch.randn(4, 32), query.expand(4, 32).clone(), torch.randn(4, 32)]
    mixed = attn_res(query, residuals, torch.ones(32), scale=1e4)
    assert torch.equal(mixed, residuals[1])


def test_a_row_has_the_bits_it_has_alone(isa):
    query, rms_weight = weights(96)
    residuals = [torch.randn(20, 96) for _ in range(5)]
    whole = attn_res(query, residuals, rms_weight)
    for row in (0, 7, 19):
        assert torch.equal(attn_res(query, [r[row] for r in residuals], rms_weight), whole[row])


def test_strided_sources(native, accurate):
    wide = torch.randn(6, 3, 64)
    query, rms_weight = weights(32)
    residuals = [wide[:, 0, :32], wide[:, 1, 32:], wide[:, 2, ::2]]
    mixed = attn_res(query, residuals, rms_weight)
    accurate("mixed", mixed, oracle(query.double(), [r.double() for r in residuals], rms_weight.double()))


def test_gradcheck_in_float64():
    leaf = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, w, g, *r: attn_res(q, r, w, g, scale=1.5),
        [leaf(5) for _ in range(3)] + [leaf(2, 5) for _ in range(3)],
    )
    assert torch.autograd.gradcheck(
        lambda q, w, *r: attn_res_phase1(q, r, w), [leaf(2, 5), leaf(2, 5)] + [leaf(3, 5) for _ in range(2)]
    )
    assert torch.autograd.gradcheck(
        attn_res_merge, [leaf(3, 5), leaf(3), leaf(3, 5), leaf(5), leaf(5), leaf(5)]
    )
    assert torch.autograd.gradcheck(
        attn_res_step, [leaf(3, 5), leaf(3), leaf(3, 5), leaf(3, 5), leaf(5), leaf(5), leaf(5)]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(native, dtype):
    leaf = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=True)
    mix, merge = torch.ops.kimi.attn_res.default, torch.ops.kimi.attn_res_merge.default
    step = torch.ops.kimi.attn_res_step.default
    torch.library.opcheck(mix, (leaf(2, 8), [leaf(3, 8), leaf(3, 8)], leaf(2, 8), leaf(8), 1e-6, 1.0))
    torch.library.opcheck(mix, (leaf(1, 8), [leaf(3, 8)], leaf(1, 8), None, 1e-6, 1.0))
    torch.library.opcheck(merge, (leaf(3, 8), leaf(3), leaf(3, 8), leaf(8), leaf(8), leaf(8), 1e-6, 1.0))
    rows = (leaf(3, 8), leaf(3), leaf(3, 8), leaf(3, 8))
    torch.library.opcheck(step, (*rows, leaf(8), leaf(8), leaf(8), 1e-6, 1.0))
    torch.library.opcheck(step, (*rows, leaf(8), leaf(8), None, 1e-6, 1.0))


def test_traces_without_graph_breaks(native):
    def block(query, gain, *sources):
        out, lse = attn_res_phase1(query[None], sources, gain[None])
        mixed, total = attn_res_step(out[0], lse[0], sources[0], attn_res(query, sources, gain), query, gain)
        return attn_res_merge(out[0], lse[0], total, query, gain) + mixed

    query, gain = weights(16)
    sources = [torch.randn(4, 16, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(query, gain, *sources).sum(), sources)
    expected = torch.autograd.grad(block(query, gain, *sources).sum(), sources)
    for a, b in zip(grads, expected):
        assert torch.equal(a, b)


def test_errors_name_the_argument():
    query, gain, source = torch.randn(8), torch.rand(8), torch.randn(2, 8)
    with pytest.raises(ValueError, match="residuals is empty: pass at least one source"):
        attn_res(query, [], gain)
    with pytest.raises(ValueError, match=r"residuals\[1\] is torch.float32 \(3, 8\), but residuals\[0\] is"):
        attn_res(query, [source, torch.randn(3, 8)], gain)
    with pytest.raises(ValueError, match=r"query must have shape \(8,\), got \(7,\)"):
        attn_res(torch.randn(7), [source], gain)
    with pytest.raises(ValueError, match=r"queries must have shape \(S, 8\), got \(8,\)"):
        attn_res_phase1(query, [source], gain)
    with pytest.raises(ValueError, match=r"lse must have shape \(2,\), got \(3,\)"):
        attn_res_merge(source, torch.randn(3), source, query, gain)
    with pytest.raises(
        ValueError, match=r"update is torch.float32 \(8,\), but partial is torch.float32 \(2, 8\)"
    ):
        attn_res_step(source, torch.randn(2), source, query, query, gain)


def test_forced_native_backend_refuses_float64(native, monkeypatch):
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "cpu")
    with pytest.raises(
        BackendError, match=r"cannot run attn_res: takes float32 or bfloat16, got torch.float64"
    ):
        attn_res(torch.randn(8), [torch.randn(2, 8, dtype=torch.float64)], torch.rand(8))
