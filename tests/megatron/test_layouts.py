"""MuonClip in real Megatron processes: every layout trains as one process does, and each step is the papers'."""

from __future__ import annotations

from typing import Any

import jobs
import pytest
import reference
import torch

pytestmark = pytest.mark.slow

# Float32 sums in another order, amplified by three steps of Newton-Schulz (slope about 3.44^5 at small singular
# values). Weights are compared by the norm of the difference, relative: AdamW gives an element whose gradient is
# rounding a full step of either sign. Measured: losses 2e-7, weights 2e-6.
LOSS, WEIGHT = 2e-5, 1e-4


def distance(a: torch.Tensor, b: torch.Tensor, spare: int = 0) -> float:
    """Relative, in norm, but for the ``spare`` elements that differ most."""
    difference = (a - b).abs().flatten().sort().values
    return float(difference[: difference.numel() - spare].norm() / b.norm())


def same_training(
    got: dict[str, Any],
    expected: dict[str, Any],
    loss: float = LOSS,
    weight: float = WEIGHT,
    norm: float = 1e-3,
    spare: int = 0,
) -> None:
    """`spare`: elements of each table of AdamW's that may differ by its whole steps."""
    assert "error" not in got, got["trace"]
    for step, other in zip(got["history"], expected["history"], strict=True):
        assert step["updated"] == 1.0
        assert step["loss"] == pytest.approx(other["loss"], abs=loss)
        assert step["norm"] == pytest.approx(other["norm"], rel=norm)
    assert got["weights"].keys() == expected["weights"].keys()
    for name, value in got["weights"].items():
        table = name in ("embedding.word_embeddings.weight", "output_layer.weight")
        assert distance(value, expected["weights"][name], spare if table else 0) <= weight, name


def test_training_is_not_trivial(one: dict[str, Any]) -> None:
    """What the comparisons below rest on: the weights move, by Muon and not AdamW, and heads are clipped."""
    assert one["gpt"]["history"][0]["loss"] != pytest.approx(one["gpt"]["history"][2]["loss"], abs=1e-3)
    assert any(clipped for _, _, clipped, _ in one["gpt"]["clip"])
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert distance(one["gpt"]["weights"][name], one["unclipped"]["weights"][name]) > 100 * WEIGHT


@pytest.mark.parametrize(
    "layout",
    ["tp", "tp, everywhere", "dp", "dp, everywhere", "zero", "zero, everywhere", "zero, buckets", "zero, overlap",
     "dp, overlap", "pp"],
)  # fmt: skip
def test_two_processes_train_as_one(one: dict[str, Any], two: dict[str, Any], layout: str) -> None:
    same_training(two[layout], one["gpt"])


@pytest.mark.parametrize("layout", ["tp, dp", "tp, zero", "tp, pp"])
def test_four_processes_train_as_one(one: dict[str, Any], four: dict[str, Any], layout: str) -> None:
    same_training(four[layout], one["gpt"])


@pytest.mark.parametrize(
    ("processes", "layout"), [("two", "pp, interleaved"), ("four", "zero, pp, interleaved")]
)
def test_two_chunks_a_stage_train_as_one_process(
    request: pytest.FixtureRequest, one: dict[str, Any], processes: str, layout: str
) -> None:
    """The interleaved schedule: layers 1 and 3 on the first stage, whose logits this process saw."""
    result = request.getfixturevalue(processes)[layout]
    same_training(result, one["deep"])
    expected = {row[0]: row[1] for row in one["deep"]["clip"]}
    assert {row[0]: row[1] for row in result["clip"]} == {
        layer: pytest.approx(expected[layer], rel=1e-4) for layer in ("layer 1", "layer 3")
    }


@pytest.mark.parametrize(
    ("layout", "model"), [("moe, ep", "moe"), ("moe, ep, zero", "moe"), ("mtp, tp", "mtp")]
)
def test_experts_and_extra_heads(one: dict[str, Any], two: dict[str, Any], layout: str, model: str) -> None:
    same_training(two[layout], one[model])


def test_bf16_weights_with_shards(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Model weights round to one part in 256, gradients to theirs. Measured: losses 3e-5, weights 7e-3."""
    same_training(two["zero, bf16"], one["bf16"], loss=2e-3, weight=2e-2)


def test_fp16_weights_with_shards(one: dict[str, Any], two: dict[str, Any]) -> None:
    """As one process, and as float32 but for weights and activations that round to one part in 2048.

    Two processes add halved gradients, and a few of them are below what float16 resolves: AdamW gives those a full
    step of either sign. On one processor no element of the embedding did so, on another one of 2,048.
    """
    same_training(two["zero, fp16"], one["fp16"], loss=2e-4, weight=2e-3, spare=2)
    same_training(one["fp16"], one["gpt"], loss=2e-3, weight=2e-2, norm=1e-2)


@pytest.mark.parametrize("processes", ["one", "two"])
def test_loss_scaling_changes_nothing_but_the_scale(request: pytest.FixtureRequest, processes: str) -> None:
    """A skipped step leaves every bit of weights and states and halves the scale; the applied ones are those of a
    run whose scale was right from the start."""
    result = request.getfixturevalue(processes)["loss scaling"]
    assert "error" not in result, result["trace"]
    flags = [updated for updated, _, _ in result["steps"]]
    skipped = flags.index(1.0)
    assert skipped > 2 and flags == [0.0] * skipped + [1.0] * 3
    assert [same for _, _, same in result["steps"]] == [not updated for updated in flags]
    assert [scale for _, scale, _ in result["steps"]] == [
        2.0 ** (28 - min(n, skipped)) for n in range(skipped + 3)
    ]
    for name, value in result["expected"].items():
        assert torch.equal(result["got"][name], value), name


def test_bfloat16_arithmetic_with_shards(one: dict[str, Any], two: dict[str, Any]) -> None:
    """The paper's arithmetic: a gathered matrix is rounded as a whole one is. Measured: no difference."""
    same_training(two["bfloat16 zero"], one["bfloat16 arithmetic"], loss=2e-3, weight=2e-2)


@pytest.mark.parametrize(("once", "everywhere"), [("tp", "tp, everywhere"), ("zero", "zero, everywhere")])
def test_once_and_everywhere_give_the_same_weights(two: dict[str, Any], once: str, everywhere: str) -> None:
    same_training(two[once], two[everywhere])


STEPS = {
    "one": ["step gpt", "step gpt, per head", "step mla", "step moe", "step, no Nesterov"],
    "two": ["step gpt", "step gpt, per head", "step mla", "step mla, zero", "step moe"],
    "four": ["moe, tp, ep"],
}


@pytest.mark.parametrize(("processes", "name"), [(n, name) for n, names in STEPS.items() for name in names])
def test_a_step_is_the_papers(request: pytest.FixtureRequest, processes: str, name: str) -> None:
    """Against float64 formulas from given gradients. Float32 leaves 1e-4 of an update of at most lr * 1."""
    result = request.getfixturevalue(processes)[name]
    assert "error" not in result, result["trace"]
    kind = {"per_head": "per head" in name, "nesterov": "no Nesterov" not in name}
    assert len(result["after"]) >= 15
    for weight, before in result["before"].items():
        expected = reference.step(weight, before, result["gradients"][weight], 0.02, 0.1, **kind)
        moved = (expected - before.double()).abs().max()
        assert moved > 1e-3
        worst = (result["after"][weight].double() - expected).abs().max()
        assert worst < 2e-4 * moved + 1e-7, (weight, float(worst), float(moved))


def test_one_momentum_and_no_second_moment(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Muon keeps 4 bytes an element, half of AdamW's; embeddings, head and norms are AdamW's."""
    states = one["states"]
    assert {name for name, _, _ in states["adamw"] if "norm" not in name} == {
        "embedding.word_embeddings.weight",
        "output_layer.weight",
    }
    assert all(size == 4 * elements for _, elements, size in states["muon"])
    assert all(size == 8 * elements for _, elements, size in states["adamw"])
    whole = sum(elements for kind in states.values() for _, elements, _ in kind)
    shard = sum(elements for kind in two["states"].values() for _, elements, _ in kind)
    assert shard == pytest.approx(whole / 2, abs=64)


def test_patterns_move_matrices_to_adamw(one: dict[str, Any]) -> None:
    moved = {name for name, _, _ in one["states with a pattern"]["adamw"]} - {
        n for n, _, _ in one["states"]["adamw"]
    }
    assert moved == {f"decoder.layers.{n}.mlp.linear_fc1.weight" for n in range(2)}


def test_schedule_and_weight_decay_groups_are_megatrons(one: dict[str, Any]) -> None:
    result = one["learning rates"]
    assert "error" not in result, result["trace"]
    for name, value in result["before"].items():
        assert torch.equal(result["still"][name], value), name
        assert not torch.equal(result["moved"][name], value), name
    assert sorted(result["groups"]) == [(0.01, 0.0, 0.0), (0.01, pytest.approx(0.12), 1.0)]


# Checkpoints


def same_bits(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert "error" not in got, got["trace"]
    assert "error" not in expected, expected["trace"]
    assert got["history"] == expected["history"]
    for name, value in expected["weights"].items():
        assert torch.equal(got["weights"][name], value), name


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_resume_bit_for_bit(one: dict[str, Any], kind: str) -> None:
    same_bits(one[f"resume {kind}"], one[f"save {kind}"])


@pytest.mark.parametrize("kind", [*jobs.SHARDINGS, "tp", "moe"])
def test_resume_shards_bit_for_bit(two: dict[str, Any], kind: str) -> None:
    same_bits(two[f"resume {kind}"], two[f"save {kind}"])


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_plain_state_dict_bit_for_bit(one: dict[str, Any], kind: str) -> None:
    result = one[f"plain state, {kind}"]
    assert "error" not in result, result.get("trace")
    (history, weights), (other, other_weights) = result["got"], result["expected"]
    same_bits({"history": history, "weights": weights}, {"history": other, "weights": other_weights})


@pytest.mark.parametrize(
    ("processes", "resumed", "saved"),
    [
        ("one", "reshard 2 to 1", "save fully_reshardable"),
        ("one", "reshard tp 2 to 1", "save tp"),
        ("four", "reshard dp 2 to tp 2, dp 2", "save fully_reshardable"),
        ("four", "reshard dp 2 to 4", "save dp_reshardable"),
    ],
)
def test_resume_in_another_layout(
    request: pytest.FixtureRequest, two: dict[str, Any], processes: str, resumed: str, saved: str
) -> None:
    same_training(request.getfixturevalue(processes)[resumed], two[saved])


@pytest.mark.parametrize("job", ["resume AdamW", "resume AdamW, sharded"])
def test_a_checkpoint_of_adamw_is_refused(one: dict[str, Any], job: str) -> None:
    assert one[job]["error"] == "ValueError"
    assert "--no-load-optim" in one[job]["message"]


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("refuse tau", "--muonclip-tau"),
        ("refuse window", "--muonclip-tau inf"),
        ("refuse graphs", "--cuda-graph-impl"),
        ("refuse contexts", "context parallelism is 2"),
        ("refuse coefficients", "--muonclip-coefficients"),
        ("refuse sgd", "'sgd'"),
        ("refuse L2", "decoupled"),
        ("refuse overlap", "overlap_param_gather_with_optimizer_step"),
    ],
)
def test_what_cannot_work_does_not_start(one: dict[str, Any], job: str, words: str) -> None:
    assert one[job]["error"] == "ValueError"
    assert words in one[job]["message"]


def test_more_ranks_than_query_groups_do_not_start(two: dict[str, Any]) -> None:
    assert two["refuse groups"]["error"] == "ValueError"
    assert "does not divide the 1 query groups" in two["refuse groups"]["message"]
