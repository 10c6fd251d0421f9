"""kda_prefill and kda_decode against the layer's formulas in float64, and against each other."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from kimi_kernels import kda_decode, kda_prefill

BACKENDS = ["cpu", "reference"]
SLOTS, SPECULATED = 8, 3


class Layer:
    """A random layer, its pools, and what its ops should do, in float64."""

    def __init__(self, H=2, HV=2, K=32, V=32, W=4, lower_bound=None, dtype=torch.float32, v_last=False):
        self.H, self.HV, self.K, self.V, self.W = H, HV, K, V, W
        self.channels = 2 * H * K + HV * V
        self.dtype = dtype
        self.conv_weight = torch.randn(self.channels, W).to(dtype)
        self.A_log, self.dt_bias = torch.randn(HV), torch.randn(HV * K)
        self.norm_weight = torch.rand(V)
        self.constants = {"num_heads": H, "head_dim": K, "lower_bound": lower_bound}
        entries = W - 1 + SPECULATED
        conv = torch.randn(SLOTS, self.channels, entries).transpose(1, 2) if v_last else None
        self.conv_state = (torch.randn(SLOTS, entries, self.channels) if conv is None else conv).to(dtype)
        room = torch.randn(SLOTS, 2, HV, V, K)  # slots of a pool shared with other layers: strided
        self.state = room[:, 1]

    def tokens(self, T):
        shapes = ([self.channels], [self.HV, self.K], [self.HV], [self.HV, self.V])
        return [torch.randn(T, *shape).to(self.dtype) for shape in shapes]

    def pools(self):
        return self.conv_state.clone(memory_format=torch.preserve_format), self.state.clone()

    def prefill(self, tokens, pools, slots, offsets, resumed, **more):
        return kda_prefill(
            *tokens, self.conv_weight, *pools, torch.tensor(slots, dtype=torch.int32),
            torch.tensor(offsets, dtype=torch.int32), torch.tensor(resumed), self.A_log, self.dt_bias,
            self.norm_weight, **self.constants, **more,
        )  # fmt: skip

    def decode(self, tokens, pools, slots, **more):
        return kda_decode(
            *tokens, self.conv_weight, *pools, torch.tensor(slots, dtype=torch.int32), self.A_log, self.dt_bias,
            self.norm_weight, **self.constants, **more,
        )  # fmt: skip

    def exact(self, oracle, tokens, history, state):
        """Output, last inputs and state after these tokens of one sequence."""
        x, g, beta, gate = (t.double() for t in tokens)
        inputs = torch.cat([history.double(), x])
        y = F.silu(F.conv1d(inputs.T[None], self.conv_weight.double()[:, None], groups=self.channels))[0].T
        q, k, v = y.split([self.H * self.K] * 2 + [self.HV * self.V], -1)
        out, final = oracle(
            q.view(1, -1, self.H, self.K), k.view(1, -1, self.H, self.K), v.view(1, -1, self.HV, self.V),
            g[None], beta[None], initial_state=state.double()[None], output_final_state=True, state_v_first=True,
            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
            lower_bound=self.constants["lower_bound"], A_log=self.A_log.double(), dt_bias=self.dt_bias.double(),
        )  # fmt: skip
        out = F.rms_norm(out[0], (self.V,), self.norm_weight.double(), 1e-5) * gate.sigmoid()
        return out.flatten(1), inputs[len(x) :], final[0]


LAYERS = [
    {},
    {"H": 1, "HV": 3, "K": 24, "V": 40, "lower_bound": -5.0, "W": 3},
    {"K": 128, "V": 128, "v_last": True},
    {"K": 64, "V": 64, "dtype": torch.bfloat16, "lower_bound": -5.0},
]


@pytest.mark.parametrize("settings", LAYERS)
@pytest.mark.parametrize("name", BACKENDS)
def test_prefill(isa, backend, oracle, accurate, settings, name):
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
def test_decode(isa, backend, oracle, accurate, settings, name):
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
def test_prefill_in_chunks_then_decode_equals_one_prefill(isa, backend, accurate, settings):
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
def test_results_do_not_depend_on_the_batch_or_the_threads(isa, backend, threads):
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
def test_speculation_rolls_back(isa, backend, accurate, settings, name):
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


def test_what_padding_holds_does_not_spread(isa, backend):
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


def test_writes_into_out(native, backend):
    backend("cpu")
    layer = Layer()
    tokens = layer.tokens(4)
    room = torch.zeros(4, 2 * layer.HV * layer.V)
    out = layer.decode(tokens, layer.pools(), [0, 1, 2, 3], out=room[:, : layer.HV * layer.V])
    assert out.data_ptr() == room.data_ptr()
    assert torch.equal(out, layer.decode(tokens, layer.pools(), [0, 1, 2, 3]))
    assert not room[:, layer.HV * layer.V :].any()
