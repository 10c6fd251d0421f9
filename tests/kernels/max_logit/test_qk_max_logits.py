"""Largest logits against the full score matrix in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kimi_kernels import qk_max_logits
from kimi_kernels.max_logit import cpu


def scores(q: Tensor, k: Tensor, scale: float | None = None, causal: bool = True) -> Tensor:
    """[B, H, T, S] in float64, -inf where hidden."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    out = torch.einsum("bthd,bshd->bhts", q.double(), k.double()) * (scale or q.shape[-1] ** -0.5)
    if causal:
        tokens, keys = out.shape[2:]
        out = out.masked_fill(torch.ones(tokens, keys).triu(1 + keys - tokens).bool(), -math.inf)
    return out


def exact(q: Tensor, k: Tensor, **options) -> Tensor:
    return scores(q, k, **options).amax((0, 2, 3))


def assert_near(actual: Tensor, wanted: Tensor, q: Tensor, k: Tensor) -> None:
    """float32 sums of D products: D roundings of at most |q||k| at worst, far fewer in the mean."""
    assert actual.dtype == torch.promote_types(q.dtype, torch.float32)
    unit = torch.finfo(actual.dtype).eps * q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()
    limit = 4 * unit * q.shape[-1] ** -0.5
    hidden = wanted.isinf()
    assert torch.equal(actual[hidden].double(), wanted[hidden])
    assert (actual - wanted)[~hidden].abs().le(limit).all(), (actual, wanted)


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def backend(request, monkeypatch) -> str:
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", request.param)
    return request.param


@pytest.fixture(params=[None, 16])
def blocks(request, monkeypatch) -> None:
    """Also with blocks so small that a few hundred tokens take many."""
    if request.param:
        monkeypatch.setattr(cpu, "_QUERIES", request.param)
        monkeypatch.setattr(cpu, "_KEYS", 2 * request.param)


# batch, queries, keys, heads, key heads, width: MHA, GQA, MQA, MLA, decode, chunked prefill, more queries than keys.
SHAPES = [
    (2, 65, 65, 3, 3, 32),
    (1, 300, 300, 8, 2, 64),
    (3, 17, 40, 6, 1, 16),
    (1, 130, 130, 2, 2, 192),
    (2, 1, 700, 4, 2, 64),
    (1, 100, 357, 2, 1, 24),
    (1, 90, 50, 2, 2, 24),
    (1, 1, 1, 1, 1, 1),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equals_the_full_matrix(dtype, shape, causal, blocks):
    batch, tokens, keys, heads, key_heads, width = shape
    q, k = torch.randn(batch, tokens, heads, width), torch.randn(batch, keys, key_heads, width)
    q, k = q.to(dtype), k.to(dtype)
    assert_near(qk_max_logits(q, k, causal=causal), exact(q, k, causal=causal), q, k)


@pytest.mark.parametrize("row", [0, 15, 16, 31, 63])
@pytest.mark.parametrize("column", [0, 15, 16, 32, 63])
def test_a_single_large_pair_counts_exactly_where_it_is_visible(row, column, monkeypatch):
    monkeypatch.setattr(cpu, "_QUERIES", 16)
    monkeypatch.setattr(cpu, "_KEYS", 32)
    q, k = torch.zeros(1, 64, 2, 8), torch.zeros(1, 64, 2, 8)
    q[0, row, 1, 3], k[0, column, 1, 3] = 3.0, 5.0
    found = qk_max_logits(q, k, scale=1.0)
    assert found.tolist() == [0.0, 15.0 if column <= row else 0.0]


@pytest.mark.parametrize("scale", [1.0, 0.3, -1.0])
def test_scale_and_negative_maxima(scale):
    q, k = torch.rand(1, 50, 2, 16) + 0.5, -torch.rand(1, 50, 2, 16) - 0.5
    found = qk_max_logits(q, k, scale=scale)
    torch.testing.assert_close(found.double(), exact(q, k, scale=scale))
    assert (found < 0).all() or scale < 0


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "lengths", [[(5, 5), (40, 40), (1, 1)], [(3, 20), (0, 4), (33, 33)], [(2, 0), (7, 7)]]
)
def test_packed_sequences_do_not_see_each_other(lengths, causal, blocks):
    offsets = [torch.tensor([0, *side]).cumsum(0) for side in zip(*lengths)]
    q = torch.randn(1, int(offsets[0][-1]) + 3, 4, 16)  # three tokens of padding
    k = torch.randn(1, int(offsets[1][-1]) + 2, 2, 16)
    wanted = torch.full((4,), -math.inf, dtype=torch.float64)
    for (a, b), (c, d) in zip(zip(offsets[0], offsets[0][1:]), zip(offsets[1], offsets[1][1:])):
        if a < b and c < d:
            wanted = torch.maximum(wanted, exact(q[:, a:b], k[:, c:d], causal=causal))
    found = qk_max_logits(q, k, causal=causal, cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1].int())
    assert_near(found, wanted, q, k)


def test_heads_that_cannot_exceed_the_threshold_are_skipped_exactly():
    q, k = torch.randn(2, 60, 6, 16), torch.randn(2, 60, 3, 16)
    q[:, :, 4] *= 30
    q[:, :, 1] *= 12
    lse = scores(q, k).logsumexp(-1).float()
    largest = exact(q, k)
    threshold = 20.0
    found = qk_max_logits(q, k, lse=lse, threshold=threshold)
    open_heads = lse.amax((0, 2)) > threshold
    assert open_heads.any() and not open_heads.all()
    assert_near(found[open_heads], largest[open_heads], q, k)
    bound = found[~open_heads]
    assert (bound <= threshold).all()
    assert (bound >= largest[~open_heads] - 1e-5).all()
    assert (bound <= largest[~open_heads] + math.log(60) + 1e-5).all()
    torch.testing.assert_close(found > threshold, largest > threshold)


def test_gate_with_packed_sequences_and_no_open_head():
    q, k = torch.randn(1, 30, 2, 8), torch.randn(1, 30, 2, 8)
    lse = scores(q, k).logsumexp(-1).float()
    offsets = torch.tensor([0, 30])
    found = qk_max_logits(q, k, None, True, offsets, offsets, lse, 1e3)
    assert torch.equal(found, lse.amax((0, 2)))


def test_a_nan_in_lse_opens_its_head():
    q, k = torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8)
    lse = scores(q, k).logsumexp(-1).float()
    lse[0, 1, 3] = math.nan
    assert_near(qk_max_logits(q, k, lse=lse, threshold=1e3)[1:], exact(q, k)[1:], q, k)


@pytest.mark.parametrize("place", ["q", "k"])
def test_nan_reaches_its_head_only(place, blocks):
    q, k = torch.randn(1, 80, 3, 8), torch.randn(1, 80, 3, 8)
    (q if place == "q" else k)[0, 40, 1, 2] = math.nan
    assert qk_max_logits(q, k).isnan().tolist() == [False, True, False]


def test_nothing_visible_is_minus_infinity():
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3, 8)
    for a, b in [(q[:0], k[:0]), (q[:, :0], k), (q, k[:, :0])]:
        assert qk_max_logits(a, b).tolist() == [-math.inf] * 3


def test_strided_inputs_and_autocast():
    wide = torch.randn(2, 40, 4, 3, 16)
    q, k = wide[:, :, :, 0], wide[:, :, :, 2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = qk_max_logits(q, k)
    assert_near(found, exact(q, k), q, k)


def test_gradients_do_not_flow():
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    assert not qk_max_logits(q, q).requires_grad


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_memory_stays_far_below_the_score_matrix(backend):
    """T = 4096: the matrix of one head is 64 MiB in float32; a block of it is what may be held."""
    q, k = torch.randn(1, 4096, 1, 16), torch.randn(1, 4096, 1, 16)
    with torch.profiler.profile(profile_memory=True) as profile:
        qk_max_logits(q, k)
    largest = max((e.self_cpu_memory_usage for e in profile.events()), default=0)
    assert 0 < largest <= 2**20


def test_opcheck():
    q, k = torch.randn(1, 12, 4, 8), torch.randn(1, 12, 2, 8)
    offsets = torch.tensor([0, 5, 12])
    op = torch.ops.kimi.qk_max_logits.default
    torch.library.opcheck(op, (q, k, 0.3, True, None, None, None, None))
    lse = scores(q, k).logsumexp(-1).float()
    torch.library.opcheck(op, (q.bfloat16(), k.bfloat16(), 0.3, True, offsets, offsets, lse, 1.0))


def test_traces_without_graph_breaks():
    q, k = torch.randn(1, 12, 4, 8), torch.randn(1, 12, 2, 8)
    compiled = torch.compile(lambda *t: qk_max_logits(*t).sin(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k), qk_max_logits(q, k).sin())


def test_errors_name_the_argument():
    q, k = torch.randn(1, 12, 4, 8), torch.randn(1, 12, 2, 8)
    offsets = torch.tensor([0, 12])
    wrong = [
        (r"q must be \[B, T, H, D\], got shape \(12, 4, 8\)", (q[0], k), {}),
        ("must share a floating dtype, got torch.float32 and torch.bfloat16", (q, k.bfloat16()), {}),
        (r"k must be \[1, S, HK, 8\] to match q, got shape \(1, 12, 2, 4\)", (q, k[..., :4]), {}),
        ("the 4 heads of q must be a multiple of k's heads, got 3", (q, q[:, :, :3]), {}),
        ("pass cu_seqlens_q and cu_seqlens_k together", (q, k), {"cu_seqlens_q": offsets}),
        ("pass lse and threshold together", (q, k), {"threshold": 1.0}),
        (r"lse must be \[B, H, T\] = \(1, 4, 12\)", (q, k), {"lse": q[..., 0], "threshold": 1.0}),
    ]
    for message, args, options in wrong:
        with pytest.raises(ValueError, match=message):
            qk_max_logits(*args, **options)
    for message, values in [
        ("cu_seqlens_k must start at 0, got 1: pass offsets", [1, 12]),
        ("cu_seqlens_k must not decrease, got 13 then 12 at sequence 1", [0, 13, 12]),
        ("cu_seqlens_k must end at 12 tokens or before, got 13", [0, 13]),
    ]:
        good = torch.zeros(len(values), dtype=torch.int64)
        with pytest.raises(ValueError, match=message):
            qk_max_logits(q, k, cu_seqlens_q=good, cu_seqlens_k=torch.tensor(values))
    with pytest.raises(
        ValueError, match=r"cu_seqlens_k must be int32 or int64 \[2\], got torch.int64 \(3,\)"
    ):
        qk_max_logits(q, k, cu_seqlens_q=offsets, cu_seqlens_k=torch.tensor([0, 3, 12]))
    with pytest.raises(ValueError, match="packed into one row, got B=2"):
        qk_max_logits(*(torch.cat([t, t]) for t in (q, k)), cu_seqlens_q=offsets, cu_seqlens_k=offsets)
