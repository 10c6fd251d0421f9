"""``torchrun -m megatron_kimi.launch SCRIPT ...``: run a Megatron script with our flags, whatever Python's start-up.

The way for places where ``.pth`` files are not read: ``python -S``, a source tree on PYTHONPATH, a zipapp.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from .autoload import install

USAGE = "python -m megatron_kimi.launch SCRIPT [ARGUMENTS OF SCRIPT]"


def main(arguments: list[str]) -> None:
    """Run ``arguments[0]`` as ``__main__`` with the rest as its command line, after `install`; -h lists our flags.

    Raises:
        SystemExit: no script is named, or it is not a file.
    """
    if not arguments:
        sys.exit(f"usage: {USAGE}")
    if arguments[0] in ("-h", "--help"):
        from .options import add_arguments

        parser = argparse.ArgumentParser(usage=USAGE, add_help=False)
        print(add_arguments(parser).format_help())
        return
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
