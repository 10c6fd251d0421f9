"""The Triton kernels of Attention Residuals, interpreted on the CPU or on a GPU, against the formulas in float64.

The widths are the smallest, odd ones, those of Kimi Linear (2304) and Kimi K3 (7168), and one that takes two tiles
everywhere; a launch handles up to 16 sources, so that 17 and 40 go through in chunks.
"""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F

from kimi_kernels import BackendError, _triton, attn_res, attn_res_merge, attn_res_phase1, attn_res_step
from kimi_kernels.attnres import ops
from kimi_kernels.attnres import triton as backend

pytest.importorskip("triton")
DEVICE = "cpu" if _triton.interpreting() else "cuda"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _forced(monkeypatch):
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "triton")


@pytest.fixture
def small_groups(monkeypatch):
    """A few rows, and yet several programs whose gradients of the queries are added up in the end."""
    monkeypatch.setattr(backend, "ROWS_OF_PROGRAM", 2)


def random(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(*shape, device=DEVICE)).to(dtype)


def query_of(*shape, dtype=torch.float32):
    """Scores of a few units at any width: beyond, a rounding of the score is one of the whole result."""
    return random(*shape, dtype=dtype, scale=2 * shape[-1] ** -0.5)


def gain_of(*shape, dtype=torch.float32):
    return (0.5 + torch.rand(*shape, device=DEVICE)).to(dtype)


def exact_mix(query, residuals, rms_weight, output_rms_weight=None, rms_eps=1e-6, scale=1.0):
    values = torch.stack(list(residuals))
    keys = F.rms_norm(values, (query.shape[0],), rms_weight, rms_eps)
    mixed = ((keys @ query * scale).softmax(0).unsqueeze(-1) * values).sum(0)
    if output_rms_weight is None:
        return mixed
    return F.rms_norm(mixed, (query.shape[0],), output_rms_weight, rms_eps)


def exact_phase1(queries, residuals, rms_weights, rms_eps=1e-6, scale=1.0):
    values = torch.stack(list(residuals))
    logits = [F.rms_norm(values, (q.shape[0],), w, rms_eps) @ q * scale for q, w in zip(queries, rms_weights)]
    out = torch.stack([(logit.softmax(0).unsqueeze(-1) * values).sum(0) for logit in logits])
    return out, torch.stack([logit.logsumexp(0) for logit in logits])


def exact_step(out, lse, partial, update, query, rms_weight, output_rms_weight=None, scale=1.0):
    total = partial + update
    gate = torch.sigmoid(F.rms_norm(total, query.shape, rms_weight, 1e-6) @ query * scale - lse).unsqueeze(-1)
    mixed = out + gate * (total - out)
    if output_rms_weight is not None:
        mixed = F.rms_norm(mixed, query.shape, output_rms_weight, 1e-6)
    return mixed, total


def check_mix(check, n, shape, dtype, with_output_norm, scale=0.7):
    """Result and gradients of `attn_res`. One source has the weight 1: its query and gain only have rounding."""
    width = shape[-1]
    weights = [query_of(width, dtype=dtype), gain_of(width, dtype=dtype)]
    gain = [gain_of(width, dtype=dtype)] if with_output_norm else []
    residuals = [random(*shape, dtype=dtype) for _ in range(n)]

    def call(function, query, weight, *rest):
        return function(query, rest[:n], weight, rest[n] if with_output_norm else None, scale=scale)

    if n > 1:
        check(
            lambda *x: call(attn_res, *x),
            lambda *x: call(exact_mix, *x),
            [*weights, *residuals, *gain],
        )
    else:
        check(
            lambda *x: call(attn_res, *weights, *x),
            lambda *x: call(exact_mix, *(w.double() for w in weights), *x),
            [*residuals, *gain],
        )


@pytest.mark.parametrize("with_output_norm", [False, True])
@pytest.mark.parametrize("sources", [*range(1, 11), 17, pytest.param(40, marks=pytest.mark.slow)])
def test_any_number_of_sources(accurate_with_gradients, sources, with_output_norm):
    for dtype in DTYPES:
        check_mix(accurate_with_gradients, sources, (3, 24), dtype, with_output_norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "width", [1, 7, 64, 1000, *(pytest.param(w, marks=pytest.mark.slow) for w in (2304, 7168, 9000))]
)
def test_any_width(accurate_with_gradients, width, dtype):
    # An output norm over one element is its sign, whose gradient is nothing but rounding.
    check_mix(accurate_with_gradients, 3, (2, width), dtype, with_output_norm=width > 1)
    check_mix(accurate_with_gradients, 5, (2, width), dtype, with_output_norm=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sources, count", [(3, 1), (2, 2), (8, 4), (5, 5), (10, 3), (17, 7)])
def test_phase1(accurate_with_gradients, small_groups, sources, count, dtype):
    queries, gains = query_of(count, 40, dtype=dtype), gain_of(count, 40, dtype=dtype)
    residuals = [random(2, 2, 40, dtype=dtype) for _ in range(sources)]
    accurate_with_gradients(
        lambda q, w, *r: attn_res_phase1(q, r, w, scale=1.3),
        lambda q, w, *r: exact_phase1(q, r, w, scale=1.3),
        [queries, gains, *residuals],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 5])
def test_phase1_with_output_norm(accurate_with_gradients, small_groups, rows, dtype):
    """No public function has it: several queries whose mixtures share the gain of a norm."""
    queries, gains = query_of(3, 20, dtype=dtype), gain_of(3, 20, dtype=dtype)
    residuals = [random(rows, 20, dtype=dtype) for _ in range(2)]

    def exact(q, w, gain, *r):
        out, lse = exact_phase1(q, r, w)
        return F.rms_norm(out, (20,), gain, 1e-6), lse

    accurate_with_gradients(
        lambda q, w, gain, *r: ops.mix(q, list(r), w, gain, 1e-6, 1.0),
        exact,
        [queries, gains, gain_of(20, dtype=dtype), *residuals],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_output_norm", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(3, 7), (5, 50), (0, 16), *(pytest.param((2, w), marks=pytest.mark.slow) for w in (7168, 9000))],
)
def test_merge(accurate_with_gradients, small_groups, shape, with_output_norm, dtype):
    width = shape[-1]
    out, partial, lse = random(*shape, dtype=dtype), random(*shape, dtype=dtype), random(*shape[:-1])
    weights = [query_of(width, dtype=dtype), gain_of(width, dtype=dtype)]
    gain = [gain_of(width, dtype=dtype)] if with_output_norm else []
    accurate_with_gradients(
        lambda *x: attn_res_merge(*x, scale=0.7),
        lambda out, lse, partial, *w: exact_step(out, lse, partial, torch.zeros_like(partial), *w, scale=0.7)[
            0
        ],
        [out, lse, partial, *weights, *gain],
    )


@pytest.mark.parametrize("with_output_norm", [False, True])
def test_step(accurate_with_gradients, small_groups, with_output_norm):
    """In float32; in bfloat16 the sum is rounded before it is used, as in the composition below."""
    out, partial, update = (random(5, 50) for _ in range(3))
    gain = [gain_of(50)] if with_output_norm else []
    inputs = [out, random(5), partial, update, query_of(50), gain_of(50), *gain]
    accurate_with_gradients(attn_res_step, exact_step, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, pytest.param(9000, marks=pytest.mark.slow)])
def test_step_is_addition_and_merge(width, dtype):
    """To the bit, gradients too, but for the sum of the two gradients of the partial sum, which is rounded once."""
    out, partial, update = (random(5, width, dtype=dtype) for _ in range(3))
    inputs = [out, random(5), partial, update, query_of(width), gain_of(width), gain_of(width)]
    mine, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    merged, total = attn_res_step(*mine)
    expected_total = theirs[2] + theirs[3]
    expected = attn_res_merge(theirs[0], theirs[1], expected_total, *theirs[4:])
    assert torch.equal(merged, expected) and torch.equal(total, expected_total)
    weights = [torch.randn_like(merged), torch.randn_like(total)]
    found = torch.autograd.grad([merged, total], mine, weights)
    wanted = torch.autograd.grad([expected, expected_total], theirs, weights)
    for n, (a, b) in enumerate(zip(found, wanted)):
        if n in (2, 3):
            assert (a.float() - b.float()).norm() <= torch.finfo(dtype).eps * b.float().norm()
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_two_phases_equal_one(dtype, tolerance):
    blocks, partial = [random(7, 40, dtype=dtype) for _ in range(4)], random(7, 40, dtype=dtype)
    update, queries, gains, output_gain = (
        random(7, 40, dtype=dtype),
        random(3, 40),
        gain_of(3, 40),
        gain_of(40),
    )
    out, lse = attn_res_phase1(queries, blocks, gains)
    # A block's first sub-layer has no partial sum yet: phase 1 alone is its input.
    first = attn_res(queries[0], blocks, gains[0])
    torch.testing.assert_close(out[0], first, rtol=tolerance, atol=tolerance)
    second = attn_res_merge(out[1], lse[1], partial, queries[1], gains[1], output_gain)
    direct = attn_res(queries[1], [*blocks, partial], gains[1], output_gain)
    torch.testing.assert_close(second, direct, rtol=tolerance, atol=tolerance)
    third, total = attn_res_step(out[2], lse[2], partial, update, queries[2], gains[2], output_gain)
    direct = attn_res(queries[2], [*blocks, total], gains[2], output_gain)
    torch.testing.assert_close(third, direct, rtol=tolerance, atol=tolerance)


def test_no_rows():
    query, weight = random(16).requires_grad_(), gain_of(16).requires_grad_()
    sources = [random(2, 0, 16).requires_grad_() for _ in range(3)]
    mixed = attn_res(query, sources, weight)
    assert mixed.shape == (2, 0, 16)
    grads = torch.autograd.grad(mixed.sum(), [query, weight, *sources])
    assert not grads[0].any() and not grads[1].any() and grads[2].shape == (2, 0, 16)


def test_one_source_is_returned_as_it_is():
    source = random(5, 33, dtype=torch.bfloat16)
    assert torch.equal(attn_res(random(33), [source], gain_of(33)), source)


def test_zero_query_averages_the_sources():
    residuals = [random(2, 33) for _ in range(19)]
    mixed = attn_res(torch.zeros(33, device=DEVICE), residuals, gain_of(33))
    torch.testing.assert_close(mixed, torch.stack(residuals).mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("place", [1, 17])
def test_large_scores_select_one_source(place):
    """In the first chunk of sources and in the last; nothing overflows, forth or back."""
    query = random(32)
    residuals = [random(4, 32) for _ in range(18)]
    residuals[place] = query.expand(4, 32).clone()
    residuals = [r.requires_grad_() for r in residuals]
    mixed = attn_res(query, residuals, torch.ones(32, device=DEVICE), scale=1e6)
    assert torch.equal(mixed, residuals[place])
    grads = torch.autograd.grad(mixed.sum(), residuals)
    assert torch.equal(grads[place], torch.ones_like(mixed)) and not any(
        g.any() for i, g in enumerate(grads) if i != place
    )


def test_nan_stays_in_its_row():
    residuals = [random(6, 40).requires_grad_() for _ in range(3)]
    query, weight, gain = random(40), gain_of(40), gain_of(40)
    clean = attn_res(query, residuals, weight, gain)
    expected = torch.autograd.grad(clean.sum(), residuals)
    with torch.no_grad():
        residuals[1][2, 5] = float("nan")
    mixed = attn_res(query, residuals, weight, gain)
    grads = torch.autograd.grad(mixed.sum(), residuals)
    others = [0, 1, 3, 4, 5]
    assert mixed[2].isnan().all() and torch.equal(mixed[others], clean[others])
    for a, b in zip(grads, expected):
        assert torch.equal(a[others], b[others])


def test_a_row_has_the_bits_it_has_alone():
    """Forth and back, in all ops: with rows of 16 bytes and with rows that start anywhere."""
    for width in (24, 33):
        query, weight, gain = random(width), gain_of(width), gain_of(width)
        residuals = [random(5, width, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
        update, lse = random(5, width, dtype=torch.bfloat16), random(5)
        whole = attn_res(query, residuals, weight, gain)
        grads = torch.autograd.grad(whole, residuals, update)
        stepped, total = attn_res_step(residuals[0], lse, residuals[1], update, query, weight, gain)
        for row in (0, 4):
            alone = [r[row].detach().requires_grad_() for r in residuals]
            mixed = attn_res(query, alone, weight, gain)
            assert torch.equal(mixed, whole[row])
            for a, b in zip(torch.autograd.grad(mixed, alone, update[row]), grads):
                assert torch.equal(a, b[row])
            one = attn_res_step(alone[0], lse[row], alone[1], update[row], query, weight, gain)
            assert torch.equal(one[0], stepped[row]) and torch.equal(one[1], total[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_sources(dtype):
    """Rows evenly spaced are read in place; any others give the same bits."""
    wide = random(6, 3, 64, dtype=dtype)
    shifted = random(6 * 32 + 1, dtype=dtype)[1:].view(6, 32)  # no row of it starts at a multiple of 16 bytes
    sources = [wide[:, 0, :32], wide[:, 1, 32:], wide[:, 2, ::2], shifted, wide[:1, 0, :32].expand(6, 32)]
    leaves, copies = (
        [x(s).requires_grad_() for s in sources] for x in (torch.Tensor.detach, torch.Tensor.clone)
    )
    copies = [c.detach().contiguous().requires_grad_() for c in copies]
    query, weight = random(32), gain_of(32)
    results = [attn_res(query, x, weight) for x in (leaves, copies)]
    assert torch.equal(*results)
    upstream = random(6, 1, dtype=dtype).expand(6, 32)  # as autograd expands the gradient of a sum
    grads = [torch.autograd.grad(y, x, upstream) for y, x in zip(results, (leaves, copies))]
    for a, b in zip(*grads):
        assert torch.equal(a, b)
    assert backend._rows(sources[0]).data_ptr() == sources[0].data_ptr()
    assert backend._rows(shifted).data_ptr() % 16 == 0, "compiled kernels load 16 bytes at once"


def test_offsets_beyond_32_bits():
    """Rows 2^30 elements apart: the memory between them is never touched, nor taken where it is virtual."""
    stride = (1 << 30) + 8
    far = torch.empty(2 * stride + 16, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 16), (stride, 1))
    near = random(3, 16, dtype=torch.bfloat16)
    far.copy_(near)
    query, weight, other = random(16), gain_of(16), random(3, 16, dtype=torch.bfloat16)
    assert backend._rows(far).data_ptr() == far.data_ptr()
    assert torch.equal(attn_res(query, [far, other], weight), attn_res(query, [near, other], weight))


def test_gradients_are_the_same_every_time(small_groups):
    leaves = [random(32), gain_of(32), *(random(7, 32) for _ in range(2))]
    leaves = [x.requires_grad_() for x in leaves]
    upstream = random(7, 32)
    runs = [
        torch.autograd.grad(attn_res(leaves[0], leaves[2:], leaves[1]), leaves, upstream) for _ in range(2)
    ]
    for a, b in zip(*runs):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_opcheck():
    leaf = lambda *shape: random(*shape).requires_grad_()
    mix, merge, step = (getattr(torch.ops.kimi, "attn_res" + n).default for n in ("", "_merge", "_step"))
    torch.library.opcheck(mix, (leaf(2, 8), [leaf(3, 8), leaf(3, 8)], leaf(2, 8), leaf(8), 1e-6, 1.0))
    torch.library.opcheck(mix, (leaf(1, 8), [leaf(3, 8)], leaf(1, 8), None, 1e-6, 1.0))
    torch.library.opcheck(merge, (leaf(3, 8), leaf(3), leaf(3, 8), leaf(8), leaf(8), leaf(8), 1e-6, 1.0))
    torch.library.opcheck(
        step, (leaf(3, 8), leaf(3), leaf(3, 8), leaf(3, 8), leaf(8), leaf(8), None, 1e-6, 1.0)
    )


@pytest.mark.slow
def test_compiles_as_one_graph():
    def block(query, gain, *sources):
        out, lse = attn_res_phase1(query[None], sources, gain[None])
        mixed, total = attn_res_step(out[0], lse[0], sources[0], attn_res(query, sources, gain), query, gain)
        return attn_res_merge(out[0], lse[0], total, query, gain) + mixed

    query, gain = random(16), gain_of(16)
    sources = [random(4, 16).requires_grad_() for _ in range(3)]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(query, gain, *sources).sum(), sources)
    for a, b in zip(found, torch.autograd.grad(block(query, gain, *sources).sum(), sources)):
        assert torch.equal(a, b)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_captured_in_a_graph():
    """Forth and back, with sources in chunks: nothing waits for the GPU or copies from the host."""
    sources = [random(40, 64).requires_grad_() for _ in range(17)]
    query, weight, gain = random(64), gain_of(64), gain_of(64)

    def run():
        mixed = attn_res(query, sources, weight, gain)
        stepped, _ = attn_res_step(mixed, mixed.mean(-1), sources[0], sources[1], query, weight, gain)
        return stepped, *torch.autograd.grad(stepped.sum(), sources)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for source in sources:
            source.copy_(random(40, 64))
    graph.replay()
    for a, b in zip(captured, run()):
        assert torch.equal(a, b)


def test_refuses_what_it_cannot_run():
    """Before any launch, by name."""
    query, weight = random(8), gain_of(8)
    with pytest.raises(
        BackendError, match=r"attn_res: takes float32 or bfloat16, got torch.float64 for residuals"
    ):
        attn_res(query, [random(2, 8, dtype=torch.float64)], weight)
    with pytest.raises(BackendError, match=r"attn_res: computes in float32, got float64 weights"):
        attn_res(query.double(), [random(2, 8)], weight)
    half = random(2, 8, dtype=torch.float16)
    with pytest.raises(BackendError, match=r"attn_res_merge: takes float32 or bfloat16, got torch.float16"):
        attn_res_merge(half, random(2), half, query, weight)
    with pytest.raises(BackendError, match=r"attn_res_step: takes float32 or bfloat16, got torch.float16"):
        attn_res_step(half, random(2), half, half, query, weight)


@pytest.fixture
def fla_attnres(monkeypatch):
    """fla-core's fused op. Interpreted, it needs loop indices that are tensors, and inputs that say they are CUDA's."""
    pytest.importorskip("fla")
    function = importlib.import_module("fla.ops.attnres").fused_attnres
    if _triton.interpreting():
        import numpy as np
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        def indices(*bounds):
            for i in range(
                *(int(getattr(b, "handle", b).data.item()) if hasattr(b, "handle") else b for b in bounds)
            ):
                yield tl.core.tensor(TensorHandle(np.array([i], np.int32), tl.int32), tl.int32)

        monkeypatch.setattr(sys.modules["fla.ops.attnres.fused"], "range", indices, raising=False)
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    return function


@pytest.mark.slow
@pytest.mark.parametrize("with_output_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_near_to_float64_as_fla(fla_attnres, monkeypatch, dtype, with_output_norm):
    """Result and gradients on the same inputs: at most 5 % more error than the published Triton kernels, or within
    float32's own rounding."""
    width, n = 256, 6
    inputs = [query_of(width, dtype=dtype), gain_of(width, dtype=dtype)]
    inputs += [random(9, width, dtype=dtype) for _ in range(n)]
    inputs += [gain_of(width, dtype=dtype)] if with_output_norm else []
    upstream = random(9, width, dtype=dtype)

    def everything(function, as_dtype=None):
        leaves = [x.detach().to(as_dtype or x.dtype).requires_grad_() for x in inputs]
        gain = leaves[2 + n] if with_output_norm else None
        result = function(leaves[0], leaves[2 : 2 + n], leaves[1], gain, scale=0.7)
        return [result.detach(), *torch.autograd.grad(result, leaves, upstream.to(result.dtype))]

    exact, theirs = everything(exact_mix, torch.float64), everything(fla_attnres)
    monkeypatch.undo()
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "triton")
    for mine, other, wanted in zip(everything(attn_res), theirs, exact):
        errors = [((x.double() - wanted).norm() / wanted.norm()).item() for x in (mine, other)]
        assert errors[0] <= max(1.05 * errors[1], 3e-7), errors
