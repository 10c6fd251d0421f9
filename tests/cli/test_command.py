"""The installed `kimi-stack` command, run as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STACKS = ("triton", "vllm", "sglang", "megatron", "verl", "nixl", "transformers")
COMMAND = Path(sys.executable).parent / "kimi-stack"


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(COMMAND), *arguments], capture_output=True, text=True, env={**os.environ, **env}, timeout=120
    )


def test_help_lists_the_commands() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert "doctor" in result.stdout and "models" in result.stdout


def test_version_is_the_distribution_version() -> None:
    import importlib.metadata

    assert run("--version").stdout.split() == ["kimi-stack", importlib.metadata.version("kimi-stack")]


def test_doctor_names_a_backend_for_every_operation() -> None:
    result = run("doctor", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {row["subject"]: row for row in json.loads(result.stdout)["kernels"]}
    for operation in ("chunk_kda", "kda_decode", "attn_res", "mla_paged_attention"):
        row = rows[f"{operation} (cpu)"]
        assert row["status"] == "ok" and row["detail"].startswith("cpu"), row


def test_doctor_fails_on_a_broken_native_library(tmp_path: Path) -> None:
    broken = tmp_path / "libkimi_kernels_cpu.so"
    broken.write_bytes(b"not a library")
    result = run("doctor", KIMI_KERNELS_LIBRARY=str(broken))
    assert result.returncode == 1
    assert "problem(s)" in result.stdout and "cannot load" in result.stdout


def test_unknown_command_says_what_there_is() -> None:
    result = run("docter")
    assert result.returncode == 2
    assert "No such command" in result.stderr


@pytest.mark.parametrize("package", ["kimi_kernels", "kimi_models", "kimi_stack", "vllm_kimi"])
def test_importing_a_package_imports_no_stack(package: str) -> None:
    """Neither triton nor any stack is imported, and the native library is not loaded."""
    program = (
        f"import sys, {package}; stacks = {STACKS!r}; print([name for name in stacks if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
