"""The short name `moonshotai/Kimi-Linear` through vLLM's own model redirect.

vLLM reads a table of names from the file that ``VLLM_MODEL_REDIRECT_PATH`` names. It consults it only when it
makes the model config; two look-ups come before that (the check for speculator checkpoints, and the cache
look-up of offline mode) and would ask the hub for a repository that does not exist, so they are told of the
table too.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENVIRONMENT = "VLLM_MODEL_REDIRECT_PATH"
TABLE = Path(__file__).with_name("redirects.json")

# Functions of `vllm.engine.arg_utils` that see a model's name before vLLM redirects it.
EARLY_LOOKUPS = ("maybe_override_with_speculators", "get_model_path")


def install() -> bool:
    """Point vLLM's redirect at our table. False (and no change) where the user has a table of their own."""
    chosen = os.environ.setdefault(ENVIRONMENT, str(TABLE))
    if chosen != str(TABLE):
        return False
    # Only the process that parses arguments has this module; importing it elsewhere would cost seconds.
    arguments = sys.modules.get("vllm.engine.arg_utils")
    for name in EARLY_LOOKUPS if arguments is not None else ():
        function = getattr(arguments, name)
        if not hasattr(function, "__wrapped__"):
            setattr(arguments, name, _redirected(function))
    return True


def resolve(model: Any) -> Any:
    """The published repository for a short name; any other value, and a local folder, unchanged."""
    if not isinstance(model, str) or Path(model).exists():
        return model
    return json.loads(TABLE.read_text(encoding="utf-8")).get(model, model)


def _redirected(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "model" in kwargs:
            kwargs["model"] = resolve(kwargs["model"])
        elif args:
            args = (resolve(args[0]), *args[1:])
        return function(*args, **kwargs)

    return wrapper
