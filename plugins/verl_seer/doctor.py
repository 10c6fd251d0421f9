"""What `kimi-stack doctor` says of verl. Reads files; never imports verl."""

from __future__ import annotations

from kimi_stack.report import Row
from verl_seer import compat


def report() -> list[Row]:
    """Rows on the verl here: its version, and the symbols that Seer uses."""
    release = compat.version()
    rows = [
        Row("verl", "ok", f"{release} at {compat.root()}")
        if release == compat.TESTED
        else Row("verl", "warn", f"{release} is untested", f"install verl {compat.TESTED}")
    ]
    found = compat.problems()
    rows += [Row("verl hooks", "fail", line, f"install verl {compat.TESTED}") for line in found]
    if not found:
        rows.append(Row("verl hooks", "ok", "all symbols that Seer uses are there"))
    return rows
