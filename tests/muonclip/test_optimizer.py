"""The update against the published formulas in float64, and against optimizers that nobody here wrote."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import typing

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_kimi.optimizer import (
    MuonClip,
    MuonClipConfig,
    apply_,
    feed_,
    flag,
    orthogonal_updates,
    split_updates,
)
from megatron_kimi.splits import fused_qkv, grouped_fc1, split, stacked

EXACT = MuonClipConfig(dtype="float64")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def polar(x: Tensor, triples=((3.4445, -4.7750, 2.0315),) * 5) -> Tensor:
    """Newton-Schulz by singular values."""
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / (s.norm() + 1e-7)
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


def run(optimizer: torch.optim.Optimizer, params: list[Parameter], grads: list[list[Tensor]]) -> None:
    for step in grads:
        for p, g in zip(params, step):
            p.grad = g.clone()
        optimizer.step()


def gradients(params: list[Parameter], steps: int) -> list[list[Tensor]]:
    return [[torch.randn_like(p) for p in params] for _ in range(steps)]


def clones(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(p.detach().clone()) for p in params]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_steps_equal_the_published_formulas(shape, nesterov):
    """Kimi K2, algorithm 1, and the Nesterov form of Moonlight's code; four steps in float64."""
    config = dataclasses.replace(EXACT, nesterov=nesterov)
    weight = Parameter(torch.randn(shape, dtype=torch.float64))
    grads = gradients([weight], 4)
    wanted, momentum = weight.detach().clone(), torch.zeros_like(weight)
    for (grad,) in grads:
        momentum = 0.95 * momentum + grad
        update = polar(0.95 * momentum + grad if nesterov else momentum) * 0.2 * math.sqrt(max(shape))
        wanted = wanted - 0.02 * (update + 0.1 * wanted)
    run(MuonClip([weight], lr=0.02, config=config), [weight], grads)
    torch.testing.assert_close(weight.detach(), wanted, rtol=0, atol=1e-11)


def test_defaults_are_the_papers():
    c = MuonClipConfig()
    assert (c.momentum, c.nesterov, c.steps, c.coefficients) == (0.95, True, 5, "moonlight")
    assert (c.update_rms, c.weight_decay, c.tau, c.alpha, c.dtype) == (0.2, 0.1, 100.0, 0.5, "bfloat16")


@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
def test_agrees_with_torch_muon(shape):
    """torch.optim.Muon keeps an average instead of a sum as momentum; Newton-Schulz does not see the factor."""
    ours = Parameter(torch.randn(shape))
    (theirs,) = clones([ours])
    start, grads = ours.detach().clone(), gradients([ours], 5)
    run(MuonClip([ours], lr=0.02), [ours], grads)
    peer = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    run(peer, [theirs], grads)
    moved = (theirs - start).norm()
    # Five steps of bfloat16 products, rounded at different places: 2^-9 a rounding, a few tens of them.
    assert (ours - theirs).norm() < 2e-2 * moved


@pytest.mark.parametrize("ours_name, theirs_name", [("moonlight", "simple"), ("you", "quintic")])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
def test_agrees_with_emerging_optimizers(shape, nesterov, ours_name, theirs_name):
    """Its Muon is what Megatron's own --optimizer muon runs; float32 on both sides."""
    if not hasattr(typing, "override"):
        typing.override = lambda function: function  # the package imports it from Python 3.12's typing
    muon = pytest.importorskip("emerging_optimizers.orthogonalized_optimizers.muon")
    ours = Parameter(torch.randn(shape))
    (theirs,) = clones([ours])
    start, grads = ours.detach().clone(), gradients([ours], 5)
    config = MuonClipConfig(nesterov=nesterov, coefficients=ours_name, dtype="float32")
    run(MuonClip([ours], lr=0.02, config=config), [ours], grads)
    peer = muon.Muon(
        [theirs], 0.02, 0.95, 0.1, nesterov=nesterov, coefficient_type=theirs_name, extra_scale_factor=0.2,
        fp32_matmul_prec="highest",
    )  # fmt: skip
    run(peer, [theirs], grads)
    # float32 sums in another order, grown by Newton-Schulz's slope of up to 485 where singular values are small.
    assert (ours - theirs).norm() < 2e-5 * (theirs - start).norm()


def test_the_rest_equals_torch_adamw():
    params = [Parameter(torch.randn(s, dtype=torch.float64)) for s in [(7, 5), (9,), ()]]
    peers, grads = clones(params), gradients(params, 6)
    run(MuonClip([], params, lr=0.01), params, grads)
    run(torch.optim.AdamW(peers, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), peers, grads)
    for p, q in zip(params, peers):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_matrices_together_get_the_bits_they_get_alone():
    shapes = [(12, 20), (20, 12), (16, 16), (12, 20), (3, 12, 20), (8, 64)]
    feeds = [torch.randn(s) for s in shapes]
    together = orthogonal_updates(feeds, MuonClipConfig())
    for feed, update in zip(feeds, together):
        assert update.shape == feed.shape
        assert torch.equal(update, orthogonal_updates([feed], MuonClipConfig())[0])
    assert torch.equal(together[4][1], orthogonal_updates([feeds[4][1]], MuonClipConfig())[0])
    assert orthogonal_updates([], MuonClipConfig()) == []


@pytest.mark.parametrize(
    "layout",
    [fused_qkv(2, 4, 6, 10), fused_qkv(2, 4, 6, 10, per_head=True), stacked({"gate": 8, "up": 8}, 10),
     grouped_fc1(3, 10, 4, gated=True)],
)  # fmt: skip
def test_a_fused_parameter_moves_as_its_matrices_would_alone(layout):
    fused = Parameter(torch.randn(layout.shape))
    start = split(fused.detach().clone(), layout)
    matrices = {n: [Parameter(m.clone()) for m in part] for n, part in start.items()}
    grads = gradients([fused], 3)
    run(MuonClip([fused], lr=0.02, layouts={fused: layout}), [fused], grads)
    flat = [m for part in matrices.values() for m in part]
    each = [[g.clone() for part in split(step[0], layout).values() for g in part] for step in grads]
    run(MuonClip(flat, lr=0.02), flat, each)
    for name, part in split(fused.detach(), layout).items():
        assert torch.equal(part, torch.stack([m.detach() for m in matrices[name]]))


def test_split_updates_takes_stacks_without_a_layout():
    stack, layout = torch.randn(3, 4, 6), stacked({"a": 2, "b": 3}, 6)
    fused = torch.randn(layout.shape)
    first, second = split_updates([stack, fused], [None, layout], EXACT)
    torch.testing.assert_close(first[1].double(), polar(stack[1]) * 0.2 * 6**0.5, rtol=0, atol=1e-6)
    torch.testing.assert_close(second[2:].double(), polar(fused[2:]) * 0.2 * 6**0.5, rtol=0, atol=1e-6)


def test_momentum_and_weight_work_on_flat_shards():
    weight, grad, momentum = (torch.randn(6, 10) for _ in range(3))
    pieces = [(0, 7), (7, 33), (33, 60)]
    w, m = weight.clone().flatten(), momentum.clone().flatten()
    whole_feed = feed_(momentum, grad, MuonClipConfig())
    feeds = [feed_(m[a:b], grad.flatten()[a:b], MuonClipConfig()) for a, b in pieces]
    assert torch.equal(torch.cat(feeds), whole_feed.flatten())
    assert torch.equal(m, momentum.flatten())
    update = torch.randn(6, 10)
    apply_(weight, update, 0.1, 0.3)
    for a, b in pieces:
        apply_(w[a:b], update.flatten()[a:b], 0.1, 0.3)
    assert torch.equal(w, weight.flatten())


def build(seed: int) -> tuple[list[Parameter], MuonClip]:
    torch.manual_seed(seed)
    matrices = [Parameter(torch.randn(s)) for s in [(12, 20), (24, 10), (2, 4, 6)]]
    rest = [Parameter(torch.randn(s)) for s in [(30, 4), (5,)]]
    layouts = {matrices[1]: fused_qkv(2, 4, 3, 10)}
    groups = [{"params": matrices[:1], "lr": 0.03}, {"params": matrices[1:], "weight_decay": 0.0}]
    return [*matrices, *rest], MuonClip(groups, rest, lr=0.01, layouts=layouts)


def test_resuming_repeats_the_run_bit_for_bit():
    params, optimizer = build(0)
    grads = gradients(params, 6)
    run(optimizer, params, grads[:3])
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": params}, file)
    run(optimizer, params, grads[3:])

    file.seek(0)
    saved = torch.load(file, weights_only=False)
    resumed, again = build(1)
    with torch.no_grad():
        for p, q in zip(resumed, saved["params"]):
            p.copy_(q)
    again.load_state_dict(saved["optimizer"])
    run(again, resumed, grads[3:])
    for p, q in zip(params, resumed):
        assert torch.equal(p, q)
    for a, b in zip(optimizer.state.values(), again.state.values()):
        assert a.keys() == b.keys()
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def test_one_buffer_for_a_matrix_two_for_the_rest():
    params, optimizer = build(0)
    run(optimizer, params, gradients(params, 1))
    assert [sorted(optimizer.state[p]) for p in params] == [["momentum"]] * 3 + [
        ["exp_avg", "exp_avg_sq", "step"]
    ] * 2


def test_groups_have_their_own_rates_and_no_gradient_means_no_change():
    params, optimizer = build(0)
    before = [p.detach().clone() for p in params]
    params[1].grad = torch.zeros_like(params[1])
    params[3].grad = torch.ones_like(params[3])
    assert optimizer.step(lambda: 7.0) == 7.0
    changed = [not torch.equal(p, b) for p, b in zip(params, before)]
    assert changed == [False, False, False, True, False]  # a zero gradient and no decay leave a matrix alone
    params[0].grad = torch.randn_like(params[0])
    optimizer.step()
    assert (params[0] - before[0] * (1 - 0.03 * 0.1)).square().mean().sqrt().item() == pytest.approx(
        0.03 * 0.2 * 0.877, rel=0.1
    )


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("momentum", 1.0, r"momentum must be in \[0, 1\), got 1.0"),
        ("momentum", math.nan, r"momentum must be in \[0, 1\), got nan"),
        ("steps", 0, "steps must be at least 1, got 0"),
        ("coefficients", "simple", "coefficients must be one of moonlight, .* got 'simple'"),
        ("update_rms", 0.0, "update_rms must be positive, got 0.0"),
        ("weight_decay", -0.1, "weight_decay must be zero or positive, got -0.1"),
        ("eps", -1.0, "eps must be zero or positive, got -1.0"),
        ("tau", 0.0, "tau must be positive"),
        ("tau", -5.0, "tau must be positive"),
        ("tau", math.nan, "tau must be positive"),
        ("alpha", 1.5, r"alpha must be in \[0, 1\], got 1.5"),
        ("dtype", "float16", "dtype must be one of bfloat16, float32, float64, got 'float16'"),
        ("gqa_rule", "mean", "gqa_rule must be one of group, head, got 'mean'"),
    ],
)
def test_bad_options_name_their_flag(name, value, message):
    with pytest.raises(ValueError, match=f"{message}.*set.*{flag(name)}"):
        MuonClipConfig(**{name: value})


def test_infinite_tau_is_allowed_and_means_no_clip():
    assert MuonClipConfig(tau=math.inf).tau == math.inf


def test_parameters_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match=r"must be float32 or float64, got torch\.bfloat16: keep float32 master"
    ):
        MuonClip([Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))])
    with pytest.raises(ValueError, match=r"Muon takes matrices .* got \(3,\): pass it in rest"):
        MuonClip([Parameter(torch.zeros(3))])
    p = Parameter(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"the layout of a parameter \(3, 4\) has shape \(5, 4\)"):
        MuonClip([p], layouts={p: stacked({"a": 2, "b": 3}, 4)})
    with pytest.raises(ValueError, match="lr must not be negative, got -1"):
        MuonClip([p], lr=-1)


def test_copies_are_independent():
    params, optimizer = build(0)
    run(optimizer, params, gradients(params, 1))
    twin = copy.deepcopy(optimizer.state_dict())
    run(optimizer, params, gradients(params, 1))
    assert not torch.equal(twin["state"][0]["momentum"], optimizer.state[params[0]]["momentum"])
