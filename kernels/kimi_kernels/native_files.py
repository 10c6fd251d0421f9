"""Where a package's native library lies. Needs no torch, so that plugins without it can use it too."""

from __future__ import annotations

import importlib
import os
from pathlib import Path


class NativeLibraryError(RuntimeError):
    """A native library is missing or unusable; the message says why and what to do."""


def find_library(package: str, file_name: str, variable: str) -> Path:
    """The file named by the environment variable `variable`, or `file_name` next to the package.

    Raises NativeLibraryError where neither is a file.
    """
    named = os.environ.get(variable)
    if named:
        path = Path(named)
        if not path.is_file():
            raise NativeLibraryError(f"{variable}={named} is not a file: build it, or unset the variable")
        return path
    folders = [Path(folder) for folder in importlib.import_module(package).__path__]
    for folder in folders:
        if (folder / file_name).is_file():
            return folder / file_name
    raise NativeLibraryError(
        f"{file_name} not found next to the package (looked in {', '.join(map(str, folders))}): "
        f"install the package with pip, or build it with cmake and set {variable}"
    )
