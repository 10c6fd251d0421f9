"""The states on the way in Triton, interpreted or on a GPU: those of test_kda_states, from the scan itself."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from kimi_kernels import _triton, chunk_kda, chunk_kda_states
from kimi_kernels.kda import ops
from kimi_kernels.kda import triton as backend_triton

pytest.importorskip("triton")
DEVICE = "cpu" if _triton.interpreting() else "cuda"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)


@pytest.fixture(autouse=True)
def _forced(backend):
    backend("triton")


@pytest.fixture
def inputs(make):
    return lambda *shape: [x.to(DEVICE) for x in make(*shape, dtype=torch.bfloat16)]


@pytest.mark.parametrize("v_first", [False, True])
def test_are_the_final_states_of_prefixes(inputs, v_first):
    """To the bit: the same chunks in the same order."""
    tensors, initial = inputs(2, 140, 1, 2, 16, 24), torch.randn(2, 2, 24, 16, device=DEVICE)
    initial = initial if v_first else initial.mT.contiguous()
    options = {"initial_state": initial, "state_v_first": v_first}
    out, final, states = chunk_kda_states(*tensors, **options, state_interval=64)
    whole, wanted = chunk_kda(*tensors, **options, output_final_state=True)
    assert torch.equal(out, whole) and torch.equal(final, wanted)
    assert states.shape == (2 * 2, *initial.shape[1:]) and states.dtype == torch.float32
    for i in (1, 2):
        _, prefix = chunk_kda(*(x[:, : 64 * i] for x in tensors), **options, output_final_state=True)
        assert torch.equal(states.unflatten(0, (2, 2))[:, i - 1], prefix)


@pytest.mark.parametrize("segments", [1, 3])
def test_of_packed_sequences(inputs, monkeypatch, segments):
    if segments > 1:
        monkeypatch.setattr(backend_triton, "LEAST_CHUNKS", 1)
        monkeypatch.setattr(backend_triton, "segment_count", lambda *_: segments)
    offsets = [0, 0, 260, 320, 460, 461]
    tensors, initial = inputs(1, 461, 1, 1, 16, 16), torch.randn(5, 1, 16, 16, device=DEVICE)
    packed = torch.tensor(offsets, device=DEVICE)
    _, _, states = chunk_kda_states(*tensors, initial_state=initial, cu_seqlens=packed, state_interval=128)
    known = set()
    for n, (a, b) in enumerate(pairwise(offsets)):
        for i in range(1, (b - a) // 128 + 1):
            part = (x[:, a : a + 128 * i] for x in tensors)
            _, prefix = chunk_kda(*part, initial_state=initial[n : n + 1], output_final_state=True)
            row = a // 128 + i - 1
            known.add(row)
            if segments == 1:
                assert torch.equal(states[row], prefix[0])
            else:
                torch.testing.assert_close(states[row], prefix[0], rtol=0.02, atol=0.02)
    assert known == {0, 1, 2} and len(states) == 3


def test_rows_of_no_sequence_are_zeros(inputs):
    tensors = inputs(1, 130, 1, 1, 16, 16)
    offsets = torch.tensor([0, 63, 130], device=DEVICE)
    states = chunk_kda_states(*tensors, cu_seqlens=offsets)[2]
    assert states[0].any() and not states[1].any()


@pytest.mark.slow
def test_opcheck(make):
    tensors = [x.to(DEVICE) for x in make(1, 80, 1, 1, 16, 16)]
    options = (0.3, True, False, True, False, None, True)
    torch.library.opcheck(ops.chunk_states.default, (*tensors, None, None, None, None, 64, *options))
