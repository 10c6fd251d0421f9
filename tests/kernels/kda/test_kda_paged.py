"""kda_prefill and kda_decode against the layer's formulas in float64, and against each other."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

BACKENDS = ["cpu", "reference"]
LAYERS = [
    {},
    {"H": 1, "HV": 3, "K": 24, "V": 40, "lower_bound": -5.0, "W": 3},
    {"K": 128, "V": 128, "v_last": True},
    {"K": 64, "V": 64, "dtype": torch.bfloat16, "lower_bound": -5.0},
]


@pytest.mark.parametrize("settings", LAYERS)
@pytest.mark.parametrize("name", BACKENDS)
def test_prefill(Layer, isa, backend, oracle, accurate, settings, name):
    backend(name)
    layer = Layer(**settings)
    offsets, slots, resumed = (
        [0, 1, 3, 3, 40, 42, 60],
        [3, 0, 5, 7, -1, 2],
        [True, True, True, False, True, False],
    )
    tokens, pools = layer.tokens(62), layer.pools()
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
            accurate(f"output {n}", out[a:b], exact)
            assert torch.equal(pools[0][slot, : layer.W - 1].double(), last)
            accurate(f"state {n}", pools[1][slot], final)
    assert not out[60:].any(), "tokens behind the last sequence are padding"
    for slot in (1, 4, 5, 6):
        assert torch.equal(pools[0][slot], conv[slot]) and torch.equal(pools[1][slot], state[slot])


@pytest.mark.parametrize("settings", LAYERS)
@pytest.mark.parametrize("name", BACKENDS)
def test_decode(Layer, isa, backend, oracle, accurate, settings, name):
    backend(name)
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
def test_prefill_in_chunks_then_decode_equals_one_prefill(Layer, isa, backend, accurate, settings):
    backend("cpu")
    layer = Layer(**settings)
    tokens = layer.tokens(50)
    whole, pieces = layer.pools(), layer.pools()
    out = layer.prefill(tokens, whole, [4], [0, 50], [False])
    parts = []
    for a, b in pairwise([0, 2, 3, 20, 36, 45]):
        parts.append(layer.prefill([t[a:b] for t in tokens], pieces, [4], [0, b - a], [a > 0]))
    for t in range(45, 50):
        parts.append(layer.decode([x[t : t + 1] for x in tokens], pieces, [4]))
    if layer.dtype == torch.float32:
        accurate("output", torch.cat(parts), out.double())
    else:
        torch.testing.assert_close(torch.cat(parts), out)  # each side rounds its own result to bf16
    accurate("state", pieces[1][4], whole[1][4].double())
    assert torch.equal(pieces[0][4, : layer.W - 1], whole[0][4, : layer.W - 1])


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_results_do_not_depend_on_the_batch_or_the_threads(Layer, isa, backend, threads):
    backend("cpu")
    layer = Layer(K=64, V=64)
    tokens = layer.tokens(40)
    alone, packed, stepped = layer.pools(), layer.pools(), layer.pools()
    expected = [layer.prefill([t[a:b] for t in tokens], alone, [slot], [0, b - a], [True])
                for slot, a, b in [(3, 0, 17), (1, 17, 18), (6, 18, 40)]]  # fmt: skip
    torch.set_num_threads(threads)
    out = layer.prefill(tokens, packed, [3, 1, 6], [0, 17, 18, 40], [True] * 3)
    assert torch.equal(out, torch.cat(expected))
    assert torch.equal(packed[0], alone[0]) and torch.equal(packed[1], alone[1])
    step = layer.decode([t[17:18] for t in tokens], stepped, [1])
    assert torch.equal(step, expected[1]), "a prefill of one token is a decode step"


@pytest.mark.parametrize("settings", LAYERS)
@pytest.mark.parametrize("name", BACKENDS)
def test_speculation_rolls_back(Layer, isa, backend, accurate, settings, name):
    """Whatever was drafted and rejected, the kept tokens give what plain decoding of them gives."""
    backend(name)
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
    assert done == 9
    assert torch.equal(pools[1][slots[0][accepted - 1]], plain[1][5])


def test_what_padding_holds_does_not_spread(Layer, isa, backend):
    """NaN in unused slots, unused entries, padded tokens and behind the projections."""
    backend("cpu")
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
    assert torch.equal(out, expected)
    for slot in slots:
        assert torch.equal(state[slot], clean[1][slot])


def test_writes_into_out(Layer, native, backend):
    backend("cpu")
    layer = Layer()
    tokens = layer.tokens(4)
    room = torch.zeros(4, 2 * layer.HV * layer.V)
    out = layer.decode(tokens, layer.pools(), [0, 1, 2, 3], out=room[:, : layer.HV * layer.V])
    assert out.data_ptr() == room.data_ptr()
    assert torch.equal(out, layer.decode(tokens, layer.pools(), [0, 1, 2, 3]))
    assert not room[:, layer.HV * layer.V :].any()
