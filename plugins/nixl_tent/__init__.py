"""TENT: a NIXL backend that sprays slices over every link and heals in milliseconds.

The data plane is `libplugin_TENT.so`, which NIXL loads by name; this package installs it, looks at it and tests it.
"""

from __future__ import annotations

from pathlib import Path

LIBRARY = "libplugin_TENT.so"


def library() -> Path:
    """The plugin file that this distribution ships.

    Raises:
        FileNotFoundError: this is a source tree, or the build left it out.
    """
    path = Path(__file__).parent / LIBRARY
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: install kimi-stack as a wheel (pip install .)")
    return path
