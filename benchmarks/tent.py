"""TENT over links of a chosen rate, against NIXL's UCX and against our own equal split, in turns.

    python -m benchmarks.tent [--quick] [--out FOLDER] [--repeats N]

Two namespaces of this machine, joined by links far slower than its processors (`kimi-stack tent lab`); two NIXL agents,
one on each side, for each engine under test. A case is a state of the links (healthy, one at a quarter, ...); within a
case every engine sends the same bytes in turn. Throughput is payload over the time of one WRITE of `--size` MiB; the
floor is what the links carry of it: 1448 of 1514 bytes of a packet are payload. UCX gets no turn where a link is dead,
because it neither finishes nor fails there (measured once: no end after 40 s).

Needs root, iproute2 and an installed plugin (`kimi-stack tent install`). Figures depend on the processors being free.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common import Ratio, paired_ratio, print_result, table
from nixl_tent import lab, top

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "nixl"))
from hosts import AgentHost, introduce

PAYLOAD = 1448 / 1514  # of a full packet of 1500 bytes, with the Ethernet header that the shaper counts
GOAL_FLOOR = 0.97  # of what the links carry, in every steady state
GOAL_SPRAY = 1.0  # against the equal split: never slower
SMALL = 8 << 20


@dataclass(frozen=True)
class Case:
    name: str
    rates: tuple[float, ...]  # Mbit/s of each link; 0: cut
    event: Callable[[lab.Lab], None] | None = None
    event_after: float = 0.3
    rate_after: tuple[float, ...] | None = None

    def floor(self) -> float:
        """Bytes/s that the links carry in their steady state."""
        return sum(self.rates) * 1e6 / 8 * PAYLOAD

    def kills_a_link(self) -> bool:
        return 0 in self.rates or (self.rate_after is not None and 0 in self.rate_after)


def cases(mbit: float, links: int) -> list[Case]:
    full = (mbit,) * links

    def last(rate: float) -> tuple[float, ...]:
        return (*full[:-1], rate)

    at = links - 1
    return [
        Case("healthy", full),
        Case("one at 1/4", last(mbit / 4)),
        Case("one at 1/10", last(mbit / 10)),
        Case("one cut", last(0)),
        Case("slows to 1/4", full, lambda made: made.rate(at, mbit / 4), rate_after=last(mbit / 4)),
        Case("cut midway", full, lambda made: made.cut(at), rate_after=last(0)),
        Case("black hole midway", full, lambda made: made.hole(at), rate_after=last(0)),
    ]


@dataclass
class Engine:
    """One backend with its two agents, each on its side of the lab."""

    name: str
    a: AgentHost
    b: AgentHost
    size: int
    handles: dict[int, int] = field(default_factory=dict)

    @classmethod
    def start(cls, name: str, made: lab.Lab, size: int, links: int) -> Engine:
        backend, options, environment = "TENT", {"mode": "static" if name == "static" else "spray"}, {}
        if name == "ucx":
            devices = ",".join(f"link{i}" for i in range(links))
            backend, options, environment = "UCX", {}, {"UCX_TLS": "tcp", "UCX_NET_DEVICES": devices}
        hosts = [
            AgentHost(f"{name}-{side}", backend, options, made.command(side, []), environment)
            for side in ("a", "b")
        ]
        engine = cls(name, hosts[0], hosts[1], size)
        x = engine.a.buffer(name="x", size=size, fill="random", seed=1)
        y = engine.b.buffer(name="y", size=size)
        introduce(engine.a, engine.b)
        for bytes_ in (size, SMALL):
            engine.handles[bytes_] = engine.a.prepare(
                op="WRITE", local=[[x, bytes_]], remote=[[y, bytes_]], agent=f"{name}-b"
            )
        engine.write(SMALL)
        engine.write(size)
        return engine

    def write(self, size: int) -> float:
        """Seconds of one transfer."""
        result = self.a.run(handle=self.handles[size])
        if result["state"] != "DONE":
            raise RuntimeError(f"{self.name}: a transfer ended as {result['state']}")
        return result["seconds"]

    def check(self) -> None:
        self.b.fill(name="y", seed=-1)
        self.write(self.size)
        if self.a.crc(name="x") != self.b.crc(name="y"):
            raise RuntimeError(f"{self.name}: bytes differ")

    def ready(self) -> bool:
        """All links are up; UCX does not say."""
        if self.name == "ucx":
            return True
        found = [e for e in top.snapshots() if e["pid"] == self.a.process.pid]
        return all(link["state"] == "up" for link in found[0]["peers"][0]["links"])

    def close(self) -> None:
        self.a.close()
        self.b.close()


def set_links(made: lab.Lab, rates: tuple[float, ...]) -> None:
    for index, rate in enumerate(rates):
        made.heal(index)
        if rate:
            made.rate(index, rate)
        else:
            made.cut(index)


def heal(made: lab.Lab, engines: list[Engine], full: tuple[float, ...]) -> None:
    """All links at full rate, and every engine of ours back on all of them."""
    set_links(made, full)
    end = time.monotonic() + 30
    while not all(engine.ready() for engine in engines) and time.monotonic() < end:
        time.sleep(0.2)
        for engine in engines:
            engine.write(SMALL)


def measure(made: lab.Lab, case: Case, engines: list[Engine], repeats: int, full: tuple[float, ...]) -> dict:
    """Seconds of each engine's transfers in this case: {"large": {name: [...]}, "small": {name: [...]}}."""
    taking_part = [e for e in engines if e.name != "ucx" or not case.kills_a_link()]
    large: dict[str, list[float]] = {e.name: [] for e in taking_part}
    small: dict[str, list[float]] = {e.name: [] for e in taking_part}
    ours = [e for e in engines if e.name != "ucx"]
    heal(made, ours, full)
    set_links(made, case.rates)
    for engine in taking_part:  # to notice the state of the links
        engine.write(SMALL)
    for _ in range(repeats):
        for engine in taking_part:
            if case.event is not None:
                heal(made, ours, full)
                timer = threading.Timer(case.event_after, case.event, (made,))
                timer.start()
                large[engine.name].append(engine.write(engine.size))
                timer.join()
            else:
                large[engine.name].append(engine.write(engine.size))
                small[engine.name] += engine.a.latencies(handle=engine.handles[SMALL], count=5)
    return {"large": large, "small": small}


def rate_text(size: int, seconds: list[float] | None) -> str:
    return f"{size / statistics.median(seconds) / 1e6:.1f}" if seconds else "does not finish"


def ratios_of(case: Case, size: int, found: dict) -> list[Ratio]:
    large = found["large"]
    rows = []
    if case.event is None:
        floor = size / case.floor()
        share = [floor / seconds for seconds in large["spray"]]
        rows.append(
            Ratio(f"{case.name}: spray/links", statistics.median(share), min(share), max(share), GOAL_FLOOR)
        )
    rows.append(paired_ratio(f"{case.name}: spray/static", large["static"], large["spray"], GOAL_SPRAY))
    if "ucx" in large:
        rows.append(paired_ratio(f"{case.name}: spray/ucx", large["ucx"], large["spray"], GOAL_SPRAY))
    return rows


def plot(results: list[tuple[Case, dict]], size: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 4))
    for offset, name in enumerate(("spray", "static", "ucx")):
        heights = [
            size / statistics.median(found["large"][name]) / 1e6 if found["large"].get(name) else 0
            for _, found in results
        ]
        axes.bar([i + 0.27 * (offset - 1) for i in range(len(results))], heights, 0.25, label=name)
    axes.set_xticks(range(len(results)), [case.name for case, _ in results], rotation=15)
    axes.set_ylabel("MB/s")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases, smaller transfers, one repeat: below 50 s")
    parser.add_argument("--links", type=int, default=2)
    parser.add_argument("--mbit", type=float, default=800.0, help="rate of one link")
    parser.add_argument("--size", type=int, default=0, help="MiB of a large transfer; default 256, quick 64")
    parser.add_argument("--repeats", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the plot")
    arguments = parser.parse_args()
    repeats = arguments.repeats or (1 if arguments.quick else 5)
    size = (arguments.size or (32 if arguments.quick else 256)) << 20
    chosen = cases(arguments.mbit, arguments.links)
    if arguments.quick:
        chosen = [case for case in chosen if case.name in ("healthy", "one at 1/4", "cut midway")]
    full = (arguments.mbit,) * arguments.links
    ratios: list[Ratio] = []
    results: list[tuple[Case, dict]] = []
    with lab.running(arguments.links, arguments.mbit) as made:
        engines = [Engine.start(name, made, size, arguments.links) for name in ("spray", "static", "ucx")]
        try:
            for case in chosen:
                found = measure(made, case, engines, repeats, full)
                results.append((case, found))
                ratios += ratios_of(case, size, found)
            heal(made, engines[:2], full)
            for engine in engines[:2]:
                engine.check()
        finally:
            for engine in engines:
                engine.close()
    table(
        f"{arguments.links} links of {arguments.mbit:g} Mbit/s, WRITE of {size >> 20} MiB, MB/s (median of {repeats})",
        ["case", "links carry", "spray", "static", "UCX"],
        [
            [
                case.name,
                f"{case.floor() / 1e6:.1f}" if case.event is None else "-",
                *(rate_text(size, found["large"].get(name)) for name in ("spray", "static", "ucx")),
            ]
            for case, found in results
        ],
    )
    steady = [(case, found) for case, found in results if any(found["small"].values())]
    table(
        "WRITE of 8 MiB, ms: median / worst",
        ["case", "spray", "static", "UCX"],
        [
            [
                case.name,
                *(
                    f"{statistics.median(times) * 1e3:.0f} / {max(times) * 1e3:.0f}" if times else "-"
                    for times in (found["small"].get(name, []) for name in ("spray", "static", "ucx"))
                ),
            ]
            for case, found in steady
        ],
    )
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        plot(results, size, arguments.out / "tent.png")
    print_result("tent", ratios, links=arguments.links, mbit=arguments.mbit, megabytes=size >> 20)


if __name__ == "__main__":
    main()
