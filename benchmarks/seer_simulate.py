"""Seer's scheduling in the simulator, beside the paper's figures and against today's stock verl.

python -m benchmarks.seer_simulate [--quick] [--seeds N] [--one-size] [--out FILE] [--pages FOLDER]

For the paper's three workloads: throughput and tail time of the old group-level baseline, stock verl
0.9.1, stock with priorities, stock with suffix decoding, Seer's techniques added in turn, and the oracle order. Then
sweeps of one workload: correlation of lengths within a group down to 0, chunk size, fairness, and one run of 10,000
requests on 64 instances. The step times are a fitted model (docs/seer.md); a figure says what the schedule
changes in that model. All of it repeats exactly by seed; only `cpu_seconds` depends on the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Ratio, machine, print_result, table
from verl_seer.scheduler import SchedulerConfig
from verl_seer.simulate.paper import FIGURES, GAIN_AIM, TAIL_AIM
from verl_seer.simulate.presets import BASELINE, WORKLOADS, policies
from verl_seer.simulate.rollout import Divided, Outcome, simulate
from verl_seer.simulate.study import compare, document, gains
from verl_seer.simulate.workload import Workload, synthesize

CHUNK = 4096
SWEPT = "moonlight"


def workload_study(
    w: Workload, seeds: Sequence[int], group_size: int | None = None
) -> tuple[dict, list[dict]]:
    """(policy -> median throughput, gain, tail gain, gain over stock; with extremes) and the outcomes by seed."""
    runs = [compare(synthesize(w, s, group_size), w.cluster, policies(CHUNK), s) for s in seeds]
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
        chosen = ("divided", "divided+round-robin", "divided+context", "oracle")
        runs = compare(samples, w.cluster, {n: p for n, p in policies(CHUNK).items() if n in chosen}, seed)
        base = runs["divided"]
        out[str(rho)] = {n: [base.makespan / o.makespan, o.tail / base.tail] for n, o in runs.items()}
    return out


def sweep_scheduler(w: Workload, seed: int) -> dict[str, dict[str, list[float]]]:
    """Chunk size and fairness period -> [throughput, part of the tail gone] against the group-level baseline."""
    samples = synthesize(w, seed)
    base = simulate(samples, w.cluster, policies()[BASELINE], seed)

    def run(chunk: int, period: int) -> list[float]:
        o = simulate(samples, w.cluster, Divided(SchedulerConfig(chunk, fairness_period=period)), seed)
        return [base.makespan / o.makespan, 1 - o.tail / base.tail]

    return {
        "chunk_size": {str(c): run(c, 64) for c in (1024, 2048, 4096, 8192, 16384)},
        "fairness_period": {str(p): run(CHUNK, p) for p in (2, 4, 8, 16, 64, 0)},
    }


def scale(w: Workload) -> dict[str, float]:
    """10,000 requests on 64 instances under Seer: events and processor seconds."""
    big = dataclasses.replace(
        w, requests=10_000, cluster=dataclasses.replace(w.cluster, instances=64), name="scale"
    )
    start = time.process_time()
    o = simulate(synthesize(big, 0), big.cluster, policies(CHUNK)["seer"])
    return {"cpu_seconds": round(time.process_time() - start, 1), "chunks": o.chunks, "makespan": o.makespan}


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
            rows, runs = workload_study(w, seeds, size)
            title = f"{w.paper}, groups of {size}"
            studies[title] = rows
            _print_study(title, rows, FIGURES[w.paper])
            seer = rows["seer"]
            ratios += [
                Ratio(f"{title}: throughput over group-level", *seer["gain"], goal=GAIN_AIM[0]),
                Ratio(f"{title}: tail gone, of group-level", *seer["tail_gone"], goal=TAIL_AIM[0]),
                Ratio(f"{title}: throughput over stock verl", *seer["gain_over_stock"], goal=1.0),
                Ratio(f"{title}: tail gone, of stock verl", *seer["tail_gone_over_stock"], goal=0.0),
            ]
            if options.pages and size == w.group_size:
                _write_page(options.pages, w, title, runs[0], seeds[0])
    swept = WORKLOADS[SWEPT]
    values = (0.0, 0.8) if options.quick else (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
    correlation = sweep_correlation(swept, 0, values)
    table(
        f"{swept.paper}: throughput / tail time against arrival order, by correlation within a group",
        ["correlation", *next(iter(correlation.values()))],
        [[rho, *(f"{g:.2f} / {t:.2f}" for g, t in row.values())] for rho, row in correlation.items()],
    )
    extra: dict[str, Any] = {"seeds": seeds, "studies": studies, "correlation": correlation}
    if not options.quick:
        extra["scheduler"] = sweep_scheduler(swept, 0)
        for option, row in extra["scheduler"].items():
            cells = [[k, f"{g:.2f}", f"{t:.0%}"] for k, (g, t) in row.items()]
            table(f"{swept.paper}, divided+context: {option}", [option, "gain", "tail gone"], cells)
        extra["scale"] = scale(swept)
    if options.out:
        body = {
            "command": " ".join(["python -m benchmarks.seer_simulate", *sys.argv[1:]]), "machine": machine(),
            "ratios": [dataclasses.asdict(r) for r in ratios], **extra,
        }  # fmt: skip
        options.out.write_text(json.dumps(body, indent=1) + "\n")
    print_result("seer_simulate", ratios, **extra)


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
