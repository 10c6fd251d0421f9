"""Where NIXL keeps its plugins, and whether a NIXL has the interface that our plugin was written for."""

from __future__ import annotations

import importlib.metadata
import struct
from dataclasses import dataclass
from pathlib import Path

# Distribution -> its folder of plugins, relative to the folder it is installed in.
PLUGIN_FOLDERS = {
    "nixl-cu12": ".nixl_cu12.mesonpy.libs/plugins",
    "nixl-cu13": ".nixl_cu13.mesonpy.libs/plugins",
}
MODULES = {"nixl-cu12": "nixl_cu12", "nixl-cu13": "nixl_cu13"}
OLDEST, BEFORE = (1, 0), (2, 0)
# 0.10 and older accept the same interface number and then crash: the version is the first thing to look at. The
# second is the size of the engine's table of functions in a plugin that came with this NIXL: two words and 27 entries.
TABLE_SYMBOL = "_ZTV17nixlBackendEngine"
TABLE_BYTES = 29 * 8
WITNESS = "libplugin_POSIX.so"
# The library with NIXL's plugin manager and the two of its functions that add a folder of plugins.
CORE = "libnixl.so"
MANAGER = "_ZN17nixlPluginManager11getInstanceEv"
ADD_FOLDER = (
    "_ZN17nixlPluginManager18addPluginDirectoryERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
)


@dataclass(frozen=True)
class Nixl:
    """One installed NIXL."""

    distribution: str
    version: str
    plugins: Path

    @property
    def module(self) -> str:
        return MODULES[self.distribution]

    def problem(self) -> str | None:
        """Why our plugin must not be put into this NIXL, or None."""
        number = tuple(int(part) for part in self.version.split(".")[:2] if part.isdigit())
        if not OLDEST <= number < BEFORE:
            return (
                f"version {self.version} is outside {OLDEST[0]}.{OLDEST[1]} to below {BEFORE[0]}.{BEFORE[1]}"
            )
        if not self.plugins.is_dir():
            return f"its plugin folder {self.plugins} is missing"
        witness = self.plugins / WITNESS
        if not witness.is_file():
            return None
        size = symbol_size(witness, TABLE_SYMBOL)
        if size not in (None, TABLE_BYTES):
            return f"its backends have a table of {size} bytes, the plugin was written for {TABLE_BYTES}"
        return None


def installed() -> list[Nixl]:
    """Every NIXL of this environment."""
    found = []
    for name, folder in PLUGIN_FOLDERS.items():
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(Nixl(name, distribution.version, Path(str(distribution.locate_file(folder)))))
    return found


def symbol_size(library: Path, symbol: str) -> int | None:
    """Bytes of a dynamic symbol of a 64-bit little-endian ELF file; None if it has no such symbol."""
    data = library.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        return None
    sections_at, entry, count = (
        struct.unpack_from(form, data, at)[0] for form, at in (("<Q", 40), ("<H", 58), ("<H", 60))
    )
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, sections_at + i * entry) for i in range(count)]
    for section in sections:
        if section[1] != 11:  # the table of dynamic symbols
            continue
        names_at = sections[section[6]][4]
        wanted = symbol.encode() + b"\0"
        for at in range(section[4], section[4] + section[5], 24):
            name, _info, _other, _section, _value, size = struct.unpack_from("<IBBHQQ", data, at)
            if data.startswith(wanted, names_at + name):
                return int(size)
    return None
