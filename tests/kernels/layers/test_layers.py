"""Prepared layers against the single ops they are made of, and latent and dense layers against float64 formulas."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kimi_kernels import KdaDecodeLayer, MlaLayer, MoeLayer, moe_experts, moe_route
from kimi_kernels.layers import _layout

# A bfloat16 layer rounds at every product and norm on the way; the paths round at the same places, sums differ.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    assert error < TOLERANCE[actual.dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("name", ["KdaWeights", "MlaWeights", "MoeWeights"])
def test_structs_are_those_of_the_header(name):
    header = (Path(__file__).parents[3] / "kernels" / "csrc" / "layers.h").read_text()
    structure = getattr(_layout, name)
    assert ctypes.sizeof(structure) == int(re.search(rf"sizeof\({name}\) == (\d+)", header)[1])
    body = re.sub(r"//[^\n]*", "", re.search(rf"struct {name} \{{(.*?)\n\}};", header, re.DOTALL)[1])
    declared = [re.search(r"(\w+)\s*$", part)[1] for part in re.split(r"[;,]", body) if part.strip()]
    assert [field[0] for field in structure._fields_] == declared


class Kda:
    """A layer of 2 q/k and 4 value heads of 16 channels, gates of rank 8, on pools of 7 slots."""

    H, HV, K, R, D, O = 2, 4, 16, 8, 40, 24

    def __init__(self, dtype=torch.float32, lower_bound=None, drafts=0):
        width = self.HV * self.K
        channels = 2 * self.H * self.K + width
        self.weights = [
            (torch.randn(channels + 2 * self.R + self.HV, self.D) / self.D**0.5).to(dtype),
            (torch.randn(2, width, self.R) / self.R**0.5).to(dtype),
            (torch.randn(self.O, width) / width**0.5).to(dtype),
        ]
        self.conv = torch.randn(channels, 4)
        self.conv_state = torch.randn(7, 3 + drafts, channels).to(dtype)
        self.state = torch.randn(7, self.HV, self.K, self.K)
        self.parameters = [torch.randn(self.HV), torch.randn(width), torch.rand(self.K) + 0.5]
        self.lower_bound = lower_bound

    def layer(self, **changes):
        return KdaDecodeLayer(
            *self.weights, self.conv, self.conv_state.clone(), self.state.clone(), *self.parameters,
            **{"num_heads": self.H, "lower_bound": self.lower_bound} | changes,
        )  # fmt: skip


def run_both(kda: Kda, *call):
    """Results and pools of one native call and of the single ops."""
    results = []
    for native in (True, False):
        layer = kda.layer()
        assert layer.refusal is None
        if not native:
            layer.refusal = "to compare"
        results.append((layer(*call), *layer.pools[1:]))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("slots", [[3], [5, 0, 2, 6], [1, -1, 4]])
def test_kda_decode_is_that_of_the_ops(isa, dtype, lower_bound, slots):
    kda = Kda(dtype, lower_bound)
    hidden = torch.randn(len(slots), kda.D).to(dtype)
    native, ops = run_both(kda, hidden, torch.tensor(slots, dtype=torch.int32))
    for mine, theirs in zip(native, ops):
        close(mine, theirs)


def test_kda_speculation_is_that_of_the_ops(isa):
    kda = Kda(drafts=2)
    slots = torch.tensor([[0, 1, 2], [4, 5, 6]], dtype=torch.int32)
    offsets, accepted = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([2, 1], dtype=torch.int32)
    native, ops = run_both(kda, torch.randn(5, kda.D), slots, offsets, accepted)
    for mine, theirs in zip(native, ops):
        close(mine, theirs)


def test_kda_sees_new_values_in_the_same_places(native):
    kda = Kda()
    layer = kda.layer()
    hidden, slots = torch.randn(2, kda.D), torch.tensor([0, 3], dtype=torch.int32)
    layer(hidden, slots)
    kda.weights[2].zero_()
    assert layer(hidden, slots).abs().max() == 0


def test_kda_takes_more_tokens_than_the_native_products(native):
    kda = Kda()
    kda.conv_state, kda.state = torch.zeros(200, 3, kda.conv.shape[0]), torch.zeros(200, kda.HV, kda.K, kda.K)
    hidden = torch.randn(200, kda.D)
    together = kda.layer()(hidden, torch.arange(200, dtype=torch.int32))
    alone = kda.layer()(hidden[150:151], torch.tensor([150], dtype=torch.int32))
    close(together[150:151], alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k: k.weights.__setitem__(0, torch.randn(9, k.D)), "in_proj must have"),
        (lambda k: k.weights.__setitem__(1, torch.randn(2, 9, 8)), r"gate_up must have shape \[2, 64, R\]"),
        (lambda k: k.weights.__setitem__(2, torch.randn(9, 9)), "o_proj must have shape"),
        (lambda k: setattr(k, "state", torch.randn(7, 4, 8, 16)), "V = K|conv_weight must have"),
    ],
)
def test_kda_names_what_does_not_fit(change, message):
    kda = Kda()
    change(kda)
    with pytest.raises(ValueError, match=message):
        kda.layer()


def test_kda_names_bad_calls(native):
    layer = Kda().layer()
    slot = torch.tensor([0], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"hidden must be torch.float32 \[T, 40\], got torch.float32 \(1, 39\)"):
        layer(torch.randn(1, 39), slot)
    with pytest.raises(ValueError, match="index outside"):
        layer(torch.randn(1, 40), torch.tensor([7], dtype=torch.int32))
    with pytest.raises(ValueError, match="state_indices names 2 sequences for 1 tokens"):
        layer(torch.randn(1, 40), torch.tensor([0, 1], dtype=torch.int32))


class Mla:
    """3 heads, nope 16, rope 8, value 12, latent 24; two sequences on pages of 4 rows."""

    H, NOPE, ROPE, V, RANK, D = 3, 16, 8, 12, 24, 40

    def __init__(self, dtype=torch.float32, q_rank=None):
        def weight(*shape):
            return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)

        query = self.H * (self.NOPE + self.ROPE)
        self.in_proj = weight((q_rank or query) + self.RANK + self.ROPE, self.D)
        self.latent_norm = (torch.rand(self.RANK) + 0.5).to(dtype)
        self.kv_up, self.o_proj = weight(self.H, self.NOPE + self.V, self.RANK), weight(self.D, self.H * self.V)
        self.q_norm = None if q_rank is None else (torch.rand(q_rank) + 0.5).to(dtype)
        self.q_up = None if q_rank is None else weight(query, q_rank)
        self.cache = torch.zeros(8, 4, self.RANK + self.ROPE, dtype=dtype)
        self.scale = (self.NOPE + self.ROPE) ** -0.5

    def layer(self):
        return MlaLayer(
            self.in_proj, self.latent_norm, self.kv_up, self.o_proj, self.cache.clone(),
            nope_dim=self.NOPE, scale=self.scale, q_norm=self.q_norm, q_up=self.q_up,
        )  # fmt: skip

    def oracle(self, hidden):
        """One sequence [T, D] in float64 with keys and values of every head written out."""
        up = {k: v.double() for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        first = self.in_proj.shape[0] - self.RANK - self.ROPE
        query, latent, shared = (hidden.double() @ up["in_proj"].t()).split([first, self.RANK, self.ROPE], -1)
        if self.q_up is not None:
            query = F.rms_norm(query, (first,), up["q_norm"], 1e-6) @ up["q_up"].t()
        latent = F.rms_norm(latent, (self.RANK,), up["latent_norm"], 1e-6)
        key, value = torch.einsum("tr,hnr->thn", latent, up["kv_up"]).split([self.NOPE, self.V], -1)
        key = torch.cat((key, shared[:, None].expand(-1, self.H, -1)), -1)
        scores = torch.einsum("qhd,khd->hqk", query.unflatten(-1, (self.H, -1)), key) * self.scale
        causal = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value).flatten(1) @ up["o_proj"].t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("q_rank", [None, 20])
@pytest.mark.parametrize("native_path", [True, False])
def test_mla_prefill_then_decode_matches_float64(isa, dtype, q_rank, native_path):
    mla = Mla(dtype, q_rank)
    layer = mla.layer()
    assert layer.refusal is None
    if not native_path:
        layer.refusal = "to compare"
    a, b = torch.randn(7, mla.D).to(dtype), torch.randn(5, mla.D).to(dtype)
    table = torch.tensor([[5, 0], [2, 7]], dtype=torch.int32)
    rows_a, rows_b = [20, 21, 22, 23, 0, 1, 2], [8, 9, 10, 11, 28]

    def call(hidden, rows, lengths, offsets):
        slots = torch.tensor(rows, dtype=torch.int64)
        return layer(hidden, slots, table, torch.tensor(lengths).int(), torch.tensor(offsets).int())

    first = call(torch.cat((a[:5], b[:4])), rows_a[:5] + rows_b[:4], [5, 4], [0, 5, 9])
    second = call(torch.cat((a[5:], b[4:])), rows_a[5:] + rows_b[4:], [7, 5], [0, 2, 3])
    close(torch.cat((first[:5], second[:2])), mla.oracle(a).to(dtype))
    close(torch.cat((first[5:], second[2:])), mla.oracle(b).to(dtype))


def test_mla_padding_writes_nothing(native):
    mla = Mla()
    layer = mla.layer()
    table, one = torch.tensor([[1]], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    layer(torch.randn(2, mla.D), torch.tensor([4, -1]), table, one, torch.tensor([0, 1], dtype=torch.int32))
    written = layer.cache.flatten(0, 1).abs().sum(-1).nonzero().flatten().tolist()
    assert written == [4]


def test_mla_names_what_does_not_fit():
    mla = Mla()
    with pytest.raises(ValueError, match=r"slots must be int64 \[2\], got torch.int32 \(2,\)"):
        mla.layer()(torch.randn(2, mla.D), torch.zeros(2, dtype=torch.int32), *[torch.zeros(1)] * 3)
    mla.o_proj = torch.randn(4, 5)
    with pytest.raises(ValueError, match=r"o_proj must be \[O, 36\], got shape \(4, 5\)"):
        mla.layer()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moe_is_that_of_the_ops(isa, dtype):
    gate, bias = torch.randn(6, 32), torch.randn(6)
    w13, w2 = (torch.randn(8, 40, 32) / 6).to(dtype), (torch.randn(8, 32, 20) / 5).to(dtype)
    x = torch.randn(9, 32).to(dtype)
    layer = MoeLayer(gate, bias, w13, w2, top_k=2, factor=2.5)
    assert layer.refusal is None
    expected = moe_experts(x, w13, w2, *moe_route(x, gate, bias, 2, factor=2.5, num_shared=2))
    assert torch.equal(layer(x), expected)
    layer.refusal = "to compare"
    assert torch.equal(layer(x), expected)


def test_a_layer_without_a_router_is_dense(isa, accurate):
    w13, w2, x = torch.randn(1, 26, 32) / 6, torch.randn(1, 32, 13) / 4, torch.randn(5, 32)
    gate, up = (x.double() @ w13[0].double().t()).chunk(2, -1)
    accurate("out", MoeLayer(None, None, w13, w2)(x), (F.silu(gate) * up) @ w2[0].double().t())


def test_moe_names_what_does_not_fit():
    with pytest.raises(ValueError, match="w13 must be"):
        MoeLayer(torch.randn(4, 8), torch.randn(4), torch.randn(4, 10, 8), torch.randn(4, 8, 6), top_k=1)
    with pytest.raises(ValueError, match="top_k must be in"):
        MoeLayer(torch.randn(4, 8), torch.randn(4), torch.randn(4, 12, 8), torch.randn(4, 8, 6), top_k=5)


def test_a_forced_backend_is_obeyed(monkeypatch):
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "reference")
    layer = Kda().layer()
    assert layer.refusal == "KIMI_KERNELS_BACKEND=reference"
    assert layer(torch.randn(1, 40), torch.tensor([0], dtype=torch.int32)).isfinite().all()
