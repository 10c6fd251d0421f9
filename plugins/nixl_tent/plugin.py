"""What vLLM calls in every process: from then on `"backends": ["TENT"]` works in its NIXL connector."""

from __future__ import annotations

from nixl_tent import discovery


def register() -> None:
    """Make TENT known to NIXL when vLLM imports it. Idempotent; does nothing in a process without NIXL."""
    discovery.watch()
