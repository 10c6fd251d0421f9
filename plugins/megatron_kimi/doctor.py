"""What `kimi-stack doctor` says of Megatron. Reads files; never imports Megatron."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from kimi_stack.report import Row
from megatron_kimi import compat

PTH = "kimi_stack_megatron.pth"


def report() -> list[Row]:
    """Rows on the Megatron here: its version, the symbols we use, and whether ``--use-muonclip`` needs no wrapper."""
    release = compat.version()
    if release is None:
        return [
            Row(
                "megatron",
                "fail",
                "its distribution is there, megatron.core is not",
                "reinstall megatron-core",
            )
        ]
    series = " or ".join(f"{s}.x" for s in compat.TESTED)
    rows = [
        Row("megatron", "ok", f"{release} at {compat.root()}")
        if compat.tested(release)
        else Row(
            "megatron", "warn", f"{release} is untested (tested: {series})", f"install megatron-core {series}"
        )
    ]
    found = compat.problems()
    rows += [Row("megatron hooks", "fail", line, f"install megatron-core {series}") for line in found]
    if not found:
        rows.append(Row("megatron hooks", "ok", "all symbols that MuonClip uses are there"))
    return [*rows, _start_row()]


def _start_row() -> Row:
    package = importlib.util.find_spec("megatron_kimi")
    folders = [] if package is None else [Path(p).parent for p in package.submodule_search_locations or ()]
    if any((folder / PTH).is_file() for folder in folders):
        return Row("--use-muonclip", "ok", "works in any Megatron script")
    return Row(
        "--use-muonclip",
        "warn",
        f"{PTH} is not beside the package, so Megatron's scripts do not know the flag",
        "pip install kimi-stack, or start with python -m megatron_kimi.launch SCRIPT",
    )
