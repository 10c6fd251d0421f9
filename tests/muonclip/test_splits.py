"""Splits of fused parameters: every element in one matrix, back exactly, the same under tensor parallelism."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kimi.splits import (
    Section,
    Split,
    fused_qkv,
    grouped_fc1,
    grouped_fc2,
    merge,
    mla_key_value,
    mla_query,
    row_factors,
    split,
    stacked,
)

LAYOUTS = {
    "qkv": fused_qkv(4, 8, 6, 10),
    "qkv per head": fused_qkv(4, 8, 6, 10, per_head=True),
    "gated qkv": fused_qkv(4, 8, 6, 10, gate=True),
    "mha": fused_qkv(8, 8, 4, 10),
    "mla query": mla_query(8, 6, 4, 12),
    "mla query without rope": mla_query(8, 6, 0, 12),
    "mla key value": mla_key_value(8, 6, 4, 12, per_head=True),
    "mla down": stacked({"latent": 16, "k_rope": 4}, 10),
    "kda": stacked({"q": 16, "k": 16, "v": 32, "f_a": 4, "g_a": 4, "b": 4}, 10),
    "kda per head": stacked({"q": 16, "k": 16, "v": 32}, 10, heads={"q": 4, "k": 4, "v": 4}),
    "swiglu": stacked({"gate": 12, "up": 12}, 10),
    "experts fc1": grouped_fc1(3, 8, 12, gated=True),
    "experts fc2": grouped_fc2(3, 12, 8),
    "one matrix": stacked({"weight": 12}, 8),
}


def numbered(shape: tuple[int, int]) -> torch.Tensor:
    return torch.arange(shape[0] * shape[1]).view(shape)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_element_is_in_one_matrix_and_comes_back(layout):
    parameter = numbered(layout.shape)
    parts = split(parameter, layout)
    assert sorted(torch.cat([p.flatten() for p in parts.values()]).tolist()) == parameter.flatten().tolist()
    assert all(p.dim() == 3 for p in parts.values())
    assert torch.equal(merge(parts, layout), parameter)


sections = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=4)


@given(
    blocks=st.integers(1, 4),
    sections=sections,
    other=st.integers(1, 5),
    axis=st.sampled_from([0, 1]),
    matrices=st.sampled_from(["joined", "blocks", "heads"]),
)
@settings(max_examples=100, deadline=None)
def test_any_layout_splits_and_merges(blocks, sections, other, axis, matrices):
    named = tuple(Section(str(n), size * heads, heads) for n, (size, heads) in enumerate(sections))
    layout = Split(blocks, named, other, axis, matrices)
    parameter = numbered(layout.shape)
    parts = split(parameter, layout)
    assert torch.equal(merge(parts, layout), parameter)
    counts = {"joined": 1, "blocks": blocks}
    for s in named:
        assert len(parts[s.name]) == counts.get(matrices, blocks * s.heads)
    seen = torch.cat([p.flatten() for p in parts.values()])
    assert len(seen) == parameter.numel() == len(seen.unique())


def test_fused_qkv_is_interleaved_by_query_group():
    """Two groups of two heads of width 1: rows are q0 q1 k0 v0 | q2 q3 k1 v1."""
    parts = split(numbered((8, 1)), fused_qkv(2, 4, 1, 1))
    assert {n: p.flatten().tolist() for n, p in parts.items()} == {
        "q": [0, 1, 4, 5],
        "k": [2, 6],
        "v": [3, 7],
    }
    gated = split(numbered((12, 1)), fused_qkv(2, 4, 1, 1, gate=True))
    assert {n: p.flatten().tolist() for n, p in gated.items()} == {
        "q": [0, 1, 6, 7], "gate": [2, 3, 8, 9], "k": [4, 10], "v": [5, 11],
    }  # fmt: skip


def test_mla_heads_hold_content_rows_then_rotary_rows():
    parts = split(numbered((10, 1)), mla_query(2, 3, 2, 1))
    assert {n: p.flatten().tolist() for n, p in parts.items()} == {
        "q_nope": [0, 1, 2, 5, 6, 7], "q_rope": [3, 4, 8, 9],
    }  # fmt: skip


def test_grouped_experts_are_stored_expert_by_expert():
    """As GroupedMLP views its weights: weight1.view(E, hidden, -1) and weight2.view(E, -1, hidden)."""
    weight1, weight2 = torch.randn(8, 3 * 24), torch.randn(3 * 12, 8)
    gate, up = weight1.view(3, 8, 24).chunk(2, -1)
    parts = split(weight1, grouped_fc1(3, 8, 12, gated=True))
    assert torch.equal(parts["gate"], gate) and torch.equal(parts["up"], up)
    assert torch.equal(split(weight2, grouped_fc2(3, 12, 8))["down"], weight2.view(3, 12, 8))
    assert split(torch.randn(8, 36), grouped_fc1(3, 8, 12, gated=False))["up"].shape == (3, 8, 12)


def rank_shards(layout: Split, dim: int, tp: int) -> list[dict[str, torch.Tensor]]:
    """What each rank's shard holds: whole blocks, or its part of every section, or its part of the other axis."""
    parameter = torch.randn(layout.shape)
    if dim == layout.axis and layout.shards == "sections":
        axis = layout.gather_axis(dim)
        parts = split(parameter, layout)
        # The full matrices, cut as ranks hold them, are put into rank-local parameters.
        cut = [
            {n: (p.chunk(tp, 0) if axis is None else p.chunk(tp, axis))[r] for n, p in parts.items()}
            for r in range(tp)
        ]
        shards = [merge(c, layout.local(tp, dim)) for c in cut]
    else:
        shards = list(parameter.chunk(tp, dim))
    return parameter, shards


COLUMN_PARALLEL = [n for n in LAYOUTS if n not in ("mla down", "kda", "experts fc1", "experts fc2")]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", [*COLUMN_PARALLEL, "kda"])
def test_column_parallel_shards_join_to_the_full_matrices(name, tp):
    layout = LAYOUTS[name]
    parameter, shards = rank_shards(layout, 0, tp)
    local = layout.local(tp, 0)
    axis = layout.gather_axis(0)
    wanted = split(parameter, layout)
    parts = [split(shard, local) for shard in shards]
    for section, full in wanted.items():
        joined = torch.cat([p[section] for p in parts], 0 if axis is None else axis)
        assert torch.equal(joined, full)
    whole_parameter = split(torch.cat(shards), layout.gathered(tp, 0))
    for section, full in wanted.items():
        assert torch.equal(whole_parameter[section], full)


@pytest.mark.parametrize("name", ["qkv", "swiglu", "one matrix", "experts fc2"])
def test_row_parallel_shards_join_along_columns(name):
    layout = LAYOUTS[name]
    parameter = torch.randn(layout.shape)
    assert layout.gather_axis(1) == 2 and layout.gathered(2, 1) == layout
    parts = [split(s.contiguous(), layout.local(2, 1)) for s in parameter.chunk(2, 1)]
    for section, full in split(parameter, layout).items():
        assert torch.equal(torch.cat([p[section] for p in parts], 2), full)


def test_per_head_matrices_need_no_gather():
    assert LAYOUTS["qkv per head"].gather_axis(0) is None
    assert LAYOUTS["qkv"].gather_axis(0) == 1
    assert LAYOUTS["experts fc2"].gather_axis(0) == 1


def test_experts_cut_over_ranks():
    """weight1 [hidden, E * 2 * ffn] cut in two: each rank stores its half of gate and up of each expert."""
    layout, local = LAYOUTS["experts fc1"], LAYOUTS["experts fc1"].local(2, 1)
    full = torch.randn(layout.shape)
    cut = [{n: p.chunk(2, 2)[r] for n, p in split(full, layout).items()} for r in range(2)]
    shards = [merge(c, local) for c in cut]
    assert shards[0].shape == (8, 36)
    back = [split(s, local) for s in shards]
    joined = {n: torch.cat([b[n] for b in back], layout.gather_axis(1)) for n in back[0]}
    assert torch.equal(merge(joined, layout), full)
    with pytest.raises(ValueError, match="3 blocks, each cut over 2 ranks, do not concatenate"):
        layout.gathered(2, 1)


def test_row_factors_reach_each_head_of_its_section():
    layout = fused_qkv(2, 4, 3, 5)
    factors = row_factors(layout, {"q": torch.tensor([2.0, 3, 4, 5]), "k": torch.tensor([6.0, 7])})
    one = lambda value: [value] * 3
    assert factors.tolist() == [*one(2), *one(3), *one(6), *one(1), *one(4), *one(5), *one(7), *one(1)]
    assert row_factors(layout, {}).tolist() == [1.0] * 24
    assert row_factors(layout, {"q_nope": torch.ones(9)}).tolist() == [1.0] * 24
    with pytest.raises(ValueError, match=r"factors\['k'\] must have shape \(2,\), one a head, got \(4,\)"):
        row_factors(layout, {"k": torch.ones(4)})
    with pytest.raises(ValueError, match="sections are rows"):
        row_factors(LAYOUTS["experts fc1"], {})


def test_row_factors_of_a_shard_are_its_heads():
    layout = fused_qkv(4, 8, 3, 5)
    q, k = torch.rand(8), torch.rand(4)
    full = row_factors(layout, {"q": q, "k": k})
    local = layout.local(2, 0)
    halves = [row_factors(local, {"q": a, "k": b}) for a, b in zip(q.chunk(2), k.chunk(2))]
    assert torch.equal(torch.cat(halves), full)


def test_errors_say_what_does_not_fit():
    with pytest.raises(ValueError, match="heads must be a multiple of the 4 query groups, got 6"):
        fused_qkv(4, 6, 8, 16)
    with pytest.raises(
        ValueError, match="the number of blocks must be a multiple of the tensor-parallel size 8, got 4"
    ):
        LAYOUTS["qkv"].local(8, 0)
    with pytest.raises(
        ValueError, match="section 'gate' must be a multiple of the tensor-parallel size 5, got 12"
    ):
        LAYOUTS["swiglu"].local(5, 0)
    with pytest.raises(
        ValueError, match="heads of section 'q' must be a multiple of the tensor-parallel size 8, got 4"
    ):
        LAYOUTS["kda per head"].local(8, 0)
    with pytest.raises(
        ValueError, match="dimension 1 must be a multiple of the tensor-parallel size 3, got 10"
    ):
        LAYOUTS["qkv"].local(3, 1)
    with pytest.raises(
        ValueError, match=r"parameter must have the shape \(96, 10\) of its layout, got \(10, 96\)"
    ):
        split(torch.empty(10, 96), LAYOUTS["qkv"])
    with pytest.raises(ValueError, match="section 'q' of size 7 does not fall into 2 equal heads"):
        Section("q", 7, 2)
    with pytest.raises(ValueError, match="sections need different names"):
        Split(1, (Section("q", 1), Section("q", 1)), 3)
    with pytest.raises(ValueError, match="blocks and other must be at least 1, got 0 and 3"):
        Split(0, (Section("q", 1),), 3)
