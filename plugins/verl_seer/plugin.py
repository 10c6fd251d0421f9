"""verl imports this module in each of its processes (entry point ``verl.plugins``) and swallows what it raises.

So a failure is logged as an error here, and raised again where Seer is switched on (`rollout`).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from verl_seer import cpu
from verl_seer.options import SeerOptions

logger = logging.getLogger("verl.seer")

ROUTER_YAML = Path(__file__).parent / "config" / "router.yaml"


def register() -> None:
    """The resolver that our YAML uses and, with ``VERL_PLATFORM=cpu``, the platform. Idempotent."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("kimi_seer", _value, replace=True)
    if cpu.wanted():
        cpu.install()


def _value(name: str, *, _root_: Any) -> Any:
    """What our YAML asks for, from the options under ``seer`` of the whole config."""
    if name == "router":
        return str(ROUTER_YAML)
    options = SeerOptions.of(_root_)
    engine = {
        "speculative_config": options.speculative_config,
        "additional_config": options.additional_config,
        "kv_transfer_config": options.kv_transfer_config,
    }
    if name not in engine:
        raise ValueError(f"kimi_seer resolves router, {', '.join(engine)}, got {name!r}")
    value = engine[name]()
    return None if value is None else json.dumps(value)  # a resolver cannot return a mapping; vLLM reads JSON


try:
    register()
except Exception:
    logger.exception("kimi-stack's verl plugin did not load: Seer and the CPU platform are missing")
    raise
