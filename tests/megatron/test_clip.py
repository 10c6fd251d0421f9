"""QK-Clip in real Megatron processes, against Megatron's own where that works, and where it does not."""

from __future__ import annotations

from typing import Any

import jobs
import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("job", ["clip gpt", "clip gpt, alpha", "clip mla"])
def test_equals_megatrons_clip(one: dict[str, Any], job: str) -> None:
    """The master weights to float32 rounding; Megatron rounds bfloat16 weights times the factor, ours follow the
    master, so those may differ by their last bit: one part in 128."""
    result = one[job]
    assert "error" not in result, result["trace"]
    ours, theirs = result["ours"], result["theirs"]
    assert ours["masters"].keys() == theirs["masters"].keys()
    for name, value in theirs["masters"].items():
        torch.testing.assert_close(ours["masters"][name], value, rtol=2e-6, atol=0)
    for name, value in theirs["weights"].items():
        torch.testing.assert_close(ours["weights"][name], value, rtol=1 / 128, atol=0)


@pytest.mark.parametrize(
    ("processes", "job"),
    [("one", "clip holds gpt"), ("one", "clip holds mla"), ("one", "clip holds mtp"), ("two", "clip holds")],
)
def test_after_a_clip_the_same_batch_stays_under_tau(
    request: pytest.FixtureRequest, processes: str, job: str
) -> None:
    """The second forward pass has the same data and only clipped weights. bfloat16 logits have 1/128 of rounding; a
    second layer sees what the first one's clip changed, which the margin of 1.1 covers."""
    result = request.getfixturevalue(processes)[job]
    assert not isinstance(result, dict), result["trace"]
    before, after = result
    assert before > 0.6
    assert after < 0.5 * 1.1


def test_every_layer_is_recorded(one: dict[str, Any]) -> None:
    assert [row[0] for row in one["gpt"]["clip"]] == ["layer 1", "layer 2"]
    assert [row[0] for row in one["mtp"]["clip"]][:2] == ["layer 1", "layer 2"]
    assert one["mtp"]["clip"][2][0].startswith("mtp layer")


def test_largest_logits_do_not_depend_on_the_layout(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Over micro-batches and data-parallel ranks; a tensor-parallel rank reports its own heads."""
    expected = {layer: largest for layer, largest, _, _ in one["gpt"]["clip"]}
    for layout in ("dp", "zero", "zero, overlap"):
        assert {row[0]: row[1] for row in two[layout]["clip"]} == pytest.approx(expected, rel=1e-4)
    for layer, largest, _, heads in two["tp"]["clip"]:
        assert heads == 2
        assert largest <= expected[layer] * 1.0001


def test_a_skipped_step_changes_nothing(one: dict[str, Any]) -> None:
    result = one["skipped"]
    assert "error" not in result, result["trace"]
    assert result["updated"] is False
    assert result["unchanged"] is True
    assert result["recorded"] is False
    assert result["after"] == 1.0
    assert any(not torch.equal(result["before"][name], value) for name, value in result["final"].items())


def test_megatrons_clip_fails_where_ours_trains(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Its two crashes: a float32 model, and the distributed optimizer. If one passes, the docs need a new line."""
    assert one["upstream in fp32"]["error"] == "AttributeError"
    assert two["upstream with shards"]["error"] == "AttributeError"
    assert any(clipped for _, _, clipped, _ in one["gpt"]["clip"])
    assert any(clipped for _, _, clipped, _ in two["zero, bf16"]["clip"])


def test_attention_that_reports_itself_is_believed(one: dict[str, Any]) -> None:
    result = one["itself"]
    assert "error" not in result, result["trace"]
    assert [row[1] for row in result["summary"]] == [4.0, 4.0]
    assert result["kept"] == [True, True]  # Megatron's log reads them after the step
    assert result["cleared"] == [True, True]


@pytest.mark.skipif(not jobs.newer(), reason="HybridModel came with 0.19")
def test_hybrid_model_clips_its_attention_layers(one: dict[str, Any]) -> None:
    result = one["hybrid"]
    assert "error" not in result, result["trace"]
    assert result["layers"] == ["layer 1", "layer 3"]
    assert all(step["updated"] for step in result["history"])
