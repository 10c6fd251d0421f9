"""One start of Megatron a layout, for all tests that look at it. Order: two processes save what the others resume."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="needs megatron-core: nox -s megatron")

sys.path.insert(0, str(Path(__file__).parent))

import jobs
from launcher import run_jobs


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("megatron")


@pytest.fixture(scope="session")
def two(folder: Path) -> dict[str, Any]:
    return run_jobs(2, jobs.two(folder), folder / "two")


@pytest.fixture(scope="session")
def one(folder: Path, two: dict[str, Any]) -> dict[str, Any]:
    return run_jobs(1, jobs.one(folder), folder / "one")


@pytest.fixture(scope="session")
def four(folder: Path, two: dict[str, Any]) -> dict[str, Any]:
    return run_jobs(4, jobs.four(folder), folder / "four")
