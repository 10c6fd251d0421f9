"""The engine without NIXL: its parts in virtual time, and whole engines under the sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import build


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory, request.param)


def run(program: Path, *arguments: str) -> str:
    result = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_parts_and_engines_hold_under_the_sanitizers(programs: Path) -> None:
    assert "all good" in run(programs / "tent_unit")
    assert ", 0 failures" in run(programs / "tent_stress", "2")
