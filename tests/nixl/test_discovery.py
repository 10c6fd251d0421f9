"""TENT found by a NIXL that nobody put it into: each test looks at processes of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import matrix

from nixl_tent import LIBRARY, compat, plugin

# What a stack does: plugins first, then NIXL, then an agent with TENT and a second backend.
AGENT = """
import logging, sys
logging.basicConfig(format="%(name)s: %(message)s")
sys.path.insert(0, {tests!r})
from agent_host import load_api
{before}
api = load_api()
{after}
agent = api.nixl_agent("found", api.nixl_agent_config(backends=[]))
print(agent.get_plugin_list())
for name in ("TENT", "POSIX"):
    agent.create_backend(name, {{}})
import nixl_tent.check
print(nixl_tent.check.run(api.__name__.partition(".")[0]))
"""
WATCH = "from nixl_tent import plugin; plugin.register(); plugin.register()"

Run = Callable[..., subprocess.CompletedProcess[str]]


def own_nixl() -> Path:
    """The folder in which the session's own NIXL is installed."""
    return compat.installed()[0].plugins.parent.parent


@pytest.fixture(params=[None, *matrix()], ids=lambda path: "own" if path is None else path.name)
def bare(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with one NIXL that does not have the plugin, as `pip install --target` makes it."""
    source = own_nixl() if request.param is None else request.param
    made = tmp_path / "site"
    for path in source.iterdir():
        if path.name.lstrip(".").startswith("nixl_cu"):
            # A hard link, because a symbolic one would lead the libraries back to the source.
            shutil.copytree(path, made / path.name, copy_function=os.link, symlinks=True)
    for found in made.glob(f".nixl_cu1?.mesonpy.libs/plugins/{LIBRARY}"):
        found.unlink()
    return made


@pytest.fixture
def run(bare: Path) -> Run:
    def python(before: str = "", after: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        module = next(path.name for path in bare.glob("nixl_cu1?") if path.is_dir())
        code = AGENT.format(tests=str(Path(__file__).parent), before=before, after=after)
        variables = {
            **os.environ,
            "PYTHONPATH": f"{bare}:{os.environ.get('PYTHONPATH', '')}",
            "NIXL_MODULE": module,
            **environment,
        }
        return subprocess.run(
            [sys.executable, "-c", code],
            env=variables,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return python


def test_without_the_hook_tent_is_unknown(run: Run) -> None:
    result = run()
    assert result.returncode != 0
    assert "'POSIX'" in result.stdout and "TENT" not in result.stdout


def test_a_nixl_imported_after_the_hook_knows_tent_beside_its_own(run: Run) -> None:
    result = run(before=WATCH)
    assert result.returncode == 0, result.stderr
    assert "'POSIX'" in result.stdout and "'TENT'" in result.stdout and "'UCX'" in result.stdout
    assert "write, read and notifications work" in result.stdout


def test_a_nixl_imported_before_the_hook_too(run: Run) -> None:
    result = run(after=WATCH)
    assert result.returncode == 0, result.stderr


def test_a_replaced_plugin_folder_does_not_hide_it(run: Run, bare: Path) -> None:
    folder = next(bare.glob(".nixl_cu1?.mesonpy.libs/plugins"))
    result = run(before=WATCH, NIXL_PLUGIN_DIR=str(folder))
    assert result.returncode == 0, result.stderr


def test_a_nixl_that_cannot_be_told_stays_usable_and_the_log_says_why(run: Run) -> None:
    spoil = "from nixl_tent import compat; compat.ADD_FOLDER = 'no_such_symbol'\n"
    result = run(before=spoil + WATCH)
    assert "NIXL's backend TENT is not available" in result.stderr
    assert "no_such_symbol" in result.stderr and "kimi-stack tent install" in result.stderr
    assert "'POSIX'" in result.stdout and "TENT" not in result.stdout


def test_a_nixl_whose_interface_is_another_is_not_told(run: Run) -> None:
    spoil = "from nixl_tent import compat; compat.OLDEST = (1, 9)\n"
    result = run(before=spoil + WATCH)
    assert "is outside 1.9 to below 2.0" in result.stderr and "TENT" not in result.stdout


def test_a_process_without_nixl_is_left_alone() -> None:
    code = (
        f"{WATCH}\nimport sys\nassert not any(n.startswith('nixl_cu') or n == 'torch' for n in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_two_registrations_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = len(sys.meta_path)
    plugin.register()
    plugin.register()
    assert len(sys.meta_path) == before + 1
