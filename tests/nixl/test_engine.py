"""The engine without NIXL: its parts in virtual time, whole engines under the sanitizers, and hostile peers."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SOURCES


def run(program: Path, *arguments: object) -> str:
    command = [str(word) for word in (program, *arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_parts_and_engines_hold_under_the_sanitizers(
    programs_with: Callable[[str], Path], sanitize: str
) -> None:
    programs = programs_with(sanitize)
    assert "all good" in run(programs / "tent_unit")
    assert "all good" in run(programs / "tent_hosting")
    assert ", 0 failures" in run(programs / "tent_stress", 2)


@pytest.mark.slow
@pytest.mark.parametrize(("fuzzer", "rounds"), [("parsers", 3000), ("target", 1000), ("initiator", 500)])
def test_what_the_fuzzers_found_and_more_of_its_kind_does_no_harm(
    programs_with: Callable[[str], Path], fuzzer: str, rounds: int
) -> None:
    """The corpus of libFuzzer (docs/tent.md says how it was made), then changes of it from a fixed seed."""
    folder = SOURCES / "fuzz" / "corpus" / fuzzer
    assert f"{rounds} rounds" in run(
        programs_with("address,undefined") / f"tent_fuzz_{fuzzer}", folder, rounds
    )
