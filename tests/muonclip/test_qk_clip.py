"""After a clip, the same inputs give logits of at most tau: exactly min(S, tau) where a head has its own key."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kimi_kernels import qk_max_logits
from megatron_kimi.qk_clip import (
    attention_factors,
    clip_gammas,
    latent_factors,
    scale_flat_shard_,
    scale_rows_,
)
from megatron_kimi.splits import fused_qkv, mla_key_value, mla_query, row_factors, split, stacked

TAU = 5.0
TOKENS, HIDDEN, WIDTH = 40, 24, 8


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def attention_logits(weight: Tensor, layout, x: Tensor, bias: Tensor | None = None) -> Tensor:
    parts = split(weight, layout)
    shift = {} if bias is None else split(bias[:, None], replace(layout, other=1))
    heads = {}
    for name in ("q", "k"):
        y = x @ parts[name][0].mT + (shift[name].flatten() if shift else 0)
        heads[name] = y.view(1, TOKENS, -1, WIDTH)
    return qk_max_logits(heads["q"], heads["k"])


def latent_logits(q_up: Tensor, kv_up: Tensor, latents: list[Tensor], k_rope: Tensor, heads: int) -> Tensor:
    """MLA with one rotary key for all heads; rotations are orthogonal and left out."""
    q = (latents[0] @ q_up.mT).view(1, TOKENS, heads, 6 + 4)
    k = (latents[1] @ kv_up.mT).view(1, TOKENS, heads, 6 + 5)[..., :6]
    return qk_max_logits(q, torch.cat([k, k_rope.view(1, TOKENS, 1, 4).expand(1, TOKENS, heads, 4)], -1))


def hot(weight: Tensor, layout, factors: dict[str, list[float]]) -> Tensor:
    """The weight with some heads driven up."""
    return (
        weight
        * row_factors(layout, {n: torch.tensor(f, dtype=weight.dtype) for n, f in factors.items()})[:, None]
    )


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("biased", [False, True])
def test_mha_reaches_exactly_tau(alpha, biased):
    layout = fused_qkv(4, 4, WIDTH, HIDDEN)
    weight = hot(torch.randn(layout.shape, dtype=torch.float64) / 5, layout, {"q": [1, 9, 0.1, 30]})
    bias = torch.randn(layout.shape[0], dtype=torch.float64) if biased else None
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    before = attention_logits(weight, layout, x, bias)
    assert 1 <= (before > TAU).sum() < 4
    original = weight.clone()
    rows = row_factors(layout, attention_factors(before, TAU, "layer 0", alpha=alpha))
    scale_rows_(weight, rows)
    if bias is not None:
        scale_rows_(bias, rows)
    torch.testing.assert_close(
        attention_logits(weight, layout, x, bias), before.clamp(max=TAU), rtol=1e-12, atol=0
    )
    cold = split(original, layout)["q"][0].view(4, WIDTH, HIDDEN)[before <= TAU]
    assert torch.equal(split(weight, layout)["q"][0].view(4, WIDTH, HIDDEN)[before <= TAU], cold)
    assert torch.equal(split(weight, layout)["v"], split(original, layout)["v"])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_mla_reaches_exactly_tau_and_leaves_the_shared_key_alone(alpha):
    """Content and rotary part of a logit both scale by gamma, so the sum does."""
    heads, latent = 4, 12
    layouts = mla_query(heads, 6, 4, latent), mla_key_value(heads, 6, 5, latent)
    q_up, kv_up = (torch.randn(s.shape, dtype=torch.float64) for s in layouts)
    q_up = hot(q_up, layouts[0], {"q_nope": [0.05, 3, 1, 0.05], "q_rope": [0.05, 3, 20, 0.05]})
    latents = [torch.randn(TOKENS, latent, dtype=torch.float64) / 2 for _ in range(2)]
    k_rope = torch.randn(TOKENS, 4, dtype=torch.float64)
    before = latent_logits(q_up, kv_up, latents, k_rope, heads)
    assert 1 <= (before > TAU).sum() < heads
    value = split(kv_up, layouts[1])["v"].clone()
    factors = latent_factors(before, TAU, "layer 0", alpha)
    for weight, layout in zip((q_up, kv_up), layouts):
        scale_rows_(weight, row_factors(layout, factors))
    after = latent_logits(q_up, kv_up, latents, k_rope, heads)
    torch.testing.assert_close(after, before.clamp(max=TAU), rtol=1e-12, atol=0)
    assert torch.equal(split(kv_up, layouts[1])["v"], value)


@pytest.mark.parametrize("rule", ["group", "head"])
def test_gqa_rules_bound_every_head_at_tau(rule):
    layout = fused_qkv(2, 6, WIDTH, HIDDEN)
    weight = hot(torch.randn(layout.shape, dtype=torch.float64) / 5, layout, {"q": [1, 9, 2, 0.1, 0.5, 0.2]})
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    before = attention_logits(weight, layout, x)
    over = before > TAU
    assert over[:3].any() and not over[:3].all() and not over[3:].any()
    original = weight.clone()
    factors = attention_factors(before, TAU, "layer 0", groups=2, rule=rule)
    scale_rows_(weight, row_factors(layout, factors))
    after = attention_logits(weight, layout, x)
    same = {"rtol": 1e-12, "atol": 0}
    if rule == "head":  # only heads over tau change, and reach tau exactly
        torch.testing.assert_close(after, before.clamp(max=TAU), **same)
        assert torch.equal(split(weight, layout)["k"], split(original, layout)["k"])
    else:  # the whole group shrinks by what its largest head needs
        gamma = TAU / before[:3].max()
        torch.testing.assert_close(after, torch.cat([before[:3] * gamma, before[3:]]), **same)
    assert (after <= TAU * (1 + 1e-12)).all()


def test_rules_are_one_without_shared_keys():
    logits = torch.tensor([3.0, 50.0, 200.0])
    for rule in ("group", "head"):
        factors = attention_factors(logits, 100.0, "layer 0", rule=rule)
        assert factors["q"].tolist() == factors["k"].tolist() == [1, 1, pytest.approx(0.5**0.5)]


def test_gamma_is_one_up_to_tau_and_for_logits_below_zero():
    logits = torch.tensor([-1e4, -0.1, 0.0, 99.9, 100.0, 100.1, 1e30])
    gammas = clip_gammas(logits, 100.0, "layer 0")
    assert gammas[:5].tolist() == [1.0] * 5
    assert gammas[5].item() == pytest.approx(100 / 100.1) and 0 < gammas[6] < 1e-27
    assert clip_gammas(logits, math.inf, "layer 0").tolist() == [1.0] * 7


def test_unclipped_weights_keep_their_bits():
    layout = fused_qkv(2, 2, WIDTH, HIDDEN)
    weight = torch.randn(layout.shape).bfloat16()
    copy = weight.clone()
    scale_rows_(copy, row_factors(layout, attention_factors(torch.tensor([1.0, 2.0]), 100.0, "layer 0")))
    assert torch.equal(copy, weight)


def test_bfloat16_weights_are_rounded_once():
    weight, factors = torch.randn(6, 8).bfloat16(), torch.rand(6)
    scaled = weight.clone()
    scale_rows_(scaled, factors)
    assert torch.equal(scaled, (weight.float() * factors[:, None]).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flat_shards_scale_like_the_whole_weight(dtype):
    """Every [start, end) of a 5 x 7 weight, as a distributed optimizer may cut it."""
    weight, factors = torch.randn(5, 7).to(dtype), torch.rand(5)
    wanted = weight.clone()
    scale_rows_(wanted, factors)
    for start in range(36):
        for end in range(start, 36):
            shard = weight.flatten()[start:end].clone()
            scale_flat_shard_(shard, start, factors, 7)
            assert torch.equal(shard, wanted.flatten()[start:end])


def test_shards_of_biases():
    bias, factors = torch.randn(6), torch.rand(6)
    shard = bias[2:5].clone()
    scale_flat_shard_(shard, 2, factors, 1)
    assert torch.equal(shard, bias[2:5] * factors[2:5])


def test_logits_that_cannot_be_clipped_name_layer_and_head():
    for value, message in [
        (math.nan, "the largest attention logit of decoder.layers.3, head 1 is nan"),
        (
            math.inf,
            "the largest attention logit of decoder.layers.3, head 1 is inf: the forward pass overflowed",
        ),
        (-math.inf, "no attention logit was recorded for decoder.layers.3, head 1"),
    ]:
        logits = torch.tensor([1.0, value, 3.0])
        for factors in (attention_factors, latent_factors):
            with pytest.raises(ValueError, match=message):
                factors(logits, TAU, "decoder.layers.3")


def test_errors_say_what_does_not_fit():
    with pytest.raises(ValueError, match="layer 2: 6 heads are not a multiple of the 4 query groups"):
        attention_factors(torch.zeros(6), TAU, "layer 2", groups=4)
    with pytest.raises(ValueError, match="rule must be one of group, head, got 'mean'"):
        attention_factors(torch.zeros(6), TAU, "layer 2", rule="mean")
    with pytest.raises(ValueError, match=r"weight must have 3 rows, one a factor, got \(4, 2\)"):
        scale_rows_(torch.zeros(4, 2), torch.ones(3))
    for shard, start in [(torch.zeros(5), 31), (torch.zeros(5), -1), (torch.zeros(1, 5), 0)]:
        with pytest.raises(ValueError, match="shard must be 1-D within the 35 elements of the weight"):
            scale_flat_shard_(shard, start, torch.ones(5), 7)


def test_separate_projections_take_the_same_factors():
    factors = attention_factors(torch.tensor([1.0, 40.0, 2.0, 3.0]), TAU, "layer 0", groups=2)
    query, key = stacked({"q": 12}, 5, heads={"q": 4}), stacked({"k": 6}, 5, heads={"k": 2})
    fused = split(row_factors(fused_qkv(2, 4, 3, 5), factors)[:, None], fused_qkv(2, 4, 3, 1))
    assert torch.equal(row_factors(query, factors), fused["q"].flatten())
    assert torch.equal(row_factors(key, factors), fused["k"].flatten())
