"""The row a plugin's health report is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "info", "warn", "fail"]


@dataclass(frozen=True)
class Row:
    """One line of `kimi-stack doctor`.

    Args:
        subject: what was looked at, e.g. ``"vllm"`` or ``"hook vllm...:PluggableLayer"``.
        status: ``ok``; ``info`` (nothing wrong, nothing to do); ``warn`` (works, with a limit); ``fail``
            (does not work: `doctor` exits with 1).
        detail: what was found, in one line.
        fix: what to do about it; required in spirit for ``warn`` and ``fail``.
    """

    subject: str
    status: Status
    detail: str
    fix: str = ""
