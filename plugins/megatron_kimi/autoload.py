"""Hooks Megatron's training modules when they are imported, so that its launch scripts need no edit.

`install()` registers an import hook and imports nothing. It is called at start-up by ``kimi_stack_megatron.pth``,
which looks for ``--use-muonclip`` on the command line or ``MEGATRON_KIMI=1`` in the environment, by
``python -m megatron_kimi.launch``, or by a script of your own before it imports ``megatron.training``.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def _hook_arguments(module: ModuleType) -> None:
    from . import training

    training.hook_arguments(module)


def _hook_training(module: ModuleType) -> None:
    from . import training

    training.hook_training(module)


# Module of Megatron -> what to do right after its code has run.
HOOKED: dict[str, Callable[[ModuleType], None]] = {
    "megatron.training.arguments": _hook_arguments,
    "megatron.training.training": _hook_training,
}


class _Finder:
    """Finds a hooked module as Python would, and hooks it once it has been executed."""

    def __init__(self) -> None:
        self._searching: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        hook = HOOKED.get(name)
        if hook is None or name in self._searching:
            return None
        self._searching.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching.discard(name)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            hook(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Hook ``megatron.training`` now or as soon as it is imported. Calling it again does nothing."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
    for name, hook in HOOKED.items():
        if name in sys.modules:
            hook(sys.modules[name])
