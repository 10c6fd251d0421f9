"""verl imports this module in each of its processes (entry point ``verl.plugins``) and swallows what it raises.

So a failure is logged as an error here, and raised again where Seer is switched on (`rollout`).
"""

from __future__ import annotations

import logging
from pathlib import Path

from verl_seer import cpu

logger = logging.getLogger("verl.seer")

ROUTER_YAML = Path(__file__).parent / "config" / "router.yaml"


def register() -> None:
    """The name that our YAML uses for its own folder and, with ``VERL_PLATFORM=cpu``, the platform. Idempotent."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("kimi_seer", _path, replace=True)
    if cpu.wanted():
        cpu.install()


def _path(name: str) -> str:
    if name != "router":
        raise ValueError(f"kimi_seer resolves 'router' only, got {name!r}")
    return str(ROUTER_YAML)


try:
    register()
except Exception:
    logger.exception("kimi-stack's verl plugin did not load: Seer and the CPU platform are missing")
    raise
