"""vLLM calls `register` in every process: it registers our model class, or refuses and says why."""

from __future__ import annotations

import logging
import os

from vllm_kimi import compat, redirect
from vllm_kimi.choice import ENVIRONMENT, choose_model

logger = logging.getLogger("vllm.kimi_stack")


def register() -> None:
    """Register Kimi Linear with this process's vLLM. Idempotent; never registers half.

    Raises:
        RuntimeError: this vLLM lacks something the plugin uses. The message lists it all.
    """
    found = compat.problems()
    if found:
        lines = "\n  ".join(found)
        raise RuntimeError(
            f"kimi-stack does not fit this vLLM and registers nothing:\n  {lines}\n"
            f"Install vLLM {compat.supported()}, or leave the plugin out with VLLM_PLUGINS=''."
        )
    from vllm.platforms import current_platform

    from vllm_kimi import settings

    choice = choose_model(current_platform.device_type, os.environ.get(ENVIRONMENT))
    settings.register_class(choice)
    settings.install()
    if not redirect.install():
        logger.info("%s is set: the short name moonshotai/Kimi-Linear is left to it", redirect.ENVIRONMENT)
