"""Which KimiLinearForCausalLM serves: ours or vLLM's own. A pure rule, so that it can be read and tested.

On a CPU vLLM's own class cannot run (it needs Triton and CUTLASS), so ours is the default there. On any
accelerator upstream's class is tuned for it, so it stays unless ours is asked for, by
``--additional-config '{"kimi_stack": {"model": "ours"}}'`` or ``KIMI_STACK_VLLM_MODEL=ours``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Choice = Literal["ours", "upstream"]

ENVIRONMENT = "KIMI_STACK_VLLM_MODEL"
SECTION = "kimi_stack"
_VALUES = ("auto", "ours", "upstream")


def choose_model(device: str, environment: str | None = None, option: str | None = None) -> Choice:
    """The class to use on `device` ("cpu", "cuda", "xpu", ...).

    Args:
        device: vLLM's device type.
        environment: value of ``KIMI_STACK_VLLM_MODEL``, None where unset.
        option: value of ``additional_config["kimi_stack"]["model"]``, None where unset. It wins over the
            environment unless that names the other class.

    Raises:
        ValueError: an unknown value, or an option and an environment that name different classes.
    """
    for name, value in ((ENVIRONMENT, environment), (f"additional_config.{SECTION}.model", option)):
        if value is not None and value not in _VALUES:
            raise ValueError(f"{name} must be one of {', '.join(_VALUES)}, got {value!r}: correct or remove it")
    asked = {v for v in (environment, option) if v is not None and v != "auto"}
    if len(asked) > 1:
        raise ValueError(
            f"additional_config.{SECTION}.model is {option!r} but {ENVIRONMENT} is {environment!r}: "
            "remove one of the two"
        )
    if asked:
        return "ours" if asked.pop() == "ours" else "upstream"
    return "ours" if device == "cpu" else "upstream"


def read_option(additional_config: Any) -> str | None:
    """The ``model`` entry of our section of vLLM's ``--additional-config``, None where there is none.

    Raises:
        ValueError: the section is not an object, or has entries we do not know.
    """
    section = additional_config.get(SECTION) if isinstance(additional_config, Mapping) else None
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise ValueError(f"additional_config.{SECTION} must be an object, got {section!r}: use {{'model': 'ours'}}")
    unknown = sorted(set(section) - {"model"})
    if unknown:
        raise ValueError(
            f"additional_config.{SECTION} has the unknown entry {unknown[0]!r}: the only entry is 'model'"
        )
    value = section.get("model")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"additional_config.{SECTION}.model must be text, got {value!r}: use 'ours' or 'upstream'")
    return value
