"""The states on the way: after every so many tokens of a sequence, wherever it lies in a packed batch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from kimi_kernels import chunk_kda, chunk_kda_states
from kimi_kernels.kda import ops


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def _backend(request, native, backend):
    backend(request.param)


@pytest.mark.parametrize("v_first", [False, True])
def test_are_the_final_states_of_prefixes(make, v_first):
    inputs, initial = make(2, 200, 1, 2, 16, 24), torch.randn(2, 2, 24, 16)
    initial = initial if v_first else initial.mT.contiguous()
    options = {"initial_state": initial, "state_v_first": v_first}
    out, final, states = chunk_kda_states(*inputs, **options, state_interval=64)
    whole, wanted = chunk_kda(*inputs, **options, output_final_state=True)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(final, wanted)
    assert states.shape == (2 * 3, *initial.shape[1:]) and states.dtype == torch.float32
    for i in (1, 2, 3):
        _, prefix = chunk_kda(*(x[:, : 64 * i] for x in inputs), **options, output_final_state=True)
        torch.testing.assert_close(states.unflatten(0, (2, 3))[:, i - 1], prefix)


def test_of_packed_sequences(make):
    offsets = [0, 0, 130, 190, 330, 331]
    inputs, initial = make(1, 331, 1, 1, 16, 16), torch.randn(5, 1, 16, 16)
    options = {"initial_state": initial, "cu_seqlens": torch.tensor(offsets)}
    out, final, states = chunk_kda_states(*inputs, **options, state_interval=64)
    whole, wanted = chunk_kda(*inputs, **options, output_final_state=True)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(final, wanted)
    known = set()
    for n, (a, b) in enumerate(pairwise(offsets)):
        for i in range(1, (b - a) // 64 + 1):
            part = (x[:, a : a + 64 * i] for x in inputs)
            _, prefix = chunk_kda(*part, initial_state=initial[n : n + 1], output_final_state=True)
            row = a // 64 + i - 1
            torch.testing.assert_close(states[row], prefix[0])
            known.add(row)
    assert len(known) == 4 and len(states) == 5
    assert not any(states[row].any() for row in range(5) if row not in known)


def test_a_sequence_goes_on_from_one(make):
    """What a prefix cache does: the rest from a state gives what the whole gives."""
    inputs = make(1, 150, 1, 1, 16, 16)
    out, final, states = chunk_kda_states(*inputs, state_interval=64)
    rest, end = chunk_kda(*(x[:, 128:] for x in inputs), initial_state=states[1:2], output_final_state=True)
    torch.testing.assert_close(rest, out[:, 128:])
    torch.testing.assert_close(end, final)


def test_nothing_to_give(make):
    assert chunk_kda_states(*make(2, 63, 1, 1, 16, 16))[2].shape == (0, 1, 16, 16)
    assert chunk_kda_states(*make(1, 0, 1, 1, 16, 16))[1].shape == (1, 1, 16, 16)
    out, final, states = chunk_kda_states(*make(1, 0, 1, 1, 16, 16), cu_seqlens=torch.tensor([0]))
    assert out.shape == (1, 0, 1, 16) and len(final) == len(states) == 0


@pytest.mark.parametrize("interval", [0, -64, 16, 100])
def test_intervals_between_the_chunks(make, interval):
    with pytest.raises(ValueError, match=f"state_interval must be a positive multiple of 64, got {interval}"):
        chunk_kda_states(*make(1, 70, 1, 1, 16, 16), state_interval=interval)


def test_no_gradients(make):
    inputs = [x.requires_grad_() for x in make(1, 70, 1, 1, 16, 16)]
    with pytest.raises(ValueError, match="chunk_kda_states has no gradients: call it under"):
        chunk_kda_states(*inputs)
    with torch.no_grad():
        chunk_kda_states(*inputs)


def test_opcheck(make):
    inputs = make(1, 80, 1, 2, 16, 16)
    more = (torch.randn(2, 2, 16, 16), torch.randn(2), torch.randn(32), torch.tensor([0, 66, 80]))
    options = (0.3, True, True, True, False, -5.0, True)
    torch.library.opcheck(ops.chunk_states.default, (*inputs, *more, 64, *options))
    plain = (0.3, False, False, False, False, None, False)
    torch.library.opcheck(ops.chunk_states.default, (*inputs, None, None, None, None, 64, *plain))


@pytest.mark.slow
def test_compiles_as_one_graph(make):
    inputs = make(1, 130, 1, 1, 16, 16)
    compiled = torch.compile(chunk_kda_states, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(compiled(*inputs), chunk_kda_states(*inputs)):
        assert torch.equal(actual, wanted)
