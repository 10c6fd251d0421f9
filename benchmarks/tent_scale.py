"""TENT's scheduler at scale, in virtual time: hundreds of nodes with eight ports of 200 Gbit/s each.

    python -m benchmarks.tent_scale [--quick] [--seed N] [--out FILE] [--plots FOLDER]

`tent_simulate` (csrc/simulate, built here with cmake) drives the plugin's own scheduler, rate estimate, queue depth,
stall clock, slicing and pairing over simulated ports. Every node keeps some transfers to peers drawn by lot under way.
Against the default ("spray"): equal shares in turn ("stripe", the plugin's mode `static`), each transfer on the link
that its number hashes to ("hash"), and each peer on one link ("pinned"). All notice dead links and send again in the
same way, so that only the choice of a link differs; the last slices are sent twice only by spray.

Nothing here is measured: processors cost nothing, congestion control is ideal (a receiving port never has more than
50 us before it), and what is said holds for this model. Equal seeds give equal figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import Ratio, print_result, table

SOURCES = Path(__file__).resolve().parents[1] / "plugins" / "nixl_tent" / "csrc"
BINDINGS = ("spray", "stripe", "hash", "pinned")
PORTS, GBIT = 8, 200
PROJECT = """cmake_minimum_required(VERSION 3.24)
project(tent_simulate VERSION 0.0.0 LANGUAGES CXX)
set(CMAKE_BUILD_TYPE Release)
add_subdirectory({sources} tent)
"""


def cases(quick: bool) -> dict[str, dict[str, float]]:
    """What the simulator is asked for; sizes in KiB, times in ms, shares of the nodes."""
    nodes, end, long = (16, 5, 30) if quick else (256, 10, 60)
    few = 16 if quick else 64
    base = {"nodes": nodes, "end_ms": end}
    many = {"elephants": 16, "elephant_kib": 8192}
    return {
        "one sender": {**base, "senders": 1},
        "all to all": base,
        "all to all, 8 MiB": {**base, **many},
        "half slow": {**base, "slow": 0.5, "slow_factor": 0.25},
        "slow midway": {**base, "slow": 0.5, "slow_factor": 0.25, "slow_at_ms": end / 2},
        "mice": {**base, "mice": 1},
        "mice, half slow": {**base, "mice": 1, "slow": 0.5, "slow_factor": 0.25},
        "cut and healed": {"nodes": few, "end_ms": long, "cut": 0.5, "cut_at_ms": long / 3,
                           "heal_at_ms": 2 * long / 3},
    }  # fmt: skip


@contextlib.contextmanager
def simulator() -> Iterator[Path]:
    """The simulator, built from this tree with warnings as errors, for the length of a `with` block."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "CMakeLists.txt").write_text(PROJECT.format(sources=SOURCES))
        for command in (
            ["cmake", "-S", name, "-B", f"{name}/out", "-DTENT_SIMULATOR=ON", "-DKIMI_WERROR=ON"],
            ["cmake", "--build", f"{name}/out", "-j2", "--target", "tent_simulate"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        yield folder / "out" / "tent" / "tent_simulate"


def simulate(program: Path, binding: str, seed: int, case: dict[str, float]) -> dict[str, Any]:
    """What became of one case: bytes/s, latencies in seconds, transfers that were lost.

    Raises:
        ValueError: the simulator does not know an argument, or it is out of range.
    """
    words = [f"{name}={value}" for name, value in case.items()]
    command = [str(program), f"binding={binding}", f"seed={seed}", f"ports={PORTS}", f"gbit={GBIT}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        raise ValueError(done.stderr.strip())
    done.check_returncode()
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def capacity(case: dict[str, float]) -> float:
    """Bytes/s that the ports of all senders together carry when they are well."""
    return (case.get("senders") or case["nodes"]) * PORTS * GBIT * 1e9 / 8


def plot(found: dict[str, dict[str, Any]], asked: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4))
    width = 0.8 / len(BINDINGS)
    for index, binding in enumerate(BINDINGS):
        places = [number + index * width for number in range(len(found))]
        share = [case[binding]["bytes_per_second"] / capacity(asked[name]) for name, case in found.items()]
        axes[0].bar(places, share, width, label=binding)
        tails = [case[binding]["elephants"]["p99"] * 1e3 for case in found.values()]
        axes[1].bar(places, tails, width, label=binding)
        name = "cut and healed"
        goodput = found[name][binding]["goodput"]
        step = asked[name]["end_ms"] / len(goodput)
        axes[2].plot(
            [step * (bin + 1) for bin in range(len(goodput))],
            [value / capacity(asked[name]) for value in goodput],
            label=binding,
        )
    for axis, title in zip(axes, ("throughput, share of all ports", "p99 of a large transfer, ms",
                                  "cut and healed: share of all ports over ms")):  # fmt: skip
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=7)
    for axis in axes[:2]:
        axis.set_xticks(
            [n + 0.3 for n in range(len(found))], list(found), rotation=30, ha="right", fontsize=7
        )
    axes[1].set_yscale("log")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="16 nodes and shorter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the result")
    parser.add_argument("--plots", type=Path, help="folder for tent_scale.png")
    arguments = parser.parse_args()
    if arguments.seed < 0:
        parser.error(f"--seed must be at least 0, got {arguments.seed}")

    asked = cases(arguments.quick)
    found: dict[str, dict[str, Any]] = {}
    ratios: list[Ratio] = []
    with simulator() as program:
        for name, case in asked.items():
            found[name] = {b: simulate(program, b, arguments.seed, case) for b in BINDINGS}
            for peer in BINDINGS[1:]:
                value = found[name]["spray"]["bytes_per_second"] / found[name][peer]["bytes_per_second"]
                ratios.append(Ratio(f"{name}: spray/{peer}", value, value, value, 1.0))

    rows = []
    for name, results in found.items():
        for binding, result in results.items():
            times = [f"{result[kind][p] * 1e3:.3f}" if result[kind]["count"] else "-"
                     for kind in ("elephants", "mice") for p in ("p50", "p99")]  # fmt: skip
            share = result["bytes_per_second"] / capacity(asked[name])
            rows.append([f"{name}: {binding}", f"{share:.3f}", *times, str(result["lost"])])
    columns = ["case", "of all ports", "large p50 ms", "p99 ms", "mice p50 ms", "p99 ms", "lost"]
    table("TENT's scheduler in virtual time", columns, rows)
    if arguments.plots:
        plot(found, asked, arguments.plots / "tent_scale.png")
    print_result("tent_scale", ratios, arguments.out, seed=arguments.seed, cases=asked, found=found)
    return 1 if any(result["lost"] for results in found.values() for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
