"""The scan in segments, for few heads: as near to float64 as the whole scan, and off where bits must not change.

The interpreter has one processor; the tests choose the segments, or lend the rule an H100's 132 processors.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from kimi_kernels import _triton, chunk_kda
from kimi_kernels.kda import triton as backend_triton

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not _triton.interpreting(), reason="needs TRITON_INTERPRET=1")

H100 = 132


@pytest.fixture(autouse=True)
def _forced(backend):
    backend("triton")


@pytest.fixture
def split(monkeypatch):
    """split(n): all following scans are in n segments, of one chunk at least."""
    monkeypatch.setattr(backend_triton, "LEAST_CHUNKS", 1)
    return lambda n: monkeypatch.setattr(backend_triton, "segment_count", lambda *_: n)


@pytest.fixture
def on_h100(monkeypatch):
    """The rule as on an H100, but that chunks as few as three may be split, and each by itself."""
    monkeypatch.setattr(backend_triton, "LEAST_CHUNKS", 1)
    monkeypatch.setattr(backend_triton, "SEGMENTS", 3)
    monkeypatch.setattr(backend_triton, "processors", lambda device: H100)


def errors(found, exact):
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, exact)]


CASES = ["random", "saturated", "slow decay of like keys", "no decay", "unbounded decay"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_as_near_to_float64_as_the_whole_scan(make, oracle, split, case, dtype):
    T = 300 if dtype == torch.bfloat16 else 75  # five chunks, the last one not full
    q, k, v, g, beta = make(1, T, 1, 1, 32, 32)
    if case == "saturated":
        g = torch.full_like(g, -5.0)
    elif case == "slow decay of like keys":
        k = F.normalize(k[:, :1] + 0.05 * k, dim=-1)
        g, beta = torch.full_like(g, -1e-3), torch.full_like(beta, 0.999)
    elif case == "no decay":
        g = torch.zeros_like(g)
    elif case == "unbounded decay":
        g = torch.where(torch.rand(g.shape) < 0.3, -300.0, 0.01 * g)
    inputs, state = [x.to(dtype) for x in (q, k, v, g, beta)], torch.randn(1, 1, 32, 32)
    exact = oracle(*(x.double() for x in inputs), initial_state=state.double(), output_final_state=True)
    whole = errors(chunk_kda(*inputs, initial_state=state, output_final_state=True), exact)
    for segments in (3, 5):
        split(segments)
        parts = errors(chunk_kda(*inputs, initial_state=state, output_final_state=True), exact)
        for mine, other in zip(parts, whole):
            assert mine <= 1.1 * other + 1e-7


@pytest.mark.parametrize("segments", [2, 4])
def test_packed_sequences(make, oracle, split, segments):
    """Empty sequences, of one token, of less chunks than segments, and more; grouped heads, transposed states."""
    offsets = [0, 0, 1, 20, 85, 85]
    inputs, states = make(1, 85, 1, 2, 16, 24), torch.randn(5, 2, 24, 16)
    options = {"cu_seqlens": torch.tensor(offsets), "state_v_first": True, "output_final_state": True}
    split(segments)
    found = chunk_kda(*inputs, initial_state=states, **options)
    exact = oracle(*(x.double() for x in inputs), initial_state=states.double(), **options)
    assert max(errors(found, exact)) <= 2e-6
    out, final = chunk_kda(*inputs, **options)
    exact = oracle(*(x.double() for x in inputs), **options)
    assert (out.double() - exact[0]).norm() <= 2e-6 * exact[0].norm()
    assert torch.equal(final[:1], torch.zeros_like(final[:1]))


def test_the_future_changes_no_bit_of_the_past(make, split):
    split(3)
    inputs = make(1, 150, 1, 1, 16, 16, dtype=torch.bfloat16)
    before = chunk_kda(*inputs)[0]
    other = make(1, 150, 1, 1, 16, 16, decay=300.0, dtype=torch.bfloat16)
    for first in (1, 64, 130):
        changed = [torch.cat([x[:, :first], y[:, first:]], 1) for x, y in zip(inputs, other)]
        assert torch.equal(chunk_kda(*changed)[0][:, :first], before[:, :first])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill(Layer, split, dtype):
    """From and to the pool, with sequences that are skipped or start from zeros."""
    layer = Layer(K=16, V=16, dtype=dtype)
    offsets, slots, resumed = [0, 1, 80, 90, 140], [3, 0, -1, 5], [True, True, True, False]
    tokens, whole, parts = layer.tokens(141), layer.pools(), layer.pools()
    out = layer.prefill(tokens, whole, slots, offsets, resumed)
    split(3)
    found = layer.prefill(tokens, parts, slots, offsets, resumed)
    limit = 2e-6 if dtype == torch.float32 else 5e-3
    for x, y in ((found, out), (parts[1], whole[1])):
        assert (x.double() - y.double()).norm() <= limit * y.double().norm()
    assert torch.equal(parts[0], whole[0])
    assert not found[80:90].any() and not found[140:].any()
    for slot in (1, 2, 4, 6, 7):
        assert torch.equal(parts[1][slot], layer.state[slot])


def problem(B, T, HV, count=None):
    x = torch.empty(B, T, HV, 128, dtype=torch.bfloat16, device="meta")
    offsets = None if count is None else torch.empty(count + 1, dtype=torch.int32, device="meta")
    options = backend_triton.Options(1.0, False, False, False, False, None, False)
    return backend_triton.Problem(x, x, x, x, x[..., 0], None, None, None, offsets, options)


@pytest.mark.parametrize(
    "B, T, HV, sequences, segments",
    [
        (1, 8192, 4, None, 8),  # 16 programs of 4 blocks of values
        (1, 131072, 1, None, 33),
        (1, 8192, 32, None, 1),  # every processor has work
        (1, 8192, 12, None, 1),  # two segments: as long as one
        (1, 1024, 4, None, 1),  # too short
        (1, 2048, 4, None, 4),
        (1, 8192, 4, 2, 4),
        (1, 8192, 4, 16, 1),
        (2, 8192, 4, None, 4),
    ],
)
def test_rule(monkeypatch, B, T, HV, sequences, segments):
    monkeypatch.setattr(backend_triton, "processors", lambda device: H100)
    p = problem(B, T, HV, sequences)
    assert backend_triton.segment_count(p, 4 * p.N * HV, 64) == segments
    monkeypatch.setenv("KIMI_KERNELS_BATCH_INVARIANT", "1")
    assert backend_triton.segment_count(p, 4 * p.N * HV, 64) == 1


def test_launches(make, monkeypatch, split):
    """Two; in segments one more for what they do to a state, and one to go through them where they are several."""
    names = []
    launch = _triton.launch

    def recorded(kernel, grid, *args, **options):
        if 0 not in grid:
            names.append(kernel.fn.__name__)
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(_triton, "launch", recorded)
    inputs = make(1, 64, 1, 1, 16, 16)
    for segments, more in ((1, []), (2, ["segment_kernel"]), (4, ["segment_kernel", "merge_kernel"])):
        split(segments)
        names.clear()
        chunk_kda(*inputs)
        assert names == ["prepare_kernel", *more, "scan_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("invariant", [True, False])
def test_batch_invariance(make, monkeypatch, on_h100, invariant):
    """A sequence gives the same bits alone and packed when asked for; else its scan is split as the batch allows."""
    if invariant:
        monkeypatch.setenv("KIMI_KERNELS_BATCH_INVARIANT", "1")
    counts = []
    rule = backend_triton.segment_count

    def recorded(*args):
        counts.append(rule(*args))
        return counts[-1]

    monkeypatch.setattr(backend_triton, "segment_count", recorded)
    offsets = [0, 260, 270, 300]
    inputs, states = make(1, 300, 1, 1, 16, 16, 0.1, torch.bfloat16), torch.randn(3, 1, 16, 16)
    leaves = [x.requires_grad_() for x in inputs]
    weight = torch.randn(1, 300, 1, 16, dtype=torch.bfloat16)
    packed, final = chunk_kda(
        *leaves, initial_state=states, output_final_state=True, cu_seqlens=torch.tensor(offsets)
    )
    grads = torch.autograd.grad((packed * weight).sum() + final.sum(), leaves)
    same = []
    for n, (a, b) in enumerate(pairwise(offsets)):
        cut = [x.detach()[:, a:b].requires_grad_() for x in inputs]
        out, state = chunk_kda(*cut, initial_state=states[n : n + 1], output_final_state=True)
        alone = torch.autograd.grad((out * weight[:, a:b]).sum() + state.sum(), cut)
        assert all(torch.equal(x, y[:, a:b]) for x, y in zip(alone, grads)), "gradients always are"
        same.append(torch.equal(out, packed[:, a:b]) and torch.equal(state[0], final[n]))
    if invariant:
        assert all(same) and set(counts) == {1}
    else:
        assert not all(same) and len(set(counts)) > 1


@pytest.mark.slow
def test_batch_invariance_of_a_prefill(Layer, monkeypatch, on_h100):
    monkeypatch.setenv("KIMI_KERNELS_BATCH_INVARIANT", "1")
    layer = Layer(H=1, HV=1, K=16, V=16, dtype=torch.bfloat16)
    tokens, alone, together = layer.tokens(300), layer.pools(), layer.pools()
    spans = [(3, 0, 260), (1, 260, 261), (6, 261, 300)]
    parts = [layer.prefill([t[a:b] for t in tokens], alone, [slot], [0, b - a], [True]) for slot, a, b in spans]
    out = layer.prefill(tokens, together, [3, 1, 6], [0, 260, 261, 300], [True] * 3)
    assert torch.equal(out, torch.cat(parts)) and torch.equal(alone[1], together[1])
