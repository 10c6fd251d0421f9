"""Causal convolution against torch.nn.functional.conv1d in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from kimi_kernels import BackendError, causal_conv1d


def oracle(
    x, weight, bias=None, activation=None, initial_state=None, output_final_state=False, cu_seqlens=None
):
    channels, width = weight.shape
    if cu_seqlens is None:
        parts = list(x)
    else:
        parts = [x[0, a:b] for a, b in pairwise(cu_seqlens.tolist())]
    ys, finals = [], []
    for n, part in enumerate(parts):
        history = x.new_zeros(channels, width) if initial_state is None else initial_state[n]
        inputs = torch.cat([history, part.T], 1)
        y = F.conv1d(inputs[None, :, 1:], weight[:, None], bias, groups=channels)[0] if len(part) else part.T
        ys.append((F.silu(y) if activation else y).T)
        finals.append(inputs[:, inputs.shape[1] - width :])
    y = torch.stack(ys) if cu_seqlens is None else torch.cat(ys)[None]
    return (y, torch.stack(finals)) if output_final_state else (y, None)


# T = 600 takes three pieces of the native kernel's token split; D = 300 two of its channel split.
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("batch, tokens, channels", [(2, 1, 5), (1, 600, 20), (3, 6, 300), (1, 0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_and_gradients_match_float64(
    isa, dtype, batch, tokens, channels, width, activation, accurate_with_gradients
):
    x = torch.randn(batch, tokens, channels).to(dtype)
    weight, bias = torch.randn(channels, width).to(dtype), torch.randn(channels).to(dtype)
    state = torch.randn(batch, channels, width)
    accurate_with_gradients(
        lambda x, w, b, s: causal_conv1d(x, w, b, activation, s, True),
        lambda x, w, b, s: oracle(x, w, b, activation, s, True),
        [x, weight, bias, state],
    )
    accurate_with_gradients(
        lambda x, w: causal_conv1d(x, w, activation=activation),
        lambda x, w: oracle(x, w, activation=activation),
        [x, weight],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offsets", [[0, 0, 1, 3, 260, 600, 600], [0, 1], [0, 300]])
def test_packed_sequences_match_float64(isa, offsets, dtype, accurate_with_gradients):
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    x, weight = torch.randn(1, offsets[-1], 24).to(dtype), torch.randn(24, 4).to(dtype)
    state = torch.randn(len(offsets) - 1, 24, 4)
    accurate_with_gradients(
        lambda x, w, s: causal_conv1d(x, w, None, "silu", s, True, cu_seqlens),
        lambda x, w, s: oracle(x, w, None, "silu", s, True, cu_seqlens),
        [x, weight, state],
    )


def test_cut_anywhere_gives_the_same_bits(isa):
    x, weight = torch.randn(2, 9, 33), torch.randn(33, 4)
    whole, final = causal_conv1d(x, weight, None, "silu", output_final_state=True)
    for cut in range(10):
        first, state = causal_conv1d(x[:, :cut], weight, None, "silu", output_final_state=True)
        second, last = causal_conv1d(x[:, cut:], weight, None, "silu", state, output_final_state=True)
        assert torch.equal(torch.cat([first, second], 1), whole)
        assert torch.equal(last, final)


def test_packed_sequence_has_the_bits_it_has_alone(isa):
    x, weight, cu_seqlens = torch.randn(1, 400, 40), torch.randn(40, 4), torch.tensor([0, 7, 300, 400])
    packed, _ = causal_conv1d(x, weight, None, "silu", cu_seqlens=cu_seqlens)
    for a, b in pairwise(cu_seqlens.tolist()):
        assert torch.equal(causal_conv1d(x[:, a:b], weight, None, "silu")[0], packed[:, a:b])


def test_the_future_does_not_change_the_past(isa):
    x, weight = torch.randn(1, 20, 16), torch.randn(16, 4)
    before, _ = causal_conv1d(x, weight)
    x[:, 11:] = float("nan")
    after, _ = causal_conv1d(x, weight)
    assert torch.equal(before[:, :11], after[:, :11])


def test_slices_of_a_wider_tensor(native, accurate_with_gradients):
    wide, weight = torch.randn(2, 50, 96), torch.randn(32, 4)
    accurate_with_gradients(
        lambda t, w: causal_conv1d(t[:, :, 32:64], w, None, "silu"),
        lambda t, w: oracle(t[:, :, 32:64], w, None, "silu"),
        [wide, weight],
    )
    transposed = torch.randn(2, 32, 50)
    y, _ = causal_conv1d(transposed.transpose(1, 2), weight)
    assert torch.equal(y, causal_conv1d(transposed.transpose(1, 2).contiguous(), weight)[0])


def test_gradcheck_in_float64():
    leaf = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 1, 1, 6])
    assert torch.autograd.gradcheck(
        lambda x, w, b, s: causal_conv1d(x, w, b, "silu", s, True, cu_seqlens),
        (leaf(1, 6, 2), leaf(2, 3), leaf(2), leaf(3, 2, 3)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(native, dtype):
    leaf = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=True)
    op = torch.ops.kimi.causal_conv1d.default
    cu_seqlens = torch.tensor([0, 2, 6])
    torch.library.opcheck(op, (leaf(1, 6, 8), leaf(8, 4), leaf(8), leaf(2, 8, 4), cu_seqlens, True, True))
    torch.library.opcheck(op, (leaf(2, 6, 8), leaf(8, 4), None, None, None, False, False))


def test_traces_without_graph_breaks(native):
    def step(x, w):
        y, state = causal_conv1d(x, w, None, "silu", output_final_state=True)
        return y.sin().sum() + state.sum()

    x, weight = torch.randn(2, 5, 16, requires_grad=True), torch.randn(16, 4)
    (grad,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x, weight), x)
    (expected,) = torch.autograd.grad(step(x, weight), x)
    assert torch.equal(grad, expected)


def test_wide_kernels_run_on_the_reference(native, monkeypatch, accurate):
    x, weight = torch.randn(1, 20, 4), torch.randn(4, 12)
    accurate("y", causal_conv1d(x, weight)[0], oracle(x.double(), weight.double())[0])
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "cpu")
    with pytest.raises(BackendError, match="takes kernel widths 2 to 8, got 12"):
        causal_conv1d(x, weight)


@pytest.mark.parametrize(
    "offsets, message",
    [
        ([1, 6], "cu_seqlens must start at 0, got 1: pass offsets of the packed batch"),
        ([0, 5], "cu_seqlens must end at T = 6, got 5"),
        ([0, 4, 3, 6], r"cu_seqlens must not decrease, got \[0, 4, 3, 6\]"),
    ],
)
def test_bad_offsets(offsets, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(torch.randn(1, 6, 4), torch.randn(4, 4), cu_seqlens=torch.tensor(offsets))


def test_errors_name_the_argument():
    x, weight = torch.randn(2, 6, 4), torch.randn(4, 4)
    with pytest.raises(ValueError, match=r"weight must be \[4, W\] to match x, got shape \(5, 4\)"):
        causal_conv1d(x, torch.randn(5, 4))
    with pytest.raises(ValueError, match="activation must be None or 'silu', got 'relu'"):
        causal_conv1d(x, weight, activation="relu")
    with pytest.raises(ValueError, match=r"packed into one row .* got B = 2"):
        causal_conv1d(x, weight, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(
        ValueError, match=r"initial_state must be \[N, D, W\] = \(2, 4, 4\), got shape \(1, 4, 4\)"
    ):
        causal_conv1d(x, weight, initial_state=torch.randn(1, 4, 4))
