"""Compiles every Triton kernel ahead of time for GPUs that are not here, and shows what it takes of them.

    python -m benchmarks.aot [--target sm_90] [--only kda] [--save FILE]

A row per kernel, configuration and target: registers of a thread, bytes spilled, shared memory of a program, and
the matrix instructions in its code. The kernels are the `aot_variants()` of each op's `triton_kernels.py`. No GPU is
needed; spills make the exit code 1 where they break the budget: on sm_90 no kernel may, but those in MAY_SPILL.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import table
from kimi_kernels import _triton

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# Kernels that spill on sm_90: the docstring of each's configuration says why.
MAY_SPILL = {
    "kda_gradient": "kda.triton_kernels.gradient_config",
    "kda_gradient_softplus": "kda.triton_kernels.gradient_config",
    "attnres_score": "attnres.triton_kernels.score_config",
}
_MATRIX = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma": r"mma\.sync", "mfma": r"v_mfma"}


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes. `registers`: of a thread; `shared`, `spill`: bytes; `matrix`: instructions."""

    kernel: str
    target: str
    config: str
    backward: bool
    registers: int
    spill: int
    shared: int
    matrix: str


def variants(only: str = "") -> Iterator[_triton.Variant]:
    """Every registered way to compile a kernel whose name or op contains `only`."""
    import kimi_kernels

    for module in pkgutil.iter_modules(kimi_kernels.__path__):
        name = f"kimi_kernels.{module.name}.triton_kernels"
        if not module.ispkg or importlib.util.find_spec(name) is None:
            continue
        for variant in importlib.import_module(name).aot_variants():
            if only in module.name or only in variant.name:
                yield variant


def compile_for(variant: _triton.Variant, target: str) -> Usage:
    """Compile one variant for one of TARGETS. Needs a process without TRITON_INTERPRET."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    function, config = variant.kernel, variant.config
    if gpu.backend == "hip":  # kimi_kernels._triton.float32_products
        config = variant.amd or config
        swapped = {k: "ieee" if v == "tf32x3" else v for k, v in config.constants.items()}
        config = config._replace(constants=swapped)
    names = function.arg_names
    types = {**variant.signature, **dict.fromkeys(config.constants, "constexpr")}
    missing = [name for name in names if name not in types]
    if missing:
        raise ValueError(f"{variant.name}: no type for arguments {', '.join(missing)}")
    source = ASTSource(
        fn=function,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in config.constants.items()},
        # Allocations are aligned, and so are strides of any size that matters.
        attrs={
            place: [["tt.divisibility", 16]]
            for n, name in enumerate(names)
            for place, kind in _places(n, types[name])
            if _divisible(name, kind)
        },
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=gpu, options=options)
    code, registers, spill = _nvidia(compiled, gpu) if gpu.backend == "cuda" else _amd(compiled)
    counts = {name: len(re.findall(pattern, code)) for name, pattern in _MATRIX.items()}
    constants = " ".join(f"{name}={value}" for name, value in config.constants.items())
    return Usage(
        variant.name,
        target,
        f"{constants} warps={config.num_warps} stages={config.num_stages}",
        variant.backward,
        registers,
        spill,
        compiled.metadata.shared,
        " ".join(f"{name}:{count}" for name, count in counts.items() if count) or "-",
    )


def _places(n: int, kind: str | tuple[str, ...]) -> list[tuple[tuple[int, ...], str]]:
    """Where Triton keeps argument n, and its type: one place, or one for each element of a tuple."""
    return [((n,), kind)] if isinstance(kind, str) else [((n, i), one) for i, one in enumerate(kind)]


def _divisible(name: str, kind: str) -> bool:
    return kind.startswith("*") or (kind.startswith("i") and "stride" in name)


def _nvidia(compiled: Any, gpu: Any) -> tuple[str, int, int]:
    from triton.backends.nvidia.compiler import get_ptxas

    found = get_ptxas(gpu.arch)
    assembler = found[0] if isinstance(found, tuple) else getattr(found, "path", found)
    code = compiled.asm["ptx"]
    arch = re.search(r"\.target\s+(\w+)", code)
    assert arch is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(code)
        file.flush()
        command = [assembler, "-v", f"--gpu-name={arch[1]}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spill = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None and spill is not None, said
    return code, int(registers[1]), int(spill[1])


def _amd(compiled: Any) -> tuple[str, int, int]:
    code = compiled.asm["amdgcn"]
    registers, spilled = (
        re.search(r"\.vgpr_count:\s+(\d+)", code),
        re.search(r"\.vgpr_spill_count:\s+(\d+)", code),
    )
    assert registers is not None and spilled is not None
    return code, int(registers[1]), 4 * int(spilled[1])


def over_budget(usage: Usage) -> str | None:
    """What is wrong with this usage, or None."""
    if usage.shared > SHARED_LIMIT[usage.target]:
        return f"{usage.shared} bytes of shared memory, {usage.target} has {SHARED_LIMIT[usage.target]}"
    if usage.target == "sm_90" and usage.spill and usage.kernel not in MAY_SPILL:
        return f"spills {usage.spill} bytes on sm_90"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=TARGETS, action="append", help="by default all")
    parser.add_argument("--only", default="", help="kernels whose op or name contains this")
    parser.add_argument("--save", type=Path, help="also write the rows to this file, as json")
    arguments = parser.parse_args()
    if _triton.unavailable():
        sys.exit(f"benchmarks.aot: {_triton.unavailable()}: pip install triton")
    if _triton.interpreting():
        sys.exit("benchmarks.aot: interpreted kernels cannot be compiled: unset TRITON_INTERPRET")
    import triton

    targets = arguments.target or TARGETS
    usages = [compile_for(v, target) for v in variants(arguments.only) for target in targets]
    if not usages:
        sys.exit(f"benchmarks.aot: no kernel's op or name contains {arguments.only!r}")
    problems = {usage: problem for usage in usages if (problem := over_budget(usage))}
    table(
        f"Triton {triton.__version__}, compiled ahead of time",
        ["kernel", "configuration", "target", "registers", "spill B", "shared KB", "matrix"],
        [
            [u.kernel, u.config, u.target, str(u.registers), str(u.spill), f"{u.shared / 1024:.0f}", u.matrix]
            for u in usages
        ],
    )
    body = {"benchmark": "aot", "triton": triton.__version__, "rows": [asdict(u) for u in usages]}
    if arguments.save:
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        arguments.save.write_text(json.dumps(body, indent=1) + "\n")
    print("RESULT " + json.dumps(body), flush=True)
    if problems:
        sys.exit(
            "\n".join(f"benchmarks.aot: {u.kernel} ({u.config}): {what}" for u, what in problems.items())
        )


if __name__ == "__main__":
    main()
