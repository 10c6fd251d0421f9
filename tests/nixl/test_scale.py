"""The scheduler over simulated ports (benchmarks/tent_scale.py): what must hold in any such model."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.tent_scale import BINDINGS, capacity, simulate, simulator

SMALL = {"nodes": 8, "end_ms": 3, "mice": 1}


@pytest.fixture(scope="module")
def program() -> Iterator[Path]:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    with simulator() as built:
        yield built


@pytest.mark.parametrize("binding", BINDINGS)
def test_no_case_sends_more_than_the_ports_carry_and_none_loses_a_transfer(
    program: Path, binding: str
) -> None:
    """Also where every node's port is dead from the start, dies midway, or dies and comes back."""
    cut = {**SMALL, "end_ms": 20, "cut": 1}
    for case in (
        SMALL,
        {**cut, "cut_at_ms": 0},
        {**cut, "cut_at_ms": 5},
        {**cut, "cut_at_ms": 5, "heal_at_ms": 15},
    ):
        result = simulate(program, binding, 3, case)
        assert result["lost"] == 0, case
        assert result["elephants"]["count"] > 0 and result["mice"]["count"] > 0
        assert 0 < result["bytes_per_second"] <= capacity(case)


def test_equal_seeds_give_equal_results_and_others_do_not(program: Path) -> None:
    first, again, other = (simulate(program, "spray", seed, SMALL) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_on_healthy_links_nothing_is_won_by_magic(program: Path) -> None:
    """One sender, one peer: whoever uses all links fills them, so spray and equal shares differ by little.

    3 %: equal shares go out in small windows until the rates are measured, some 2 ms of the 100.
    A binding to one link cannot exceed that link.
    """
    case = {"nodes": 2, "senders": 1, "end_ms": 100}
    rates = {b: simulate(program, b, 0, case)["bytes_per_second"] for b in BINDINGS}
    assert rates["spray"] == pytest.approx(rates["stripe"], rel=0.03)
    assert rates["pinned"] <= capacity(case) / 8


def test_on_healthy_links_many_transfers_lose_little_to_small_slices(program: Path) -> None:
    """The last slices of a transfer are small; a port must not be idle for them, neither at the sender nor behind it.

    Equal shares have slices of one size. 16 transfers of 8 MiB a node are half tails.
    """
    case = {"nodes": 16, "end_ms": 6, "elephants": 16, "elephant_kib": 8192}
    rates = {b: simulate(program, b, 0, case)["bytes_per_second"] for b in ("spray", "stripe")}
    assert rates["spray"] >= 0.93 * rates["stripe"]


def test_a_wrong_argument_is_named(program: Path) -> None:
    with pytest.raises(ValueError, match="nodes must be"):
        simulate(program, "spray", 0, {"nodes": 1})
    with pytest.raises(ValueError, match="binding must be"):
        simulate(program, "none", 0, SMALL)
