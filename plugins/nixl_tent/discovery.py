"""TENT in a process whose NIXL does not have the plugin in its folder: nothing is installed, nothing is set.

NIXL's plugin manager takes further folders, but only from C++; Python reaches that through the exported symbol. The
folder is added when NIXL is imported, so that a process that never imports it pays nothing.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from nixl_tent import LIBRARY, compat, library

logger = logging.getLogger("nixl_tent")

_NATIVE = "_bindings"  # the module of NIXL that loads its libraries
_offered: set[str] = set()  # modules whose NIXL has been told of our folder


class _String(ctypes.Structure):
    """A `std::string` as libstdc++ lays it out since GCC 5."""

    _fields_ = (
        ("data", ctypes.c_char_p),
        ("length", ctypes.c_size_t),
        ("local", ctypes.c_char * 16),
    )


class _Finder(importlib.abc.MetaPathFinder):
    """Offers the plugin to a NIXL as soon as its native module is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, module = fullname.partition(".")
        if module != _NATIVE or package not in compat.MODULES.values():
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def and_offer(loaded: ModuleType) -> None:
            execute(loaded)
            _offer_or_log(package, loaded)

        spec.loader.exec_module = and_offer  # type: ignore[assignment, method-assign]
        return spec


def watch() -> None:
    """From now on every NIXL that this process imports knows TENT; those it has imported already, at once."""
    for package in compat.MODULES.values():
        loaded = sys.modules.get(f"{package}.{_NATIVE}")
        if loaded is not None:
            _offer_or_log(package, loaded)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _offer_or_log(package: str, loaded: ModuleType) -> None:
    """A process that imports NIXL for another backend must not fail for want of ours."""
    problem = offer(package, loaded)
    if problem:
        logger.warning("NIXL's backend TENT is not available: %s", problem)


def offer(package: str, loaded: ModuleType) -> str | None:
    """Make TENT known to an imported NIXL.

    Args:
        package: ``nixl_cu12`` or ``nixl_cu13``.
        loaded: its module ``_bindings``.

    Returns:
        Why that is not possible, or None where TENT is known now.
    """
    if package in _offered:
        return None
    site = Path(str(loaded.__file__)).resolve().parent.parent
    for nixl in compat.installed():
        if nixl.module == package and nixl.plugins.resolve().is_relative_to(site):
            break
    else:
        return f"{site / package} belongs to no installed distribution, so its version is not known"
    if not (nixl.plugins / LIBRARY).is_file():
        try:
            problem = nixl.problem() or _add_folder(nixl.plugins.parent / compat.CORE, library().parent)
        except FileNotFoundError as error:
            problem = str(error)
        if problem:
            return f"{nixl.distribution} {nixl.version}: {problem}"
    _offered.add(package)
    return None


def _add_folder(core: Path, folder: Path) -> str | None:
    """What is missing in NIXL's library to take a further folder of plugins, or None after it took it."""
    try:
        # Never a second copy of it: the folder would be added to a manager that nobody asks.
        native = ctypes.CDLL(str(core), mode=os.RTLD_NOW | os.RTLD_NOLOAD)
        manager, add = getattr(native, compat.MANAGER), getattr(native, compat.ADD_FOLDER)
    except (OSError, AttributeError) as error:
        return f"it takes no further folder of plugins ({error}): run `kimi-stack tent install`"
    manager.restype = ctypes.c_void_p
    add.argtypes = [ctypes.c_void_p, ctypes.POINTER(_String)]
    add.restype = None
    text = str(folder).encode()
    add(manager(), ctypes.byref(_String(text, len(text))))
    return None
