"""TENT over links of a chosen rate, against NIXL's UCX, Mooncake's TCP engine and our own equal split, in turns.

    python -m benchmarks.tent [--quick] [--only PART] [--repeats N] [--out FOLDER]

Two namespaces of this machine, joined by links far slower than its processors (`kimi-stack tent lab`); for each engine
under test two NIXL agents, one on each side. Every case has links and agents of its own, so that what one does to an
engine cannot be seen in the next; within a case the engines send the same bytes in turn. A case that fails is printed
as failed, the others go on, and the exit status is 1.

- Throughput: payload over the time of one large WRITE. The floor is what the links carry of it: 1448 of 1514 bytes of
  a packet are payload. UCX gets no turn where a link is dead: it neither finishes nor fails there, and an endpoint that
  saw a link die stays disconnected after the link is back.
- Latency: WRITEs of 8 MiB one after the other, and of 64 KiB and 8 MiB while a large one is always under way.
- One host: WRITE of 1 GiB between two processes, against a copy inside one; 64 bytes and 256 x 64 bytes, per call;
  and what posting 64 bytes and one look at them cost the caller, without the waiting.

Mooncake's TCP has one link, the first, which no case breaks. Its wheel is in no environment of this project, because it
needs libraries for RDMA; where it is absent, the run says so and goes on without it:

    pip install --no-deps --target FOLDER mooncake-transfer-engine-non-cuda==0.3.13.post1
    apt-get install libibverbs1 ibverbs-providers libnuma1
    MOONCAKE_PATH=FOLDER python -m benchmarks.tent

Needs root, iproute2 and an installed plugin. Where the session `nixl` of the noxfile has made its environment:

    .nox/nixl/bin/kimi-stack tent install && PYTHONPATH=. .nox/nixl/bin/python -m benchmarks.tent

Figures depend on the processors being free.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.common import Ratio, paired_ratio, print_result, table
from nixl_tent import compat, install, lab, top

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "nixl"))
from hosts import AgentHost, introduce

PAYLOAD = 1448 / 1514  # of a full packet of 1500 bytes, with the Ethernet header that the shaper counts
GOAL_FLOOR = 0.97  # of what the links carry, in every steady state
GOAL_PEER = 1.0  # against another engine: never slower
GOAL_REROUTE_MS = 10.0  # from the last sign of a link until its slices go elsewhere
GOAL_TAIL = 1.3  # p99 of 8 MiB with one slow link to p99 on healthy ones, per byte that the links carry
GOAL_HOST = 6e9  # bytes/s between two processes of one host, or what a copy reaches
EVENT_AFTER = 0.3  # seconds from the post until a link changes
ENGINES = ("spray", "static", "ucx")
MOONCAKE = "mooncake"
MOONCAKE_HOST = Path(__file__).with_name("mooncake_host.py")
KIB, MIB = 1 << 10, 1 << 20
LARGE, SMALL, MOUSE = "large", "8 MiB", "64 KiB"


@dataclass(frozen=True)
class Sizes:
    """How much of everything a run sends."""

    repeats: int
    large: int  # bytes of a transfer whose throughput counts
    latencies: int  # transfers behind a p99
    host: int  # bytes between two processes of one host
    calls: int  # small transfers
    engines: tuple[str, ...]  # that are there


@dataclass(frozen=True)
class Links:
    """Rates in Mbit/s (0: cut) before and after what happens midway, if anything does."""

    name: str
    before: tuple[float, ...]
    after: tuple[float, ...] | None = None
    event: Literal["rate", "cut", "hole", "heal"] | None = None

    @property
    def steady(self) -> bool:
        return self.event is None

    @property
    def loses_a_link(self) -> bool:
        return 0 in self.before or (self.after is not None and 0 in self.after)

    def ideal(self, size: int) -> float:
        """Seconds in which the links carry `size` bytes of payload."""
        first, second = (sum(rates) * 1e6 / 8 * PAYLOAD for rates in (self.before, self.after or self.before))
        head = min(size, first * EVENT_AFTER)
        return head / first + (size - head) / second


def link_cases(count: int, mbit: float) -> list[Links]:
    full = (mbit,) * count

    def last(rate: float) -> tuple[float, ...]:
        return (*full[:-1], rate)

    steady = [Links(f"{count} links", full), Links(f"{count} links, one at 1/4", last(mbit / 4))]
    if count != 2:
        return steady
    return [
        *steady,
        Links("one at 1/10", last(mbit / 10)),
        Links("one cut", last(0)),
        Links("slows to 1/4 midway", full, last(mbit / 4), "rate"),
        Links("cut midway", full, last(0), "cut"),
        Links("black hole midway", full, last(0), "hole"),
        Links("heals midway", last(0), full, "heal"),
    ]


@dataclass
class Engine:
    """One backend with an agent on each side."""

    name: str
    a: AgentHost
    b: AgentHost
    handles: dict[str, int] = field(default_factory=dict)

    @classmethod
    def start(cls, name: str, made: lab.Lab | None, links: int, sizes: dict[str, int]) -> Engine:
        """With a buffer of the largest size on each side and a WRITE prepared for each of `sizes`."""
        backend, options, environment = "TENT", {"mode": "static" if name == "static" else "spray"}, {}
        if name == "ucx":
            backend, options = "UCX", {}
        if name == "ucx" and made is not None:
            devices = ",".join(f"link{i}" for i in range(links))
            environment = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": devices}
        prefixes = [made.command("a", []), made.command("b", [])] if made else [[], []]
        if name == MOONCAKE:
            environment = {"GLOG_minloglevel": "2"}
        hosts: list[AgentHost] = []
        try:
            for side, prefix in zip(("a", "b"), prefixes):
                if name == MOONCAKE:
                    options = {"address": ("10.77.0.1", "10.77.0.2")[side == "b"] if made else "127.0.0.1"}
                    host = AgentHost(
                        f"{name}-{side}", name, options, prefix, environment, script=MOONCAKE_HOST
                    )
                else:
                    host = AgentHost(f"{name}-{side}", backend, options, prefix, environment)
                hosts.append(host)
            engine = cls(name, *hosts)
            size = max(sizes.values())
            x = engine.a.buffer(name="x", size=size, fill="random", seed=1)
            y = engine.b.buffer(name="y", size=size)
            introduce(engine.a, engine.b)
            for key, length in sizes.items():
                engine.handles[key] = engine.a.prepare(
                    op="WRITE", local=[[x, length]], remote=[[y, length]], agent=f"{name}-b"
                )
            engine.write(max(sizes, key=sizes.__getitem__))
            engine.check()
        except BaseException:
            for host in hosts:
                host.close()
            raise
        return engine

    def write(self, what: str) -> float:
        """Seconds of one transfer."""
        result = self.a.run(handle=self.handles[what])
        if result["state"] != "DONE":
            raise RuntimeError(f"{self.name}: a transfer ended as {result['state']}")
        return result["seconds"]

    def check(self) -> None:
        if self.a.crc(name="x") != self.b.crc(name="y"):
            raise RuntimeError(f"{self.name}: bytes differ")

    def links(self) -> list[dict[str, Any]]:
        """What our own engines say of their links; empty for UCX."""
        found = [e for e in top.snapshots() if e["pid"] == self.a.process.pid]
        return found[0]["peers"][0]["links"] if found else []

    def close(self) -> None:
        self.a.close()
        self.b.close()


@contextlib.contextmanager
def engines_of(
    names: Sequence[str], made: lab.Lab | None, links: int, sizes: dict[str, int]
) -> Iterator[list[Engine]]:
    with contextlib.ExitStack() as stack:
        started = []
        for name in names:
            engine = Engine.start(name, made, links, sizes)
            stack.callback(engine.close)
            started.append(engine)
        yield started


def problem_here(links: bool) -> str | None:
    """Why TENT cannot be measured here, and what to do about it; None if it can."""
    found = compat.installed()
    if not found:
        return "NIXL is not installed here: pip install --no-deps nixl-cu13, then kimi-stack tent install"
    if all(install.state(nixl) == "absent" for nixl in found):
        return "the plugin is not in this NIXL: kimi-stack tent install"
    if links:
        try:
            lab.check_possible()
        except lab.LabError as error:
            return str(error)
    return None


def mooncake_problem() -> str | None:
    """Why Mooncake's engine cannot be measured here, or None."""
    command = "from mooncake_host import load_engine; load_engine()"
    folder = f"{MOONCAKE_HOST.parent}:{os.environ.get('PYTHONPATH', '')}"
    result = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": folder},
    )  # fmt: skip
    return None if result.returncode == 0 else result.stderr.strip().splitlines()[-1]


def set_links(made: lab.Lab, rates: tuple[float, ...]) -> None:
    for index, rate in enumerate(rates):
        if rate:
            made.heal(index)
            made.rate(index, rate)
        else:
            made.cut(index)


def settle(made: lab.Lab, rates: tuple[float, ...], engine: Engine, known: str) -> None:
    """The links as they should be, and the engine knows it: connected to those that live, and their rates seen."""
    set_links(made, rates)
    end = time.monotonic() + 30
    while True:
        engine.write(known)
        ready = [link["state"] == "up" for link in engine.links()]
        if not ready or sum(ready) == sum(rate > 0 for rate in rates):
            return
        if time.monotonic() > end:
            raise RuntimeError(f"{engine.name}: connected to {sum(ready)} links of {rates} after 30 s")
        time.sleep(0.1)


def reroute_ms(engine: Engine, stalls_before: int) -> float | None:
    """How long the last silence lasted until the slices went elsewhere; None where no link stalled."""
    links = engine.links()
    if sum(int(link["stalls_total"]) for link in links) == stalls_before:
        return None
    return max(float(link["last_reroute_ms"]) for link in links)


def throughput(case: Links, sizes: Sizes) -> dict[str, Any]:
    """Seconds of each engine's large transfers, and of our own the reroutes in ms."""
    names = [name for name in sizes.engines if name != "ucx" or not case.loses_a_link]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    reroutes: list[float] = []
    count = len(case.before)
    with (
        lab.running(count, max(case.before)) as made,
        engines_of(names, made, count, {LARGE: sizes.large, SMALL: 8 * MIB}) as engines,
    ):
        change = {
            "rate": lambda: made.rate(count - 1, (case.after or case.before)[-1]),
            "cut": lambda: made.cut(count - 1),
            "hole": lambda: made.hole(count - 1),
            "heal": lambda: made.heal(count - 1),
        }
        for _ in range(sizes.repeats):
            for engine in engines:
                settle(made, case.before, engine, SMALL)
                if case.event is None:
                    seconds[engine.name].append(engine.write(LARGE))
                    continue
                stalls = sum(int(link["stalls_total"]) for link in engine.links())
                timer = threading.Timer(EVENT_AFTER, change[case.event])
                timer.start()
                try:
                    seconds[engine.name].append(engine.write(LARGE))
                finally:
                    timer.join()
                took = reroute_ms(engine, stalls)
                if engine.name == "spray" and case.event in ("cut", "hole") and took is not None:
                    reroutes.append(took)
        for engine in engines:
            engine.check()
    ideal = case.ideal(sizes.large)
    share = [ideal / value for value in seconds["spray"]]
    ratios = []
    if case.steady:
        ratios.append(Ratio(f"{case.name}: spray/links", *spread(share), GOAL_FLOOR))
    ratios.append(paired_ratio(f"{case.name}: spray/static", seconds["static"], seconds["spray"], GOAL_PEER))
    if "ucx" in seconds:
        ratios.append(paired_ratio(f"{case.name}: spray/ucx", seconds["ucx"], seconds["spray"], GOAL_PEER))
    if MOONCAKE in seconds:
        ratios.append(
            paired_ratio(f"{case.name}: spray/mooncake", seconds[MOONCAKE], seconds["spray"], GOAL_PEER)
        )
    if reroutes:
        ratios.append(Ratio(f"{case.name}: reroute, ms", *spread(reroutes), GOAL_REROUTE_MS, "lower"))
    row = {
        "links carry": f"{sizes.large / ideal / 1e6:.1f}",
        **{name: f"{sizes.large / statistics.median(values) / 1e6:.1f}" for name, values in seconds.items()},
        "spray/links": f"{statistics.median(share):.3f}",
    }
    return {"seconds": seconds, "ideal": ideal, "reroutes_ms": reroutes, "row": row, "ratios": ratios}


def latency(mbit: float, sizes: Sizes) -> dict[str, Any]:
    """p50 and p99 of 8 MiB on two links, healthy and with one at a quarter."""
    found: dict[str, dict[str, list[float]]] = {}
    rounds, each = max(1, sizes.latencies // 10), 10
    cases = [Links("healthy", (mbit, mbit)), Links("one at 1/4", (mbit, mbit / 4))]
    names = sizes.engines
    with lab.running(2, mbit) as made, engines_of(names, made, 2, {SMALL: 8 * MIB}) as engines:
        for case in cases:
            found[case.name] = {engine.name: [] for engine in engines}
            for engine in engines:
                settle(made, case.before, engine, SMALL)
            for _ in range(rounds):
                for engine in engines:
                    found[case.name][engine.name] += engine.a.latencies(
                        handle=engine.handles[SMALL], count=each
                    )
    capacity = cases[1].ideal(8 * MIB) / cases[0].ideal(8 * MIB)
    ratios = []
    for name in names:
        if name == MOONCAKE:
            continue  # the link that becomes slow is not its
        tails = [p99(found[case.name][name]) for case in cases]
        tail = tails[1] / tails[0] / capacity
        ratios.append(
            Ratio(f"8 MiB: {name} p99 1/4 to healthy, per byte", tail, tail, tail, GOAL_TAIL, "lower")
        )
    rows = {
        f"8 MiB, {case.name}": {name: percentiles(found[case.name][name]) for name in names} for case in cases
    }
    return {"seconds": found, "rows": rows, "ratios": ratios}


def under_load(mbit: float, sizes: Sizes) -> dict[str, Any]:
    """64 KiB and 8 MiB while a large transfer of the same agent is always under way, on two healthy links."""
    lengths = {LARGE: sizes.large, SMALL: 8 * MIB, MOUSE: 64 * KIB}
    counts = {MOUSE: sizes.latencies, SMALL: max(5, sizes.latencies // 2)}
    names = sizes.engines
    found: dict[str, dict[str, list[float]]] = {what: {name: [] for name in names} for what in counts}
    with lab.running(2, mbit) as made, engines_of(names, made, 2, lengths) as engines:
        for what, count in counts.items():
            for _ in range(5):
                for engine in engines:
                    found[what][engine.name] += engine.a.latencies_among(
                        handle=engine.handles[what], background=engine.handles[LARGE], count=count // 5
                    )
    ratios = []
    for what, times in found.items():
        for name in names[1:]:
            value = p99(times[name]) / p99(times["spray"])
            ratios.append(Ratio(f"{what} among elephants: p99 {name}/spray", value, value, value, GOAL_PEER))
    rows = {
        f"{what} among elephants": {name: percentiles(times[name]) for name in names}
        for what, times in found.items()
    }
    return {"seconds": found, "rows": rows, "ratios": ratios}


def one_host(sizes: Sizes) -> dict[str, Any]:
    """A large WRITE between two processes, and the cost of small ones; TENT copies by CMA, UCX as it chooses."""
    names = tuple(name for name in sizes.engines if name != "static")
    large: dict[str, list[float]] = {name: [] for name in names}
    small: dict[str, list[float]] = {name: [] for name in names}
    many: dict[str, list[float]] = {name: [] for name in names}
    costs: dict[str, list[float]] = {name: [] for name in names if name != MOONCAKE}
    with engines_of(names, None, 1, {LARGE: sizes.host, "64 B": 64}) as engines:
        for engine in engines:
            sides = [host.buffer(name="m", size=256 * 128) for host in (engine.a, engine.b)]
            introduce(engine.a, engine.b)
            engine.handles["many"] = engine.a.prepare_split(
                op="WRITE", local=sides[0], remote=sides[1], size=64, count=256, agent=engine.b.name
            )
        copy = engines[0].a.copy_seconds(name="x", count=3)
        for _ in range(max(3, sizes.repeats)):
            for engine in engines:
                large[engine.name].append(engine.write(LARGE))
                calls = engine.a.latencies(handle=engine.handles["64 B"], count=sizes.calls)
                small[engine.name].append(statistics.median(calls))
                calls = engine.a.latencies(handle=engine.handles["many"], count=sizes.calls // 10)
                many[engine.name].append(statistics.median(calls))
                if engine.name in costs:
                    calls = engine.a.call_costs(handle=engine.handles["64 B"], count=sizes.calls // 10)
                    costs[engine.name].append(statistics.median(calls))
    rates = [sizes.host / value for value in large["spray"]]
    floor = min(GOAL_HOST, sizes.host / copy)
    ratios = [
        Ratio("one host: spray to 6 GB/s or a copy", *(value / floor for value in spread(rates)), GOAL_PEER),
        paired_ratio("one host: spray/ucx", large["ucx"], large["spray"], GOAL_PEER),
        *(
            paired_ratio(f"one host: spray/{name}", large[name], large["spray"], GOAL_PEER)
            for name in names
            if name == MOONCAKE
        ),
        paired_ratio("64 B: spray's time to UCX's", small["spray"], small["ucx"], GOAL_PEER, "lower"),
        paired_ratio("64 B: spray's calls to UCX's", costs["spray"], costs["ucx"], GOAL_PEER, "lower"),
        paired_ratio("256 x 64 B: spray's time to UCX's", many["spray"], many["ucx"], GOAL_PEER, "lower"),
    ]

    def row(values: dict[str, list[float]], form: Callable[[float], str]) -> dict[str, str]:
        return {name: form(statistics.median(times)) for name, times in values.items()}

    rows = {
        f"{sizes.host // MIB} MiB, GB/s (a copy: {sizes.host / copy / 1e9:.2f})": row(
            large, lambda value: f"{sizes.host / value / 1e9:.2f}"
        ),
        "64 B, us": row(small, lambda value: f"{value * 1e6:.1f}"),
        "64 B, post and one look, us": row(costs, lambda value: f"{value * 1e6:.1f}"),
        "256 x 64 B, us": row(many, lambda value: f"{value * 1e6:.0f}"),
    }
    return {"seconds": {"large": large, "64 B": small, "256 x 64 B": many, "calls": costs}, "copy": copy, "rows": rows,
            "ratios": ratios}  # fmt: skip


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def p99(values: Sequence[float]) -> float:
    return sorted(values)[round(0.99 * (len(values) - 1))]


def percentiles(values: Sequence[float]) -> str:
    return f"{statistics.median(values) * 1e3:.1f} / {p99(values) * 1e3:.1f}"


def plot(found: dict[str, Any], size: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = {name: case for name, case in found.items() if "ideal" in case}
    figure, axis = plt.subplots(figsize=(11, 4.5))
    places = range(len(cases))
    engines = [
        name for name in (*ENGINES, MOONCAKE) if any(name in case["seconds"] for case in cases.values())
    ]
    width = 0.8 / len(engines)
    for offset, engine in enumerate(engines):
        heights = [
            size / statistics.median(case["seconds"][engine]) / 1e6 if engine in case["seconds"] else 0
            for case in cases.values()
        ]
        left = [place + width * (offset - (len(engines) - 1) / 2) for place in places]
        axis.bar(left, heights, width * 0.92, label=engine)
    ceilings = [size / case["ideal"] / 1e6 for case in cases.values()]
    axis.plot(places, ceilings, "k_", markersize=40, label="links carry")
    axis.set_xticks(places, list(cases), rotation=20, ha="right", fontsize=8)
    axis.set_ylabel(f"MB/s, WRITE of {size // MIB} MiB")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_tables(found: dict[str, Any], engines: tuple[str, ...]) -> None:
    columns = ["links carry", *engines, "spray/links"]
    rows = [
        [name, *(case["row"].get(c, "-") for c in columns)] for name, case in found.items() if "row" in case
    ]
    if rows:
        table("WRITE, MB/s (median)", ["case", *columns], rows)
    for name, case in found.items():
        if "rows" in case:
            unit = "" if name == "one host" else ", ms: p50 / p99"
            table(
                name + unit,
                ["WRITE of", *engines],
                [[what, *(row.get(e, "-") for e in engines)] for what, row in case["rows"].items()],
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases: below a minute")
    parser.add_argument("--only", help="only the cases whose name contains this")
    parser.add_argument("--mbit", type=float, default=1600.0, help="of all links together, when healthy")
    parser.add_argument("--size", type=int, help="MiB of a large transfer; default 128, quick 64")
    parser.add_argument("--repeats", type=int, help="default 4, quick 1")
    parser.add_argument(
        "--out", type=Path, help="folder for tent.json, written after every case, and tent.png"
    )
    arguments = parser.parse_args()
    for name in ("size", "repeats"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    quick = arguments.quick
    absent = mooncake_problem()
    sizes = Sizes(
        repeats=arguments.repeats or (1 if quick else 4),
        large=(arguments.size or (64 if quick else 128)) * MIB,
        latencies=20 if quick else 100,
        host=256 * MIB if quick else 1024 * MIB,
        calls=200 if quick else 2000,
        engines=ENGINES if absent else (*ENGINES, MOONCAKE),
    )
    parts: dict[str, Callable[[], dict[str, Any]]] = {}
    for count in (2,) if quick else (2, 4, 8):
        for case in link_cases(count, arguments.mbit / count):
            if not quick or case.name in ("2 links", "2 links, one at 1/4", "cut midway"):
                parts[case.name] = lambda case=case: throughput(case, sizes)
    if not quick:
        parts["one after the other"] = lambda: latency(arguments.mbit / 2, sizes)
        parts["under load"] = lambda: under_load(arguments.mbit / 2, sizes)
    parts["one host"] = lambda: one_host(sizes)
    if arguments.only:
        parts = {name: part for name, part in parts.items() if arguments.only in name}
        if not parts:
            parser.error(f"--only {arguments.only!r} fits no case")

    if problem := problem_here(links=set(parts) != {"one host"}):
        parser.error(problem)
    if absent:
        print(f"mooncake is absent: {absent}", flush=True)

    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    ratios: list[Ratio] = []
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        begin = time.monotonic()
        try:
            case = part()
        except Exception as error:
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
            print(f"{name}: FAILED: {failed[name]}", flush=True)
        else:
            ratios += case.pop("ratios")
            found[name] = case
            shown = [case["row"]] if "row" in case else list(case["rows"].items())
            print(f"{name}: {shown} ({time.monotonic() - begin:.0f} s)", flush=True)
        if arguments.out:
            body = {"cases": found, "failed": failed}
            (arguments.out / "tent_cases.json").write_text(json.dumps(body, indent=1) + "\n")
    print_tables(found, sizes.engines)
    if arguments.out and any("ideal" in case for case in found.values()):
        plot(found, sizes.large, arguments.out / "tent.png")
    save = arguments.out / "tent.json" if arguments.out else None
    rows = {name: case["rows"] if "rows" in case else case["row"] for name, case in found.items()}
    print_result("tent", ratios, save, mbit=arguments.mbit, megabytes=sizes.large // MIB, failed=failed, rows=rows,
                 mooncake=absent or "measured")  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
