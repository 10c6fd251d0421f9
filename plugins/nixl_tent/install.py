"""Put the plugin beside NIXL's own, so that `backends=["TENT"]` works without an environment variable.

NIXL looks in one folder only (`NIXL_PLUGIN_DIR` replaces it, and its own plugins then vanish), so the file is copied
there. It is not part of NIXL's own list of files: `uninstall` removes it, a reinstalled NIXL keeps it.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from pathlib import Path
from typing import Literal

from nixl_tent import LIBRARY, library
from nixl_tent.compat import Nixl

State = Literal["absent", "current", "other"]


def state(nixl: Nixl) -> State:
    """Whether this NIXL has our plugin: not at all, this build of it, or another one."""
    target = nixl.plugins / LIBRARY
    if not target.is_file():
        return "absent"
    return "current" if filecmp.cmp(target, library(), shallow=False) else "other"


def install(nixl: Nixl) -> Path:
    """Copy the plugin into this NIXL.

    Raises:
        ValueError: the plugin does not fit this NIXL.
        OSError: the folder cannot be written.
    """
    if problem := nixl.problem():
        raise ValueError(f"{nixl.distribution} {nixl.version}: {problem}: install nixl 1.0 to 1.5")
    target = nixl.plugins / LIBRARY
    # A running process may have the old file mapped: a new file takes its name, the old one is left alone.
    fresh = target.with_suffix(f".{os.getpid()}.new")
    shutil.copyfile(library(), fresh)
    fresh.chmod(0o755)
    fresh.replace(target)
    return target


def uninstall(nixl: Nixl) -> bool:
    """Remove the plugin from this NIXL; whether it was there."""
    target = nixl.plugins / LIBRARY
    if not target.is_file():
        return False
    target.unlink()
    return True
