"""The largest logits on the Triton kernel, interpreted or on a GPU, against the full score matrix in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kimi_kernels import BackendError, _triton, qk_max_logits
from kimi_kernels.max_logit import triton as backend

pytest.importorskip("triton")
DEVICE = "cpu" if _triton.interpreting() else "cuda"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _forced(monkeypatch):
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "triton")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 queries and 32 keys, so that a hundred tokens take many."""
    from kimi_kernels.max_logit import triton_kernels

    config = triton_kernels.config

    def small(*args):
        found = config(*args)
        return found._replace(constants={**found.constants, "BM": 16, "BN": 32})

    monkeypatch.setattr(triton_kernels, "config", small)


def largest(q: Tensor, k: Tensor, *args, **options) -> Tensor:
    moved = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
    return qk_max_logits(q.to(DEVICE), k.to(DEVICE), *args, **moved).cpu()


def scores(q: Tensor, k: Tensor, scale: float | None = None, causal: bool = True) -> Tensor:
    """[B, H, T, S] in float64, -inf where hidden."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.einsum("bthd,bshd->bhts", q.double(), k.double()) * scale
    if causal:
        tokens, keys = out.shape[2:]
        out = out.masked_fill(torch.ones(tokens, keys).triu(1 + keys - tokens).bool(), -math.inf)
    return out


def exact(q: Tensor, k: Tensor, **options) -> Tensor:
    return scores(q, k, **options).amax((0, 2, 3))


def assert_near(actual: Tensor, wanted: Tensor, q: Tensor, k: Tensor) -> None:
    """float32 sums of D products: D roundings of at most |q||k| at worst, far fewer in the mean."""
    assert actual.dtype == torch.float32
    norms = q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max() * q.shape[-1] ** -0.5
    limit = (4 if _triton.interpreting() else 16) * torch.finfo(torch.float32).eps * norms
    hidden = wanted.isinf()
    assert torch.equal(actual[hidden].double(), wanted[hidden])
    assert (actual - wanted)[~hidden].abs().le(limit).all(), (actual, wanted)


# batch, queries, keys, heads, key heads, width: MHA, GQA, MQA, MLA, decode, chunked prefill, more queries than keys;
# widths that are no multiple of 16, that take two parts, and that are not held.
SHAPES = [
    (2, 65, 65, 3, 3, 32),
    (1, 300, 300, 4, 2, 64),
    (3, 17, 40, 6, 1, 16),
    (1, 130, 130, 2, 2, 192),
    (2, 1, 300, 4, 2, 64),
    (1, 100, 357, 2, 1, 24),
    (1, 150, 50, 2, 2, 24),
    (1, 30, 30, 2, 1, 100),
    (1, 20, 40, 1, 1, 256),
    (1, 20, 40, 2, 1, 257),
    (1, 20, 40, 2, 1, 576),
    (1, 1, 1, 1, 1, 1),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_full_matrix(dtype, shape, causal):
    batch, tokens, keys, heads, key_heads, width = shape
    q, k = torch.randn(batch, tokens, heads, width), torch.randn(batch, keys, key_heads, width)
    q, k = q.to(dtype), k.to(dtype)
    assert_near(largest(q, k, causal=causal), exact(q, k, causal=causal), q, k)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(2, 65, 65, 2, 1, 24), (1, 20, 90, 1, 1, 24), (1, 90, 20, 1, 1, 24)])
def test_many_tiles(shape, causal, small_tiles):
    batch, tokens, keys, heads, key_heads, width = shape
    for dtype in DTYPES:
        q, k = torch.randn(batch, tokens, heads, width), torch.randn(batch, keys, key_heads, width)
        q, k = q.to(dtype), k.to(dtype)
        assert_near(largest(q, k, causal=causal), exact(q, k, causal=causal), q, k)


@pytest.mark.parametrize("row", [0, 15, 16, 69])
@pytest.mark.parametrize("column", [0, 16, 32, 69])
def test_a_single_large_pair_counts_exactly_where_it_is_visible(row, column, small_tiles):
    q, k = torch.zeros(1, 70, 2, 8), torch.zeros(1, 70, 2, 8)
    q[0, row, 1, 3], k[0, column, 1, 3] = 3.0, 5.0
    assert largest(q, k, 1.0).tolist() == [0.0, 15.0 if column <= row else 0.0]
    assert largest(q, k, 1.0, causal=False).tolist() == [0.0, 15.0]
    assert largest(-q, k, -1.0).tolist() == [0.0, 15.0 if column <= row else 0.0]


@pytest.mark.parametrize("width", [16, 300])
@pytest.mark.parametrize("scale", [1.0, 0.3, -1.0, -0.7, 0.0])
def test_scale_and_negative_maxima(scale, width):
    """Nothing of a tile's padding, which would count as 0, is above a negative maximum."""
    q, k = torch.rand(1, 50, 2, width) + 0.5, -torch.rand(1, 50, 2, width) - 0.5
    found = largest(q, k, scale)
    torch.testing.assert_close(found.double(), exact(q, k, scale=scale), rtol=1e-6, atol=0)
    assert (found < 0).all() or scale <= 0


def test_the_scale_is_applied_to_the_sums_as_in_the_reference(monkeypatch):
    q, k = torch.randint(-9, 9, (1, 40, 3, 8)).float(), torch.randint(-9, 9, (1, 40, 3, 8)).float()
    found = {scale: largest(q, k, scale) for scale in (0.1, -0.3)}  # sums of integers are exact in any order
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "reference")
    for scale, wanted in found.items():
        assert torch.equal(qk_max_logits(q, k, scale), wanted)


LENGTHS = [
    [(5, 5), (40, 40), (1, 1)],
    [(3, 20), (0, 4), (33, 33)],
    [(2, 0), (7, 7), (0, 0)],
    [(16, 16), (32, 40), (0, 3), (17, 5)],
]


def packed(lengths, dtype=torch.float32, padding=3):
    offsets = [torch.tensor([0, *side]).cumsum(0) for side in zip(*lengths)]
    q = torch.randn(1, int(offsets[0][-1]) + padding, 4, 16).to(dtype)
    k = torch.randn(1, int(offsets[1][-1]) + padding, 2, 16).to(dtype)
    q[:, int(offsets[0][-1]) :] = k[:, int(offsets[1][-1]) :] = math.nan  # nobody may look there
    return q, k, offsets


def alone(q, k, offsets):
    spans = zip(zip(offsets[0], offsets[0][1:]), zip(offsets[1], offsets[1][1:]))
    return [(q[:, a:b], k[:, c:d]) for (a, b), (c, d) in spans]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_sequences_do_not_see_each_other(lengths, causal, small_tiles):
    q, k, offsets = packed(lengths)
    wanted = torch.full((4,), -math.inf, dtype=torch.float64)
    for x, y in alone(q, k, offsets):
        if x.shape[1] and y.shape[1]:
            wanted = torch.maximum(wanted, exact(x, y, causal=causal))
    found = largest(q, k, causal=causal, cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1].int())
    assert_near(found, wanted, q.nan_to_num(), k.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiles", ["as they are", "small"])
def test_packed_and_batched_have_the_bits_of_each_alone(dtype, tiles, request):
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    for lengths in LENGTHS:
        q, k, offsets = packed(lengths, dtype)
        apart = torch.stack([largest(x, y) for x, y in alone(q, k, offsets)]).amax(0)
        assert torch.equal(largest(q, k, cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1]), apart)
    q, k = torch.randn(3, 70, 2, 24).to(dtype), torch.randn(3, 70, 1, 24).to(dtype)
    apart = torch.stack([largest(q[n : n + 1], k[n : n + 1]) for n in range(3)]).amax(0)
    assert torch.equal(largest(q, k), apart)


def test_no_sequence_at_all():
    q, k, none = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8), torch.zeros(1, dtype=torch.int64)
    assert largest(q, k, cu_seqlens_q=none, cu_seqlens_k=none).tolist() == [-math.inf] * 2


def test_heads_that_cannot_exceed_the_threshold_are_skipped_exactly():
    q, k = torch.randn(2, 60, 6, 16), torch.randn(2, 60, 3, 16)
    q[:, :, 4] *= 30
    q[:, :, 1] *= 12
    lse = scores(q, k).logsumexp(-1).float()
    maxima, threshold = exact(q, k), 20.0
    found = largest(q, k, lse=lse, threshold=threshold)
    open_heads = lse.amax((0, 2)) > threshold
    assert open_heads.any() and not open_heads.all()
    assert torch.equal(found[open_heads], largest(q, k)[open_heads])
    bound = found[~open_heads]
    assert torch.equal(bound, lse.amax((0, 2))[~open_heads])
    assert (bound <= threshold).all() and (bound >= maxima[~open_heads] - 1e-5).all()
    torch.testing.assert_close(found > threshold, maxima > threshold)


def test_closed_heads_read_no_query():
    """Their programs end before: what would be NaN is not seen."""
    q, k = torch.randn(1, 40, 3, 8), torch.randn(1, 40, 3, 8)
    lse = scores(q, k).logsumexp(-1).float()
    lse[:, 1] += 1e4
    q[:, :, 0] = math.nan
    found = largest(q, k, lse=lse, threshold=1e3)
    assert torch.equal(found[[0, 2]], lse.amax((0, 2))[[0, 2]])
    assert_near(found[1:2], exact(q, k)[1:2], q[:, :, 1:], k)


def test_gate_at_the_threshold_with_packed_sequences_and_nan():
    q, k, offsets = packed([(9, 9), (21, 21)], padding=0)
    lse = torch.randn(1, 4, 30).clamp(max=2.0)
    lse[0, 0, 3], lse[0, 1, 29] = 3.0, math.nan
    found = largest(q, k, cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1], lse=lse, threshold=3.0)
    computed = largest(q, k, cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1])
    assert torch.equal(found, torch.stack([lse[0, 0].max(), computed[1], lse[0, 2].max(), lse[0, 3].max()]))


@pytest.mark.parametrize("place", ["q", "k"])
@pytest.mark.parametrize("width", [8, 300])
def test_nan_reaches_its_head_only(place, width, small_tiles):
    q, k = torch.randn(1, 80, 3, width), torch.randn(1, 80, 3, width)
    (q if place == "q" else k)[0, 40, 1, 2] = math.nan
    for causal in (True, False):
        assert largest(q, k, causal=causal).isnan().tolist() == [False, True, False]


def test_hidden_nan_is_not_seen_and_infinity_is(small_tiles):
    q, k = torch.randn(1, 20, 1, 8).abs(), torch.randn(1, 50, 1, 8).abs()
    k[0, 45:] = math.nan  # the last query sees the last key
    assert largest(q[:, :15], torch.cat([k[:, :45], k[:, 45:]], 1)).isnan().all()
    q, k = torch.randn(1, 40, 1, 8).abs(), torch.randn(1, 30, 1, 8).abs()
    q[0, :10] = math.nan  # ten queries that see no key
    assert_near(largest(q, k), exact(q[:, 10:], k), q[:, 10:], k)
    k[0, 20] = math.inf
    assert largest(q, k).tolist() == [math.inf]
    assert largest(q, -k).isfinite().all() and largest(q[:, -1:], -k[:, 20:21]).tolist() == [-math.inf]


def test_nothing_visible_is_minus_infinity():
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3, 8)
    for a, b in [(q[:0], k[:0]), (q[:, :0], k), (q, k[:, :0])]:
        for scale in (1.0, -1.0):
            assert largest(a, b, scale).tolist() == [-math.inf] * 3
    assert largest(q[:, :, :0], k).shape == (0,)
    lse = torch.full((2, 3, 4), -math.inf)
    assert largest(q, k[:, :0], lse=lse, threshold=0.0).tolist() == [-math.inf] * 3


def test_strides_and_autocast():
    wide = torch.randn(2, 40, 4, 3, 16)
    q, k = wide[:, :, :, 0], wide[:, :, :, 2]
    wanted = largest(q.contiguous(), k.contiguous())
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(largest(q, k), wanted)
    turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k)]  # channels are strided
    assert torch.equal(largest(*turned), wanted)
    assert_near(wanted, exact(q, k), q, k)


@pytest.mark.skipif(DEVICE == "cuda", reason="the storage is reserved memory that a GPU would have to have")
def test_offsets_beyond_32_bits():
    q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 4, 1, 16)
    room = torch.empty(0).set_(torch.UntypedStorage(4 * (3 * 2**30 + 64)))
    far = room.as_strided((1, 4, 1, 16), (0, 2**30, 16, 1))
    wanted = largest(q, k)
    for n in range(2):
        pair = [q, k]
        far.copy_(pair[n])
        pair[n] = far
        assert torch.equal(largest(*pair), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_agrees_with_flex_attention(causal):
    """torch's own attention gives each query's lse, and on a GPU its maximum. Where one score towers, they are one."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    q, k = torch.randn(2, 200, 4, 64), torch.randn(2, 200, 2, 64)
    q[:, :, 1:3] *= 100
    seen = lambda b, h, i, j: i >= j if causal else i >= 0
    mask = create_block_mask(seen, None, None, 200, 200, device=DEVICE)
    heads = [x.transpose(1, 2).to(DEVICE) for x in (q, k, k)]
    request = AuxRequest(lse=True, max_scores=DEVICE == "cuda")
    _, aux = flex_attention(*heads, block_mask=mask, enable_gqa=True, return_aux=request)
    lse = aux.lse.cpu()
    found = largest(q, k, causal=causal)
    torch.testing.assert_close(found[1:3], lse.amax((0, 2))[1:3], rtol=1e-5, atol=0)
    assert (found <= lse.amax((0, 2)) + 1e-3).all()
    gated = largest(q, k, causal=causal, lse=lse, threshold=50.0)
    assert torch.equal(gated, torch.where(lse.amax((0, 2)) > 50, found, lse.amax((0, 2))))
    if DEVICE == "cuda":
        torch.testing.assert_close(found, aux.max_scores.amax((0, 2)).cpu(), rtol=1e-5, atol=1e-5)


def test_as_near_to_float64_as_the_reference(monkeypatch):
    """MLA's heads in bfloat16: 192 products of bfloat16 values, summed in float32."""
    q, k = torch.randn(1, 150, 4, 192).bfloat16(), torch.randn(1, 150, 4, 192).bfloat16()
    ours = (largest(q, k) - exact(q, k)).abs().max()
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "reference")
    theirs = (qk_max_logits(q, k) - exact(q, k)).abs().max()
    assert ours <= max(2 * theirs.item(), torch.finfo(torch.float32).eps * exact(q, k).max().item())


def test_values_are_never_read_on_the_host():
    """Nothing waits for the device, so that a CUDA graph can hold the op."""
    from torch.utils._python_dispatch import TorchDispatchMode

    called = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    q, k, offsets = (torch.randn(1, 30, 4, 16), torch.randn(1, 30, 2, 16), torch.tensor([0, 9, 30]))
    lse = torch.randn(1, 4, 30)
    q, k, offsets, lse = (x.to(DEVICE) for x in (q, k, offsets, lse))
    with Record():
        backend.qk_max_logits(q, k, 0.3, True, offsets, offsets, lse, 1.0)
    assert torch.ops.aten.amax in called
    assert not called & {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero}


@pytest.mark.slow
def test_opcheck():
    q, k = torch.randn(1, 12, 4, 8, device=DEVICE), torch.randn(1, 12, 2, 8, device=DEVICE)
    offsets, lse = torch.tensor([0, 5, 12], device=DEVICE), torch.randn(1, 4, 12, device=DEVICE)
    op = torch.ops.kimi.qk_max_logits.default
    torch.library.opcheck(op, (q, k, 0.3, True, None, None, None, None))
    torch.library.opcheck(op, (q.bfloat16(), k.bfloat16(), 0.3, True, offsets, offsets, lse, 1.0))


@pytest.mark.slow
def test_compiles_as_one_graph():
    q, k = torch.randn(1, 12, 4, 8, device=DEVICE), torch.randn(1, 12, 2, 8, device=DEVICE)
    compiled = torch.compile(lambda *t: qk_max_logits(*t).sin(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k), qk_max_logits(q, k).sin())


@pytest.mark.skipif(DEVICE == "cuda", reason="values of offsets on a device are not read")
@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"cu_seqlens_k": torch.tensor([1, 12])}, "cu_seqlens_k must start at 0, got 1"),
        ({"cu_seqlens_k": torch.tensor([0, 13])}, "cu_seqlens_k must end at 12 tokens or before, got 13"),
        ({"cu_seqlens_k": None}, "pass cu_seqlens_q and cu_seqlens_k together"),
        ({"threshold": 1.0}, "pass lse and threshold together"),
        ({"lse": torch.zeros(1, 4, 8), "threshold": 1.0}, r"lse must be \[B, H, T\] = \(1, 4, 12\)"),
    ],
)
def test_bad_input_never_reaches_a_kernel(monkeypatch, wrong, message):
    monkeypatch.setattr(_triton, "launch", lambda *_, **__: pytest.fail("launched"))
    whole = torch.tensor([0, 12])
    with pytest.raises(ValueError, match=message):
        largest(
            torch.randn(1, 12, 4, 8), torch.randn(1, 12, 2, 8),
            **{"cu_seqlens_q": whole, "cu_seqlens_k": whole, **wrong},
        )  # fmt: skip


def test_what_it_cannot_run_is_said():
    q = torch.randn(1, 4, 2, 8, dtype=torch.float64)
    with pytest.raises(BackendError, match=r"cannot run qk_max_logits: takes float16, .* got torch\.float64"):
        largest(q, q)
