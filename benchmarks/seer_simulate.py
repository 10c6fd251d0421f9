"""Seer's scheduling in the simulator, beside the paper's figures and against today's stock verl.

python -m benchmarks.seer_simulate [--quick] [--seeds N] [--one-size] [--out FILE] [--plots FOLDER] [--pages FOLDER]

For the paper's three workloads, groups of 8 and of 16: throughput and tail time of the old group-level baseline, stock
verl 0.9.1, stock with priorities, stock with suffix decoding, Seer's techniques added in turn, and the oracle order.
Then sweeps: correlation of lengths within a group down to 0, chunk size on every workload, fairness, and 8 to 64
instances, the last with 10,000 requests. The step times are a fitted model (docs/seer.md); a figure says what the
schedule changes in that model. All of it repeats exactly by seed; only `cpu_seconds` depends on the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common import Ratio, command_line, machine, print_result, table
from verl_seer.scheduler import SchedulerConfig
from verl_seer.simulate.paper import ABLATION, FIGURES, GAIN_AIM, TAIL_AIM
from verl_seer.simulate.presets import BASELINE, WORKLOADS, policies
from verl_seer.simulate.rollout import Divided, Outcome, simulate
from verl_seer.simulate.study import StudyProgress, compare, document, gains
from verl_seer.simulate.workload import Workload, synthesize

CHUNK = 4096
SWEPT = "moonlight"
CHUNKS = (1024, 2048, 4096, 8192, 16384)
INSTANCES = (8, 16, 32, 64)
REQUESTS = 10_000  # at the most instances; fewer get as many each


def workload_study(
    w: Workload, seeds: Sequence[int], group_size: int, progress: StudyProgress
) -> tuple[dict, list[dict]]:
    """(policy -> median throughput, gain, tail gain, gain over stock; with extremes) and the outcomes by seed."""
    runs = [compare(synthesize(w, s, group_size), w.cluster, policies(CHUNK), s, progress) for s in seeds]
    against = {name: [gains(r, name) for r in runs] for name in (BASELINE, "stock")}
    rows = {}
    for name in runs[0]:
        gain, tail = zip(*(g[name] for g in against[BASELINE]))
        stock = [g[name][0] for g in against["stock"]]
        stock_tail = [g[name][1] for g in against["stock"]]
        rows[name] = {
            "makespan": statistics.median(r[name].makespan for r in runs),
            "tail": statistics.median(r[name].tail for r in runs),
            "preemptions": statistics.median(r[name].preemptions for r in runs),
            "recomputed_tokens": statistics.median(r[name].recomputed_tokens for r in runs),
            "transferred_tokens": statistics.median(r[name].transferred_tokens for r in runs),
            "accepted_length": runs[0][name].accepted_length,
            "kv_use": statistics.median(r[name].kv_use for r in runs),
            "gain": _spread(gain),
            "tail_gone": _spread(tail),
            "gain_over_stock": _spread(stock),
            "tail_gone_over_stock": _spread(stock_tail),
        }
    return rows, runs


def _spread(values: Sequence[float]) -> list[float]:
    return [round(v, 4) for v in (statistics.median(values), min(values), max(values))]


def sweep_correlation(w: Workload, seed: int, values: Sequence[float]) -> dict[str, dict[str, list[float]]]:
    """Correlation -> order of the divided rollout -> [throughput, tail time] against arrival order."""
    out = {}
    for rho in values:
        samples = synthesize(w, seed, correlation=rho)
        chosen = ("divided", "divided+round-robin", "divided+context", "divided+exposure", "oracle")
        runs = compare(samples, w.cluster, {n: p for n, p in policies(CHUNK).items() if n in chosen}, seed)
        base = runs["divided"]
        out[str(rho)] = {n: [base.makespan / o.makespan, o.tail / base.tail] for n, o in runs.items()}
    return out


def sweep_chunks(w: Workload, seed: int, sizes: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """Chunk size -> policy -> [throughput against the group-level baseline, part of its tail gone, KV use]."""
    samples = synthesize(w, seed)
    base = simulate(samples, w.cluster, policies()[BASELINE], seed)
    out = {}
    for size in sizes:
        chosen = {
            n: p for n, p in policies(size).items() if n in ("divided", "divided+context", "divided+exposure")
        }
        runs = compare(samples, w.cluster, chosen, seed)
        out[str(size)] = {
            n: [base.makespan / o.makespan, 1 - o.tail / base.tail, o.kv_use] for n, o in runs.items()
        }
    return out


def sweep_fairness(w: Workload, seed: int) -> dict[str, list[float]]:
    """Fairness period -> [throughput, part of the tail gone] of Algorithm 2 against the group-level baseline."""
    samples = synthesize(w, seed)
    base = simulate(samples, w.cluster, policies()[BASELINE], seed)
    out = {}
    for period in (2, 4, 8, 16, 64, 0):
        o = simulate(samples, w.cluster, Divided(SchedulerConfig(CHUNK, fairness_period=period)), seed)
        out[str(period)] = [base.makespan / o.makespan, 1 - o.tail / base.tail]
    return out


def scale(w: Workload, instances: Sequence[int]) -> dict[str, dict[str, float]]:
    """Instances -> requests, gains against the group-level baseline, and Seer's own events and processor seconds."""
    out = {}
    for n in instances:
        requests = REQUESTS * n // max(INSTANCES) // w.group_size * w.group_size
        big = dataclasses.replace(w, requests=requests, cluster=dataclasses.replace(w.cluster, instances=n))
        samples = synthesize(big, 0)
        start = time.process_time()
        seer = simulate(samples, big.cluster, policies(CHUNK)["seer"])
        seconds = round(time.process_time() - start, 1)
        chosen = {
            name: p for name, p in policies(CHUNK).items() if name in (BASELINE, "stock", "seer+exposure")
        }
        runs = {**compare(samples, big.cluster, chosen), "seer": seer}
        against = {name: gain for name, (gain, _) in gains(runs).items() if name != BASELINE}
        out[str(n)] = {"requests": requests, "chunks": seer.chunks, "cpu_seconds": seconds, **against}
    return out


@contextmanager
def _progress(title: str, simulations: int) -> Iterator[StudyProgress]:
    """A bar on stderr over so many simulations, filled by the callback of `compare`."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=simulations)
        begun, before = 0, ""

        def report(policy: str, done: int, total: int) -> None:
            nonlocal begun, before
            begun, before = begun + (policy != before), policy
            bar.update(task, completed=begun - 1 + done / total, description=f"{title}: {policy}")

        yield report


def _print_study(name: str, rows: dict[str, dict], figures: Any) -> None:
    printed = dict(zip(("divided", "divided+context", "seer"), figures.ablation))
    table(
        name,
        [
            "policy",
            "rollout s",
            "gain (low..high)",
            "paper",
            "over stock",
            "tail s",
            "tail gone",
            "preemptions",
        ],
        [
            [
                policy,
                f"{r['makespan']:,.0f}",
                "{:.2f} ({:.2f}..{:.2f})".format(*r["gain"]),
                f"{printed[policy]:.2f}" if policy in printed else "",
                f"{r['gain_over_stock'][0]:.2f}",
                f"{r['tail']:,.0f}",
                f"{r['tail_gone'][0]:.0%}",
                f"{r['preemptions']:,.0f}",
            ]
            for policy, r in rows.items()
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one seed, two workloads, short sweeps; under 50 s"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the lengths (default 3)")
    parser.add_argument(
        "--one-size", action="store_true", help="only the group size of the paper's table, not 8 and 16"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--plots", type=Path, help="folder for the plots (needs matplotlib)")
    parser.add_argument("--pages", type=Path, help="folder for the report pages of the first seed")
    options = parser.parse_args()
    seeds = tuple(range(1 if options.quick else options.seeds))
    names = [SWEPT, "qwen2-vl-72b"] if options.quick else list(WORKLOADS)
    studies: dict[str, dict] = {}
    ratios: list[Ratio] = []
    for name in names:
        w = WORKLOADS[name]
        sizes = [w.group_size] if options.quick or options.one_size else [8, 16]
        for size in sizes:
            title = f"{w.paper}, groups of {size}"
            with _progress(title, len(seeds) * len(policies())) as progress:
                rows, runs = workload_study(w, seeds, size, progress)
            studies[title] = rows
            _print_study(title, rows, FIGURES[w.paper])
            for policy in ("seer", "seer+exposure"):
                row = rows[policy]
                ratios += [
                    Ratio(f"{title}, {policy}: throughput over group-level", *row["gain"], goal=GAIN_AIM[0]),
                    Ratio(
                        f"{title}, {policy}: tail gone, of group-level", *row["tail_gone"], goal=TAIL_AIM[0]
                    ),
                    Ratio(f"{title}, {policy}: throughput over stock", *row["gain_over_stock"], goal=1.0),
                    Ratio(f"{title}, {policy}: tail gone, of stock", *row["tail_gone_over_stock"], goal=0.0),
                ]
            if options.pages and size == w.group_size:
                _write_page(options.pages, w, title, runs[0], seeds[0])
    swept = WORKLOADS[SWEPT]
    values = (0.0, 0.8) if options.quick else (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
    correlation = {
        n: sweep_correlation(WORKLOADS[n], 0, values) for n in ([SWEPT] if options.quick else names)
    }
    for name, rows in correlation.items():
        table(
            f"{WORKLOADS[name].paper}: throughput / tail time against arrival order, by correlation within a group",
            ["correlation", *next(iter(rows.values()))],
            [[rho, *(f"{g:.2f} / {t:.2f}" for g, t in row.values())] for rho, row in rows.items()],
        )
    extra: dict[str, Any] = {"seeds": seeds, "studies": studies, "correlation": correlation}
    if not options.quick:
        extra["chunks"] = {name: sweep_chunks(WORKLOADS[name], 0, CHUNKS) for name in names}
        for name, rows in extra["chunks"].items():
            cells = [
                [c, *(f"{g:.2f}, {t:.0%}, {k:.0%}" for g, t, k in row.values())] for c, row in rows.items()
            ]
            columns = ["chunk size", *next(iter(rows.values()))]
            table(f"{WORKLOADS[name].paper}: gain, tail gone and KV use", columns, cells)
        extra["fairness"] = sweep_fairness(swept, 0)
        cells = [[k, f"{g:.2f}", f"{t:.0%}"] for k, (g, t) in extra["fairness"].items()]
        table(f"{swept.paper}, divided+context", ["fairness period", "gain", "tail gone"], cells)
        extra["scale"] = scale(swept, INSTANCES)
        names = list(next(iter(extra["scale"].values())))
        cells = [[n, *(f"{row[c]:,.4g}" for c in names)] for n, row in extra["scale"].items()]
        table(f"{swept.paper}: instances", ["instances", *names], cells)
    if options.plots:
        plot(options.plots, extra)
    if options.out:
        body = {
            "command": command_line("seer_simulate"), "machine": machine(),
            "ratios": [dataclasses.asdict(r) for r in ratios], **extra,
        }  # fmt: skip
        options.out.write_text(json.dumps(body, indent=1) + "\n")
    print_result("seer_simulate", ratios, **extra)


def plot(folder: Path, results: dict[str, Any]) -> None:
    """The ablation beside the paper's, and, where they were run, the sweeps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / f"seer_simulate_{name}.png", dpi=120)
        plt.close(figure)

    shown = {  # groups of the size in the paper's table
        f"{w.paper}, groups of {w.group_size}": w for w in WORKLOADS.values()
    }
    shown = {title: w for title, w in shown.items() if title in results["studies"]}
    policy = ["stock", "divided", "divided+context", "divided+exposure", "seer", "seer+exposure", "oracle"]
    figure, axes = plt.subplots(2, len(shown), figsize=(4.6 * len(shown), 6.6), squeeze=False)
    for column, (title, w) in enumerate(shown.items()):
        rows, paper = results["studies"][title], FIGURES[w.paper]
        printed = {
            "gain": dict(zip(ABLATION, paper.ablation)),
            "tail_gone": {"seer": 1 - paper.seer[1] / paper.baseline[1]},
        }
        for axis, key, label in (
            (axes[0][column], "gain", "throughput, group-level = 1"),
            (axes[1][column], "tail_gone", "part of its tail time that goes away"),
        ):
            mid = [rows[p][key][0] for p in policy]
            spread = [
                [m - rows[p][key][1] for m, p in zip(mid, policy)],
                [rows[p][key][2] - m for m, p in zip(mid, policy)],
            ]
            axis.bar(
                range(len(policy)),
                mid,
                yerr=spread,
                capsize=3,
                color="tab:blue",
                alpha=0.75,
                label="simulated",
            )
            at = [i for i, p in enumerate(policy) if p in printed[key]]
            axis.plot(
                at, [printed[key][policy[i]] for i in at], "_", color="black", markersize=24, label="paper"
            )
            axis.set_xticks(range(len(policy)), policy, rotation=35, ha="right", fontsize=8)
            axis.set_ylabel(label, fontsize=8)
        axes[0][column].set_title(title, fontsize=10)
        axes[0][column].axhline(1, color="grey", linewidth=0.8)
    axes[0][0].legend(fontsize=8)
    save(figure, "ablation")

    sweeps = results["correlation"]
    figure, axes = plt.subplots(2, len(sweeps), figsize=(4.6 * len(sweeps), 6.2), squeeze=False, sharex=True)
    for column, (name, rows) in enumerate(sweeps.items()):
        for order in next(iter(rows.values())):
            for axis, index in ((axes[0][column], 0), (axes[1][column], 1)):
                axis.plot(
                    [float(r) for r in rows],
                    [row[order][index] for row in rows.values()],
                    "o-",
                    label=order,
                    markersize=4,
                )
        axes[0][column].set_title(WORKLOADS[name].paper, fontsize=10)
        axes[0][column].set_ylabel("throughput, arrival order = 1", fontsize=8)
        axes[1][column].set_ylabel("tail time, arrival order = 1", fontsize=8)
        axes[1][column].set_xlabel("correlation of lengths within a group", fontsize=8)
    axes[0][0].legend(fontsize=7)
    save(figure, "correlation")

    if "chunks" in results:
        figure, axes = plt.subplots(
            1, len(results["chunks"]), figsize=(4.6 * len(results["chunks"]), 3.4), squeeze=False
        )
        for axis, (name, rows) in zip(axes[0], results["chunks"].items()):
            for order in next(iter(rows.values())):
                axis.plot(
                    [int(c) for c in rows],
                    [row[order][0] for row in rows.values()],
                    "o-",
                    label=order,
                    markersize=4,
                )
            for value, label in zip(FIGURES[WORKLOADS[name].paper].ablation, ("divided", "divided+context")):
                axis.axhline(value, color="grey", linestyle="--", linewidth=0.8)
                axis.annotate(f"paper, {label}", (1024, value), fontsize=7, va="bottom")
            axis.set_xscale("log", base=2)
            axis.set_title(WORKLOADS[name].paper, fontsize=10)
            axis.set_xlabel("chunk size, tokens", fontsize=8)
            axis.set_ylabel("throughput, group-level = 1", fontsize=8)
        axes[0][0].legend(fontsize=7)
        save(figure, "chunks")
    if "scale" in results:
        rows = results["scale"]
        figure, axis = plt.subplots(figsize=(5, 3.4))
        for name in ("stock", "seer", "seer+exposure"):
            axis.plot([int(n) for n in rows], [row[name] for row in rows.values()], "o-", label=name)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("instances (156 requests each)", fontsize=8)
        axis.set_ylabel("throughput, group-level = 1", fontsize=8)
        axis.legend(fontsize=8)
        save(figure, "scale")


def _write_page(folder: Path, w: Workload, title: str, outcomes: dict[str, Outcome], seed: int) -> None:
    from verl_seer.simulate.report import page

    samples = synthesize(w, seed)
    settings = {
        "seed": seed, "chunk size": CHUNK, "correlation": w.correlation, "sigma": w.sigma, "paper": w.paper,
    }  # fmt: skip
    body = document(title, samples, w.cluster, outcomes, settings)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{w.name}.html").write_text(page(body), encoding="utf-8")


if __name__ == "__main__":
    main()
