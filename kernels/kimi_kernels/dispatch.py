"""Which implementation of an op runs, and why.

An op is a name; a backend ("cpu", "triton", "reference") registers a function for it, and another function
that takes the same arguments and answers None or the reason why this backend cannot run them. Custom ops call
`run` from their body, that is at run time, so that compiled graphs hold the op and not the choice.

`KIMI_KERNELS_BACKEND=reference|cpu|triton` forces one; if it cannot run the input, BackendError says why.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import _native, _triton

logger = logging.getLogger("kimi_kernels")

BACKENDS = ("cpu", "triton", "reference")

# The backends worth trying on a device, best first. Any other device: reference.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}


class BackendError(RuntimeError):
    """The backend that was forced cannot run this input; the message says why."""


class BackendChoice(NamedTuple):
    """A row of `backend_report`: `op` on `device` runs on `backend`, for `reason`."""

    op: str
    device: str
    backend: str
    reason: str


class _Implementation(NamedTuple):
    function: Callable[..., Any]
    refuses: Callable[..., str | None]
    native: bool


_registry: dict[str, dict[str, _Implementation]] = {}
_logged: set[tuple[str, str, str]] = set()


def _never_refuses(*_: Any) -> str | None:
    return None


def register(
    op: str, backend: str, refuses: Callable[..., str | None] = _never_refuses, *, native: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function is `backend`'s implementation of `op`.

    `refuses` gets the arguments of the call and returns None, or the reason why it cannot run them. `native`:
    a cpu implementation calls the native library, a triton one Triton; False where torch's own products are the
    fast path.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        _registry.setdefault(op, {})[backend] = _Implementation(function, refuses, native)
        return function

    return decorate


def _unavailable(op: str, backend: str) -> str | None:
    """Why `backend` cannot run `op` at all on this machine, whatever the input."""
    if backend not in _registry[op]:
        return f"no {backend} implementation of {op}"
    if not _registry[op][backend].native or backend == "reference":
        return None
    return _native.unavailable() if backend == "cpu" else _triton.unavailable()


def _refusal(op: str, backend: str, device: str, args: tuple[Any, ...]) -> str | None:
    reason = _unavailable(op, backend)
    if reason is not None:
        return reason
    if backend == "cpu" and device != "cpu":
        return f"takes CPU tensors, got {device}"
    if backend == "triton" and _registry[op][backend].native:
        reason = _triton.cannot_run_on(device)
        if reason is not None:
            return reason
    return _registry[op][backend].refuses(*args)


def _log_once(op: str, backend: str, reason: str) -> None:
    key = (op, backend, reason)
    if key not in _logged:
        _logged.add(key)
        logger.info("%s runs on backend %s: %s", op, backend, reason)


def run(op: str, device: torch.device, *args: Any) -> Any:
    """Run `op` on the best backend that takes `args`, or on the forced one.

    Raises BackendError when KIMI_KERNELS_BACKEND forces a backend that cannot run them.
    """
    forced = os.environ.get("KIMI_KERNELS_BACKEND")
    if forced:
        if forced not in BACKENDS:
            raise BackendError(f"KIMI_KERNELS_BACKEND must be one of {', '.join(BACKENDS)}, got {forced!r}")
        reason = _refusal(op, forced, device.type, args)
        if reason is not None:
            raise BackendError(f"KIMI_KERNELS_BACKEND={forced}, but it cannot run {op}: {reason}")
        _log_once(op, forced, "forced by KIMI_KERNELS_BACKEND")
        return _registry[op][forced].function(*args)
    why = f"preferred on {device.type}"
    for backend in _PREFERENCE.get(device.type, ("reference",)):
        reason = _refusal(op, backend, device.type, args)
        if reason is None:
            _log_once(op, backend, why)
            return _registry[op][backend].function(*args)
        why = f"{backend}: {reason}"
    raise BackendError(f"no backend runs {op} on {device.type}: {why}")


def backend_report() -> list[BackendChoice]:
    """What each op runs on here, for inputs that its backends take. CUDA has rows where there is a GPU."""
    import kimi_kernels

    for module in pkgutil.iter_modules(kimi_kernels.__path__):
        if module.ispkg:
            importlib.import_module(f"kimi_kernels.{module.name}")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    forced = os.environ.get("KIMI_KERNELS_BACKEND")
    rows = []
    for op in sorted(_registry):
        for device in devices:
            candidates = (forced,) if forced else _PREFERENCE[device]
            skipped = ""
            for backend in candidates:
                reason = _unavailable(op, backend)
                if reason is None and backend == "triton":
                    reason = _triton.cannot_run_on(device)
                if reason is None:
                    detail = ""
                    if backend == "cpu":
                        native = _registry[op][backend].native
                        detail = f"{_native.library_path().name}, {_native.isa()}" if native else "torch"
                    why = "forced by KIMI_KERNELS_BACKEND" if forced else skipped or "preferred"
                    rows.append(BackendChoice(op, device, backend, ", ".join(filter(None, (why, detail)))))
                    break
                skipped = f"{backend}: {reason}"
            else:
                rows.append(BackendChoice(op, device, "none", skipped))
    return rows
