"""The serving kernels in Triton's interpreter, against the layer's formulas in float64 and the reference's pools.

Tolerance of a prefill in bfloat16, in the L2 norm: 5e-3 as in test_kda_triton, for the state. For the output 8e-3: its
way from the projections is rounded twice more, after the convolution and before the norm.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from kimi_kernels import _triton
from kimi_kernels.kda import paged

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not _triton.interpreting(), reason="needs TRITON_INTERPRET=1")

LAYERS = [
    pytest.param({}, marks=pytest.mark.slow),
    {"H": 1, "HV": 3, "K": 24, "V": 40, "lower_bound": -5.0, "W": 3},
    pytest.param({"H": 1, "HV": 1, "K": 128, "V": 128, "v_last": True}, marks=pytest.mark.slow),
    {"K": 64, "V": 64, "dtype": torch.bfloat16, "lower_bound": -5.0},
]


@pytest.fixture(autouse=True)
def _forced(backend):
    backend("triton")


def relative(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("settings", LAYERS)
def test_prefill(Layer, oracle, accurate, settings):
    """Fresh and resumed, skipped and empty sequences, of one token, less than the filter, and more than a chunk."""
    layer = Layer(**settings)
    offsets, slots, resumed = (
        [0, 1, 3, 3, 73, 75, 94],
        [3, 0, 5, 7, -1, 2],
        [True, True, True, False, True, False],
    )
    tokens, pools = layer.tokens(96), layer.pools()
    out = layer.prefill(tokens, pools, slots, offsets, resumed)
    conv, state = layer.pools()
    for n, (a, b) in enumerate(pairwise(offsets)):
        slot = slots[n]
        if slot < 0:
            assert not out[a:b].any(), "skipped sequences give zeros"
        elif a < b:
            history, start = conv[slot, : layer.W - 1], state[slot]
            if not resumed[n]:
                history, start = torch.zeros_like(history), torch.zeros_like(start)
            exact, last, final = layer.exact(oracle, [t[a:b] for t in tokens], history, start)
            assert torch.equal(pools[0][slot, : layer.W - 1].double(), last)
            if layer.dtype == torch.float32:
                accurate(f"output {n}", out[a:b], exact)
                accurate(f"state {n}", pools[1][slot], final)
            else:
                assert relative(out[a:b], exact) <= 8e-3
                assert relative(pools[1][slot], final) <= 5e-3
    assert not out[94:].any(), "tokens behind the last sequence are padding"
    assert torch.equal(pools[0][:, layer.W - 1 :], conv[:, layer.W - 1 :]), "entries of drafts are left alone"
    for slot in (1, 4, 5, 6):
        assert torch.equal(pools[0][slot], conv[slot]) and torch.equal(pools[1][slot], state[slot])


@pytest.mark.parametrize("settings", LAYERS[1::2])
def test_prefill_in_chunks_then_decode_is_one_prefill(Layer, settings):
    layer = Layer(**settings)
    tokens = layer.tokens(50)
    whole, pieces = layer.pools(), layer.pools()
    out = layer.prefill(tokens, whole, [4], [0, 50], [False])
    parts = []
    for a, b in pairwise([0, 2, 3, 20, 45]):
        parts.append(layer.prefill([t[a:b] for t in tokens], pieces, [4], [0, b - a], [a > 0]))
    for t in range(45, 50):
        parts.append(layer.decode([x[t : t + 1] for x in tokens], pieces, [4]))
    limit = 5e-6 if layer.dtype == torch.float32 else 1e-2  # in bfloat16 each side has an error of its own
    assert relative(torch.cat(parts), out.double()) <= limit
    assert relative(pieces[1][4], whole[1][4].double()) <= limit
    assert torch.equal(pieces[0][4, : layer.W - 1], whole[0][4, : layer.W - 1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefill_does_not_depend_on_the_batch(Layer, dtype):
    layer = Layer(dtype=dtype)
    tokens, alone, together = layer.tokens(90), layer.pools(), layer.pools()
    spans = [(3, 0, 17), (1, 17, 18), (6, 18, 90)]
    parts = [layer.prefill([t[a:b] for t in tokens], alone, [slot], [0, b - a], [True]) for slot, a, b in spans]
    out = layer.prefill(tokens, together, [3, 1, 6], [0, 17, 18, 90], [True] * 3)
    assert torch.equal(out, torch.cat(parts))
    assert torch.equal(alone[0], together[0]) and torch.equal(alone[1], together[1])


def test_a_prefill_of_nothing(Layer):
    layer = Layer()
    pools = layer.pools()
    assert not layer.prefill(layer.tokens(5), pools, [], [0], []).any()
    assert layer.prefill(layer.tokens(0), pools, [3], [0, 0], [True]).shape == (0, layer.HV * layer.V)
    for pool, before in zip(pools, layer.pools()):
        assert torch.equal(pool, before)


def test_a_prefill_writes_into_out(Layer):
    layer = Layer()
    tokens, width = layer.tokens(20), layer.HV * layer.V
    room = torch.zeros(20, 2 * width)
    out = layer.prefill(tokens, layer.pools(), [2], [0, 18], [True], out=room[:, :width])
    assert out.data_ptr() == room.data_ptr() and not room[:, width:].any()
    assert torch.equal(out, layer.prefill(tokens, layer.pools(), [2], [0, 18], [True]))


@pytest.mark.parametrize("settings", LAYERS)
def test_decode(Layer, oracle, accurate, settings):
    layer = Layer(**settings)
    slots = [3, 0, -1, 7]
    tokens, pools = layer.tokens(6), layer.pools()
    out = layer.decode(tokens, pools, slots)
    conv, state = layer.pools()
    for n, slot in enumerate(slots):
        if slot < 0:
            continue
        row = [t[n : n + 1] for t in tokens]
        exact, last, final = layer.exact(oracle, row, conv[slot, : layer.W - 1], state[slot])
        accurate("output", out[n : n + 1], exact)
        assert torch.equal(pools[0][slot, : layer.W - 1].double(), last)
        accurate("state", pools[1][slot], final)
    assert not out[2].any() and not out[4:].any()
    for slot in (1, 2, 4, 5, 6):
        assert torch.equal(pools[0][slot], conv[slot]) and torch.equal(pools[1][slot], state[slot])


@pytest.mark.parametrize("settings", LAYERS)
def test_speculation_rolls_back(Layer, settings):
    """Whatever was drafted and rejected, the kept tokens give to the bit what plain decoding of them gives."""
    layer = Layer(**settings)
    kept = layer.tokens(9)
    plain, pools = layer.pools(), layer.pools()
    expected = [layer.decode([x[t : t + 1] for x in kept], plain, [5]) for t in range(9)]
    slots = [[5, 1, 6, -1], [-1, -1, -1, -1]]
    done, accepted = 0, 1
    for length, keep in [(3, 2), (1, 1), (3, 3), (2, 1), (3, 2)]:
        drafted = layer.tokens(length + 1)
        for x, y in zip(drafted, kept):
            x[:keep] = y[done : done + keep]
        out = layer.decode(
            drafted, pools, slots,
            cu_seqlens=torch.tensor([0, length, length + 1], dtype=torch.int32),
            num_accepted_tokens=torch.tensor([accepted, 1], dtype=torch.int32),
        )  # fmt: skip
        for i in range(keep):
            assert torch.equal(out[i : i + 1], expected[done + i])
        assert not out[length:].any()
        done, accepted = done + keep, keep
    assert torch.equal(pools[1][slots[0][accepted - 1]], plain[1][5])


@pytest.mark.parametrize("settings", LAYERS)
def test_pools_after_speculation_are_the_references(Layer, backend, settings):
    layer = Layer(**settings)
    tokens = layer.tokens(6)
    found = []
    for name in ("triton", "reference"):
        backend(name)
        pools = layer.pools()
        out = layer.decode(
            tokens, pools, [[4, 2, 7, 3], [0, 6, -1, 1]],
            cu_seqlens=torch.tensor([0, 4, 6], dtype=torch.int32),
            num_accepted_tokens=torch.tensor([3, 1], dtype=torch.int32),
        )  # fmt: skip
        found.append((out, *pools))
    (out, conv, state), (wanted, wanted_conv, wanted_state) = found
    assert torch.equal(conv, wanted_conv)
    torch.testing.assert_close(state, wanted_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, wanted)


def test_a_step_does_not_depend_on_the_batch(Layer):
    layer = Layer()
    tokens, alone, together = layer.tokens(3), layer.pools(), layer.pools()
    parts = [layer.decode([t[n : n + 1] for t in tokens], alone, [slot]) for n, slot in enumerate([6, 1, 3])]
    out = layer.decode(tokens, together, [6, 1, 3])
    assert torch.equal(out, torch.cat(parts))
    assert torch.equal(alone[0], together[0]) and torch.equal(alone[1], together[1])


def test_what_padding_holds_does_not_spread_in_a_prefill(Layer):
    """NaN in unused slots, unused entries, padded tokens and behind the projections."""
    layer = Layer(K=24, V=40)
    tokens, clean = layer.tokens(30), layer.pools()
    offsets, slots = [0, 12, 13, 25], [2, 0, 5]
    expected = layer.prefill(tokens, clean, slots, offsets, [True, False, True])
    conv, state = layer.pools()
    for slot in (1, 3, 4, 6, 7):
        conv[slot], state[slot] = float("nan"), float("nan")
    conv[:, layer.W - 1 :] = float("nan")
    conv[0], state[0] = float("nan"), float("nan")  # a fresh sequence must not read its slot
    padded = []
    for x in tokens:
        room = torch.full((30, *(n + 5 for n in x.shape[1:])), float("nan"))
        view = room[(slice(None), *(slice(0, n) for n in x.shape[1:]))]
        view[:25] = x[:25]
        padded.append(view)
    out = layer.prefill(padded, (conv, state), slots, offsets, [True, False, True])
    assert torch.equal(out, expected) and not out[25:].any()
    for slot in slots:
        assert torch.equal(state[slot], clean[1][slot])


def test_what_padding_holds_does_not_spread(Layer):
    layer = Layer(K=24, V=40)
    tokens, clean = layer.tokens(2), layer.pools()
    expected = layer.decode(tokens, clean, [2, 5])
    conv, state = layer.pools()
    for slot in (0, 1, 3, 4, 6, 7):
        conv[slot], state[slot] = float("nan"), float("nan")
    conv[:, layer.W - 1 :] = float("nan")
    padded = []
    for x in tokens:
        room = torch.full((4, *(n + 5 for n in x.shape[1:])), float("nan"))
        view = room[(slice(None), *(slice(0, n) for n in x.shape[1:]))]
        view[:2] = x
        padded.append(view)
    out = layer.decode(padded, (conv, state), [2, 5])
    assert torch.equal(out[:2], expected) and not out[2:].any()
    assert torch.equal(state[2], clean[1][2]) and torch.equal(state[5], clean[1][5])


@pytest.mark.parametrize(
    "slots, more, message",
    [
        ([9, 0], {}, r"outside \[-1, 8\) for sequence 0"),
        (
            [[1, 2], [3, 4]],
            {"cu": [0, 3, 4], "accepted": [1, 1]},
            "more tokens than state_indices has columns",
        ),
        ([[1, 2], [3, 4]], {"cu": [0, 2, 4], "accepted": [1, 3]}, r"num_accepted_tokens\[1\] names no slot"),
        ([[1, 2], [3, 4]], {"cu": [1, 2, 4], "accepted": [1, 1]}, "cu_seqlens does not fit 4 tokens"),
    ],
)
def test_bad_slots(Layer, monkeypatch, slots, more, message):
    monkeypatch.setattr(_triton, "launch", lambda *_, **__: pytest.fail("launched"))
    layer = Layer()
    options = {}
    if more:
        options = {"cu_seqlens": torch.tensor(more["cu"]).int(),
                   "num_accepted_tokens": torch.tensor(more["accepted"]).int()}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        layer.decode(layer.tokens(4), layer.pools(), slots, **options)


@pytest.mark.parametrize(
    "slots, offsets, message",
    [
        ([9, 0], [0, 2, 4], r"outside \[-1, 8\) for sequence 0"),
        ([1, 0], [1, 2, 4], "cu_seqlens does not fit 4 tokens at sequence 0"),
        ([1, 0], [0, 3, 2], "cu_seqlens does not fit 4 tokens at sequence 1"),
        ([1, 0], [0, 2, 5], "cu_seqlens does not fit 4 tokens at sequence 1"),
    ],
)
def test_bad_slots_of_a_prefill(Layer, monkeypatch, slots, offsets, message):
    monkeypatch.setattr(_triton, "launch", lambda *_, **__: pytest.fail("launched"))
    layer = Layer()
    with pytest.raises(ValueError, match=message):
        layer.prefill(layer.tokens(4), layer.pools(), slots, offsets, [True, True])


@pytest.mark.slow
def test_opcheck_of_a_prefill(Layer):
    layer = Layer(K=16, V=16)
    pool = (*layer.tokens(6), layer.conv_weight, *layer.pools(), torch.tensor([2, 0]).int())
    offsets, resumed = torch.tensor([0, 5, 6]).int(), torch.tensor([True, False])
    parameters = (layer.A_log, layer.dt_bias, layer.norm_weight, torch.empty(6, layer.HV * layer.V))
    torch.library.opcheck(paged._prefill.default, (*pool, offsets, resumed, *parameters, 2, None, 1e-5, 0.25))
