"""The router against the definition in float64, token by token."""

from __future__ import annotations

import pytest
import torch

from kimi_kernels import BackendError, moe_route


def oracle(x, gate, bias, top_k, groups, kept, renormalize, factor):
    """Per token the set {expert: weight}, by sorting."""
    result = []
    for scores in (x.double() @ gate.double().T).sigmoid():
        choice = (scores + bias.double()).tolist()
        width = len(choice) // groups
        strength = [sum(sorted(choice[g * width : (g + 1) * width])[-2:]) for g in range(groups)]
        best = sorted(range(groups), key=lambda g: -strength[g])[:kept]
        allowed = [e for e in range(len(choice)) if groups == 1 or e // width in best]
        chosen = sorted(allowed, key=lambda e: -choice[e])[:top_k]
        total = sum(float(scores[e]) for e in chosen) if renormalize else 1.0
        result.append({e: float(scores[e]) / total * factor for e in chosen})
    return result


@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "kept"), [(8, 2, 1, 1), (64, 6, 1, 1), (20, 3, 1, 1), (32, 4, 4, 2), (16, 2, 8, 3)]
)
@pytest.mark.parametrize("renormalize", [True, False])
def test_matches_the_definition(isa, experts, top_k, groups, kept, renormalize):
    x, gate, bias = torch.randn(33, 24), torch.randn(experts, 24), 0.3 * torch.randn(experts)
    ids, weights = moe_route(x, gate, bias, top_k, groups, kept, renormalize, 2.446, num_shared=2)
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    for row, factors, want in zip(
        ids.tolist(), weights.tolist(), oracle(x, gate, bias, top_k, groups, kept, renormalize, 2.446)
    ):
        assert row[top_k:] == [experts, experts + 1] and factors[top_k:] == [1.0, 1.0]
        got = dict(zip(row[:top_k], factors[:top_k]))
        assert set(got) == set(want)
        for expert, weight in want.items():
            assert got[expert] == pytest.approx(weight, rel=1e-5)  # a float32 sum of 24 products, and a sigmoid


def test_reference_agrees_and_takes_what_the_native_path_does_not(monkeypatch):
    x, gate, bias = torch.randn(9, 16), torch.randn(6, 16).double(), torch.randn(6).double()
    ids, weights = moe_route(x, gate, bias, 2)
    for row, factors, want in zip(ids.tolist(), weights.tolist(), oracle(x, gate, bias, 2, 1, 1, True, 1.0)):
        assert dict(zip(row, factors)) == pytest.approx(want, rel=1e-5)
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "cpu")
    with pytest.raises(BackendError, match=r"takes float32 or bfloat16, got torch\.float64"):
        moe_route(x, gate, bias, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_bits_it_has_alone(isa, dtype):
    x, gate, bias = torch.randn(40, 32).to(dtype), torch.randn(16, 32), torch.randn(16)
    ids, weights = moe_route(x, gate, bias, 4)
    for t in (0, 13, 39):
        alone = moe_route(x[t : t + 1], gate, bias, 4)
        assert torch.equal(alone[0][0], ids[t]) and torch.equal(alone[1][0], weights[t])


def test_no_tokens(isa):
    ids, weights = moe_route(torch.randn(0, 8), torch.randn(4, 8), torch.randn(4), 2, num_shared=1)
    assert ids.shape == weights.shape == (0, 3)


def test_opcheck(native):
    arguments = (torch.randn(5, 8), torch.randn(8, 8), torch.randn(8), 2, 2, 1, True, 1.5, 1)
    torch.library.opcheck(torch.ops.kimi.moe_route.default, arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, "top_k must be in"),
        ({"num_groups": 3}, "num_groups must divide"),
        ({"bias": torch.zeros(7)}, "bias must be"),
        ({"gate": torch.zeros(8, 9)}, "gate must be"),
        ({"gate": torch.zeros(8, 16).bfloat16()}, "must be float32"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"x": torch.zeros(2, 16), "gate": torch.zeros(8, 16), "bias": torch.zeros(8), "top_k": 2}
    with pytest.raises(ValueError, match=message):
        moe_route(**{**arguments, **changes})
