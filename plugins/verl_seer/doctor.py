"""What `kimi-stack doctor` says of verl. Reads files; never imports verl or vLLM."""

from __future__ import annotations

from kimi_stack.report import Row
from verl_seer import compat


def report() -> list[Row]:
    """Rows on the verl here, its version and the symbols that Seer uses; the same symbols of a vLLM that is here."""
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
    if compat.root("vllm") is not None:
        lacking = compat.vllm_problems()
        fix = f"install vLLM {compat.TESTED_VLLM}, or set seer.drafting=false and seer.kv_pool=null"
        rows += [Row("vllm hooks of Seer", "fail", line, fix) for line in lacking]
        if not lacking:
            rows.append(Row("vllm hooks of Seer", "ok", "all symbols that drafting and the KV pool use are there"))
    return rows
