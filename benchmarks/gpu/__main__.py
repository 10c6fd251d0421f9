"""The Triton kernels on a GPU, beside FLA, torch and what else is there.

    python -m benchmarks.gpu [--quick] [--only kda] [--seconds 420] [--out FOLDER]
    python -m benchmarks.gpu --check        # compare results at tiny shapes; TRITON_INTERPRET=1 needs no GPU

Runs from a source tree (PYTHONPATH=kernels:.), nothing has to be built. Contenders take turns, caches are emptied
before each call, eager and as CUDA graphs; a ratio is over the rounds, with its lowest and highest. The ceilings are a
copy and a large bfloat16 product, measured first. FLASHKDA_LIBRARY=FILE names `_flashkda_C.abi3.so` of a vLLM wheel.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.common import print_result, table
from benchmarks.gpu import attnres, kda, max_logit, muon, peers, vision
from benchmarks.gpu.case import Case, Size
from benchmarks.gpu.measure import Report, check, run
from benchmarks.gpu.plots import plot
from benchmarks.gpu.timing import Deadline, Timer
from kimi_kernels import _triton

MODULES = {"kda": kda, "attnres": attnres, "muon": muon, "max_logit": max_logit, "vision": vision}
SECONDS = 420.0


def chosen(size: Size, only: list[str]) -> list[Case]:
    """Cases of the modules asked for, the first of each module first: they are what is run if the time is short."""
    lists = [module.cases(size) for name, module in MODULES.items() if not only or name in only]
    heads = [case for cases in lists for case in cases[:4]]
    return heads + [case for cases in lists for case in cases[4:]]


def seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def say_absent(report: Report) -> None:
    for what, why in report.absent.items():
        print(f"absent: {what}: {why}")
    for what in report.not_run:
        print(f"not run: {what}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the most telling shapes only, at most 50 seconds")
    parser.add_argument("--only", action="append", choices=list(MODULES), default=[], help="by default all")
    parser.add_argument("--seconds", type=seconds, help=f"begin nothing after so many, by default {SECONDS:g}")
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.png")
    parser.add_argument("--check", action="store_true", help="compare results at tiny shapes, time nothing")
    arguments = parser.parse_args()

    if _triton.unavailable():
        sys.exit(f"benchmarks.gpu: {_triton.unavailable()}: pip install triton")
    if arguments.check:
        _check(arguments.only)
        return
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no GPU here, so nothing is measured; --check compares results without one")
        print("RESULT " + json.dumps({"benchmark": "gpu", "machine": {"gpu": None}, "ratios": {}}), flush=True)
        return

    device = torch.device("cuda", torch.cuda.current_device())
    deadline = Deadline(arguments.seconds or (40.0 if arguments.quick else SECONDS))
    timer = Timer(device)
    machine = timer.machine()
    print(
        f"{machine.name}: a copy moves {machine.copy / 1e12:.2f} TB/s, "
        f"a bfloat16 product does {machine.gemm / 1e12:.0f} TFLOP/s"
    )
    cases = chosen("quick" if arguments.quick else "full", arguments.only)
    console = Console(stderr=True)
    with console.status("measuring") as status:
        report = run(cases, timer, machine, deadline, status.update)
    table(
        "microseconds, the shares of a copy's bandwidth and of a product's speed",
        ["case", "mode", "who", "us", "low", "high", "of copy", "of gemm"],
        [
            [f"{r.op} {r.shape}", r.mode, r.who, *(f"{1e6 * x:.1f}" for x in (r.seconds, r.low, r.high)),
             f"{r.of_copy:.2f}", f"{r.of_gemm:.2f}"]
            for r in report.rows
        ],
    )  # fmt: skip
    table(
        "microseconds of the host a call, until it is queued",
        ["case", "who", "us"],
        [[case, who, f"{1e6 * x:.0f}"] for case, of in report.host.items() for who, x in of.items()],
    )
    say_absent(report)
    where = {
        "gpu": machine.name, "copy_bytes_per_second": machine.copy, "gemm_flop_per_second": machine.gemm,
        "python": platform.python_version(), "date": datetime.date.today().isoformat(), **peers.versions(),
    }  # fmt: skip
    save = None if arguments.out is None else arguments.out / "gpu.json"
    print_result("gpu", report.ratios, save, gpu=where, **report.as_json())
    if arguments.out is not None and report.rows:
        plot(report.rows, f"{machine.name}, {where['date']}", arguments.out / "gpu.png")


def _check(only: list[str]) -> None:
    if _triton.interpreting():
        from kimi_kernels.testing import interpreter

        interpreter.install()
    elif not torch.cuda.is_available():
        sys.exit("benchmarks.gpu --check: needs a GPU, or TRITON_INTERPRET=1 for Triton's interpreter")
    os.environ["KIMI_KERNELS_BACKEND"] = "triton"
    device = torch.device("cpu" if _triton.interpreting() else "cuda")
    try:
        compared, report = check(chosen("tiny", only), device)
    except AssertionError as error:
        sys.exit(f"benchmarks.gpu --check: {error}")
    table(
        "relative difference (L2) from ours",
        ["case", "who", "difference"],
        [[case, who, f"{x:.2g}"] for case, who, x in compared],
    )
    say_absent(report)
    print("RESULT " + json.dumps({"benchmark": "gpu", "compared": len(compared), "ratios": {}}), flush=True)


if __name__ == "__main__":
    main()
