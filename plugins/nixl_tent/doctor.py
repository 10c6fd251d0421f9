"""What `kimi-stack doctor` says of NIXL. Looks at files only; `check_rows` runs a transfer in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from kimi_stack.report import Row
from nixl_tent import compat, install

INSTALL = "kimi-stack tent install"


def report() -> list[Row]:
    """Each NIXL of this environment: whether the plugin fits it and is in it."""
    rows = [_row(nixl) for nixl in compat.installed()]
    if not rows:
        rows.append(
            Row("nixl", "info", "no nixl-cu12 or nixl-cu13 in this environment", "pip install nixl-cu13")
        )
    folder = os.environ.get("NIXL_PLUGIN_DIR")
    if folder:
        rows.append(
            Row(
                "NIXL_PLUGIN_DIR",
                "warn",
                f"{folder} replaces the folder that NIXL takes its plugins from",
                f"unset it, or copy {install.LIBRARY} there yourself",
            )
        )
    return rows


def _row(nixl: compat.Nixl) -> Row:
    subject = f"{nixl.distribution} {nixl.version}"
    if problem := nixl.problem():
        return Row(subject, "fail", problem, "install a nixl between 1.0 and 1.5")
    try:
        state = install.state(nixl)
    except FileNotFoundError as error:
        return Row(subject, "fail", str(error), "pip install kimi-stack where a C++20 compiler is present")
    if state == "current":
        return Row(subject, "ok", "the TENT plugin is in it")
    if state == "absent":
        found = "the TENT plugin fits, and is not in it: only vLLM and our adapters find it"
        return Row(subject, "warn", found, INSTALL)
    return Row(subject, "warn", "it has the TENT plugin of another build", INSTALL)


def check_rows(timeout: float = 120.0) -> list[Row]:
    """A real transfer with each NIXL that has the plugin."""
    rows = []
    for nixl in compat.installed():
        if nixl.problem() or install.state(nixl) == "absent":
            continue
        subject = f"{nixl.distribution} round trip"
        command = [sys.executable, "-m", "nixl_tent.check", nixl.module]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            rows.append(Row(subject, "fail", f"no answer in {timeout:g} s", INSTALL))
            continue
        if result.returncode == 0:
            rows.append(Row(subject, "ok", result.stdout.strip().splitlines()[-1]))
        else:
            lines = result.stderr.strip().splitlines() or [f"ended with status {result.returncode}"]
            rows.append(Row(subject, "fail", lines[-1], INSTALL))
    return rows
