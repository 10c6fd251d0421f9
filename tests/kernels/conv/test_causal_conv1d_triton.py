"""The causal convolution on Triton kernels, interpreted or on a GPU, against torch.nn.functional.conv1d in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from kimi_kernels import BackendError, _triton, causal_conv1d

pytest.importorskip("triton")
DEVICE = "cpu" if _triton.interpreting() else "cuda"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)


@pytest.fixture(autouse=True)
def _forced(monkeypatch):
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "triton")


def conv(*args, **options):
    move = lambda x, device: x.to(device) if isinstance(x, torch.Tensor) else x
    found = causal_conv1d(*(move(x, DEVICE) for x in args), **{k: move(x, DEVICE) for k, x in options.items()})
    return tuple(move(x, "cpu") for x in found)


def oracle(
    x, weight, bias=None, activation=None, initial_state=None, output_final_state=False, cu_seqlens=None
):
    channels, width = weight.shape
    parts = list(x) if cu_seqlens is None else [x[0, a:b] for a, b in pairwise(cu_seqlens.tolist())]
    ys, finals = [], []
    for n, part in enumerate(parts):
        history = x.new_zeros(channels, width) if initial_state is None else initial_state[n]
        inputs = torch.cat([history, part.T], 1)
        y = F.conv1d(inputs[None, :, 1:], weight[:, None], bias, groups=channels)[0] if len(part) else part.T
        ys.append((F.silu(y) if activation else y).T)
        finals.append(inputs[:, inputs.shape[1] - width :])
    y = torch.stack(ys) if cu_seqlens is None else torch.cat(ys)[None]
    return (y, torch.stack(finals)) if output_final_state else (y, None)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch, tokens, channels", [(2, 1, 5), (1, 70, 20), (2, 6, 70), (1, 0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_and_gradients_match_float64(
    dtype, batch, tokens, channels, width, activation, accurate_with_gradients
):
    x = torch.randn(batch, tokens, channels).to(dtype)
    weight, bias = torch.randn(channels, width).to(dtype), torch.randn(channels).to(dtype)
    state = torch.randn(batch, channels, width)
    accurate_with_gradients(
        lambda x, w, b, s: conv(x, w, b, activation, s, True),
        lambda x, w, b, s: oracle(x, w, b, activation, s, True),
        [x, weight, bias, state],
    )
    accurate_with_gradients(
        lambda x, w: conv(x, w, activation=activation),
        lambda x, w: oracle(x, w, activation=activation),
        [x, weight],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offsets", [[0, 0, 1, 3, 40, 100, 100], [0, 1], [0, 32, 64, 65]])
def test_packed_sequences_match_float64(offsets, dtype, accurate_with_gradients):
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    x, weight = torch.randn(1, offsets[-1], 24).to(dtype), torch.randn(24, 4).to(dtype)
    state = torch.randn(len(offsets) - 1, 24, 4)
    accurate_with_gradients(
        lambda x, w, s: conv(x, w, None, "silu", s, True, cu_seqlens),
        lambda x, w, s: oracle(x, w, None, "silu", s, True, cu_seqlens),
        [x, weight, state],
    )


def test_cut_anywhere_gives_the_same_bits():
    x, weight = torch.randn(2, 9, 33), torch.randn(33, 4)
    whole, final = conv(x, weight, None, "silu", output_final_state=True)
    for cut in range(10):
        first, state = conv(x[:, :cut], weight, None, "silu", output_final_state=True)
        second, last = conv(x[:, cut:], weight, None, "silu", state, output_final_state=True)
        assert torch.equal(torch.cat([first, second], 1), whole)
        assert torch.equal(last, final)


def test_packed_and_batched_sequences_have_the_bits_of_each_alone():
    x, weight, cu_seqlens = torch.randn(1, 100, 40), torch.randn(40, 4), torch.tensor([0, 7, 75, 100])
    packed, _ = conv(x, weight, None, "silu", cu_seqlens=cu_seqlens)
    for a, b in pairwise(cu_seqlens.tolist()):
        assert torch.equal(conv(x[:, a:b], weight, None, "silu")[0], packed[:, a:b])
    batch = x.view(2, 50, 40)
    assert torch.equal(conv(batch[1:], weight)[0], conv(batch, weight)[0][1:])


def test_the_future_does_not_change_the_past():
    x, weight = torch.randn(1, 20, 16), torch.randn(16, 4)
    before, _ = conv(x, weight)
    x[:, 11:] = float("nan")
    after, _ = conv(x, weight)
    assert torch.equal(before[:, :11], after[:, :11])


def test_dtypes_may_differ(accurate):
    x, weight, bias, state = torch.randn(1, 9, 8).bfloat16(), torch.randn(8, 4), torch.randn(8), torch.randn(1, 8, 4)
    y, final = conv(x, weight, bias, None, state.bfloat16(), True)
    exact = [t.double() for t in (x, weight, bias, state.bfloat16())]
    wanted, wanted_final = oracle(*exact[:3], None, exact[3], True)
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    accurate("y", y, wanted)
    assert torch.equal(final.double(), wanted_final)


def test_slices_of_a_wider_tensor(accurate_with_gradients):
    wide, weight = torch.randn(2, 40, 96), torch.randn(32, 4)
    accurate_with_gradients(
        lambda t, w: conv(t[:, :, 32:64], w, None, "silu"),
        lambda t, w: oracle(t[:, :, 32:64], w, None, "silu"),
        [wide, weight],
    )
    transposed = torch.randn(2, 32, 40)
    y, _ = conv(transposed.transpose(1, 2), weight)
    assert torch.equal(y, conv(transposed.transpose(1, 2).contiguous(), weight)[0])
    state = torch.randn(2, 4, 32).transpose(1, 2)
    assert torch.equal(conv(wide[:, :, :32], weight, initial_state=state)[0],
                       conv(wide[:, :, :32], weight, initial_state=state.contiguous())[0])  # fmt: skip


def test_expanded_gradients(accurate):
    x, weight = torch.randn(1, 9, 8, requires_grad=True), torch.randn(8, 4)
    conv(x, weight, None, "silu")[0].sum().backward()  # the gradient of sum() has stride 0
    exact = x.detach().double().requires_grad_()
    oracle(exact, weight.double(), None, "silu")[0].sum().backward()
    accurate("dx", x.grad, exact.grad)


@pytest.mark.slow
def test_opcheck():
    leaf = lambda *shape: torch.randn(*shape, device=DEVICE, requires_grad=True)
    op = torch.ops.kimi.causal_conv1d.default
    cu_seqlens = torch.tensor([0, 2, 6], device=DEVICE)
    torch.library.opcheck(op, (leaf(1, 6, 8), leaf(8, 4), leaf(8), leaf(2, 8, 4), cu_seqlens, True, True))
    torch.library.opcheck(op, (leaf(2, 6, 8), leaf(8, 4), None, None, None, False, False))


@pytest.mark.slow
def test_compiles_as_one_graph():
    def step(x, w):
        y, state = causal_conv1d(x, w, None, "silu", output_final_state=True)
        return y.sin().sum() + state.sum()

    x, weight = torch.randn(2, 5, 16, device=DEVICE, requires_grad=True), torch.randn(16, 4, device=DEVICE)
    (grad,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x, weight), x)
    (expected,) = torch.autograd.grad(step(x, weight), x)
    assert torch.equal(grad, expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="values of offsets on a device are not read")
@pytest.mark.parametrize(
    "offsets, message",
    [
        ([1, 6], "cu_seqlens must start at 0, got 1: pass offsets of the packed batch"),
        ([0, 5], "cu_seqlens must end at T = 6, got 5"),
        ([0, 4, 3, 6], r"cu_seqlens must not decrease, got \[0, 4, 3, 6\]"),
    ],
)
def test_bad_offsets_never_reach_a_kernel(offsets, message, monkeypatch):
    monkeypatch.setattr(_triton, "launch", lambda *_, **__: pytest.fail("launched"))
    with pytest.raises(ValueError, match=message):
        conv(torch.randn(1, 6, 4), torch.randn(4, 4), cu_seqlens=torch.tensor(offsets))


def test_what_it_cannot_run_is_said():
    x = torch.randn(1, 6, 4)
    with pytest.raises(BackendError, match="cannot run causal_conv1d: takes kernel widths 1 to 8, got 9"):
        conv(x, torch.randn(4, 9))
    with pytest.raises(BackendError, match="cannot run causal_conv1d: computes in float32, got float64 for x"):
        conv(x.double(), torch.randn(4, 4))
