"""The decode kernel in Triton's interpreter, against the layer's formulas in float64 and the reference's pools."""

from __future__ import annotations

import pytest
import torch

from kimi_kernels import _triton

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not _triton.interpreting(), reason="needs TRITON_INTERPRET=1")

LAYERS = [
    {},
    {"H": 1, "HV": 3, "K": 24, "V": 40, "lower_bound": -5.0, "W": 3},
    {"K": 128, "V": 128, "v_last": True},
    {"K": 64, "V": 64, "dtype": torch.bfloat16, "lower_bound": -5.0},
]


@pytest.fixture(autouse=True)
def _forced(backend):
    backend("triton")


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
