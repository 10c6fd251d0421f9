"""``torchrun -m megatron_kimi.launch SCRIPT ...``: run a Megatron script with our flags, whatever Python's start-up.

The way for places where ``.pth`` files are not read: ``python -S``, a source tree on PYTHONPATH, a zipapp.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from .autoload import install


def main(arguments: list[str]) -> None:
    """Run ``arguments[0]`` as ``__main__`` with the rest as its command line, after `install`.

    Raises:
        SystemExit: no script is named, or it is not a file.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit("usage: python -m megatron_kimi.launch SCRIPT [SCRIPT'S ARGUMENTS]")
    script = Path(arguments[0])
    if not script.is_file():
        sys.exit(
            f"python -m megatron_kimi.launch: SCRIPT must be a Python file, got {arguments[0]}: no such file"
        )
    install()
    sys.argv[:] = arguments
    sys.path[0] = str(script.resolve().parent)  # as `python SCRIPT` has it
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
