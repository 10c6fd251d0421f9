"""Which NIXLs there are, with the plugin put into each; programs built from the C++ sources; labs.

The session's environment has one NIXL. More versions may lie in folders named by NIXL_MATRIX, one a folder, as
`pip install --no-deps --target FOLDER nixl-cu13==...` leaves them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from nixl_tent import LIBRARY, compat, install, lab, library

sys.path.insert(0, str(Path(__file__).parent))
from hosts import AgentHost, introduce

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "plugins" / "nixl_tent" / "csrc"
PROGRAMS = ("unit", "stress", "hosting", "node", "fuzz_parsers", "fuzz_target", "fuzz_initiator")


def matrix() -> list[Path]:
    folder = os.environ.get("NIXL_MATRIX")
    return sorted(path for path in Path(folder).iterdir() if path.is_dir()) if folder else []


@pytest.fixture(scope="session", autouse=True)
def plugin_installed() -> None:
    found = compat.installed()
    assert found, "no NIXL in this environment: pip install --no-deps nixl-cu13 numpy"
    for nixl in found:
        install.install(nixl)


@pytest.fixture(scope="module")
def bare_nixl(plugin_installed: None) -> Iterator[None]:
    """The plugin is not in NIXL's folder, so that processes must find it themselves."""
    for nixl in compat.installed():
        install.uninstall(nixl)
    yield
    for nixl in compat.installed():
        install.install(nixl)


def environment_of(folder: Path) -> dict[str, str]:
    """The variables with which agent_host.py takes its NIXL from a folder of the matrix, plugin included."""
    plugins = next(folder.glob(".nixl_cu1?.mesonpy.libs/plugins"))
    shutil.copyfile(library(), plugins / LIBRARY)
    module = next(path.name for path in folder.glob("nixl_cu1?") if path.is_dir())
    return {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}", "NIXL_MODULE": module}


@pytest.fixture
def pair() -> Iterator[tuple[AgentHost, AgentHost]]:
    """Agents A and B on this host, introduced; they have no memory yet."""
    with AgentHost("A") as a, AgentHost("B") as b:
        introduce(a, b)
        yield a, b


@pytest.fixture(scope="session")
def needs_lab() -> None:
    try:
        lab.check_possible()
    except lab.LabError as error:
        pytest.skip(f"no lab here: {error}")


@pytest.fixture(scope="session")
def programs_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Sanitizers ("address,undefined", "thread") -> the folder with the C++ test programs, built once."""
    return cache(lambda sanitize: build(tmp_path_factory, sanitize))


def build(tmp_path_factory: pytest.TempPathFactory, sanitize: str) -> Path:
    """The folder with the C++ test programs, built with warnings as errors."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    folder = tmp_path_factory.mktemp("build")
    (folder / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(tent_tests VERSION 0.0.0 LANGUAGES CXX)\n"
        f"set(CMAKE_BUILD_TYPE Release)\nadd_subdirectory({SOURCES} tent)\n"
    )
    options = ["-DKIMI_WERROR=ON", "-DTENT_TESTS=ON", f"-DTENT_SANITIZE={sanitize}"]
    subprocess.run(["cmake", "-S", folder, "-B", folder / "out", *options], check=True, capture_output=True)
    made = subprocess.run(
        ["cmake", "--build", folder / "out", "-j2", "--target", *(f"tent_{name}" for name in PROGRAMS)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-4000:]
    return folder / "out" / "tent"
