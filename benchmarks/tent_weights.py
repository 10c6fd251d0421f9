"""Weights of a training process to a rollout server through verl's checkpoint engines: TENT, UCX, verl's default.

    python -m benchmarks.tent_weights [--quick] [--mib N] [--repeats N] [--out FOLDER]

Three processes, as verl has them: a trainer, a rollout worker, and a server whose parameters are the goal. An update
begins when the trainer begins to send, and ends when the last weight is in the server; its checksum is compared each
time. The engines take turns.

- `tent` and `ucx`: our engine (`nixl_tent.checkpoint.verl`) with either backend of NIXL; verl's own engine for NIXL
  needs a GPU. The rollout worker hands the weights on through verl's buckets in shared memory.
- `naive`: verl's default. The trainer is itself the rollout worker, so the weights go through the shared memory only:
  the floor of what a separate trainer can reach, on one host.
- Over links (root, iproute2): trainer and worker on two sides of a lab; healthy, and with one of two links at 1/4.

Needs the environment of verl with NIXL; figures depend on the processors being free.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import Ratio, paired_ratio, print_result, table
from benchmarks.tent import problem_here
from nixl_tent import lab

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "nixl"))
from hosts import AgentHost

GOAL_UCX = 1.0  # never slower than NIXL's default backend
GOAL_NAIVE = 2.0  # times verl's default: one more process on the way, so one more copy
BACKENDS = {"tent": "TENT", "ucx": "UCX"}
LINKS = 2


class Host(AgentHost):
    """A process of tent_weights_host."""

    def __init__(
        self, name: str, mib: int, bucket: int, prefix: list[str], environment: dict[str, str]
    ) -> None:
        self.name = name
        root = str(Path(__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [
                *prefix, sys.executable, "-m", "benchmarks.tent_weights_host",
                json.dumps({"mebibytes": mib, "bucket": bucket}),
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={
                **os.environ,
                **environment,
                "PYTHONPATH": os.pathsep.join(paths),
                "PYTHONWARNINGS": "ignore",  # of verl's shared memory, which its two sides remove once each
            },
        )  # fmt: skip

    def ready(self) -> None:
        self._answer()


class Line:
    """Trainer, worker and server, with one engine open."""

    def __init__(self, trainer: Host, worker: Host, server: Host, folder: Path) -> None:
        self.trainer, self.worker, self.server, self.folder = trainer, worker, server, folder
        self.seed = 0

    def open(self, name: str, options: dict[str, str]) -> None:
        for host in (self.trainer, self.worker):
            host.open(backend=BACKENDS[name], options=options)

    def update(self, name: str) -> float:
        """Seconds of one update."""
        self.seed += 1
        self.trainer.step(seed=self.seed)
        channel = f"ipc://{self.folder}/{name}{self.seed}"
        backend = BACKENDS.get(name)
        if backend is not None:
            sides = (self.trainer, self.worker)
            places = [host.prepare(backend=backend) for host in sides]
            for index, host in enumerate(sides):
                host.join(backend=backend, places=places, index=index)
        self.server.begin("serve", channel=channel)
        if backend is None:
            begin = time.monotonic()
            self.trainer.begin("send_directly", channel=channel)
        else:
            self.worker.begin("relay", backend=backend, channel=channel)
            begin = time.monotonic()
            self.trainer.begin("send", backend=backend)
        end = self.server.end()
        self.trainer.end()
        if backend is not None:
            self.worker.end()
            for host in sides:
                host.leave(backend=backend)
        if self.server.crc() != self.trainer.crc():
            raise RuntimeError(f"{name}: the server has other weights than the trainer")
        return end - begin


@contextlib.contextmanager
def line(
    mib: int, bucket: int, made: lab.Lab | None = None, environment: dict[str, str] | None = None
) -> Iterator[Line]:
    """The three processes; with a lab, the trainer is on one side and the other two on the other."""
    hosts: list[Host] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, side in (("trainer", "a"), ("worker", "b"), ("server", "b")):
                prefix = made.command(side, []) if made else []  # type: ignore[arg-type]
                hosts.append(Host(name, mib, bucket, prefix, environment or {}))
            for host in hosts:
                host.ready()
            yield Line(*hosts, Path(folder))
        finally:
            for host in hosts:
                host.close()


def one_host(mib: int, bucket: int, repeats: int) -> tuple[dict[str, list[float]], list[Ratio]]:
    """Seconds of each engine's updates, and the ratios."""
    seconds: dict[str, list[float]] = {"tent": [], "ucx": [], "naive": []}
    with line(mib, bucket) as processes:
        for name in BACKENDS:
            processes.open(name, {})
        for name in seconds:
            processes.update(name)  # connections and pages that nobody has touched
        for _ in range(repeats):
            for name, found in seconds.items():
                found.append(processes.update(name))
    return seconds, [
        paired_ratio("one host: tent/ucx", seconds["ucx"], seconds["tent"], GOAL_UCX),
        paired_ratio(
            "one host: tent's time to naive's", seconds["tent"], seconds["naive"], GOAL_NAIVE, "lower"
        ),
    ]


def over_links(
    title: str, mib: int, bucket: int, repeats: int, mbit: float, last: float
) -> tuple[dict[str, list[float]], list[Ratio]]:
    """The same over two links, the second of which has `last` Mbit/s."""
    seconds: dict[str, list[float]] = {"tent": [], "ucx": []}
    names = ",".join(f"link{index}" for index in range(LINKS))
    environment = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": names}
    with lab.running(LINKS, mbit) as made:
        made.rate(LINKS - 1, last)
        with line(mib, bucket, made, environment) as processes:
            processes.open("tent", {"cma": "false", "links": names})
            processes.open("ucx", {})
            for name in seconds:
                processes.update(name)
            for _ in range(repeats):
                for name, found in seconds.items():
                    found.append(processes.update(name))
    return seconds, [paired_ratio(f"{title}: tent/ucx", seconds["ucx"], seconds["tent"], GOAL_UCX)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one host only, fewer weights: below a minute")
    parser.add_argument(
        "--mib", type=int, help="MiB of weights; default 512, quick 64; over links a quarter of it"
    )
    parser.add_argument(
        "--bucket", type=int, default=128, help="MiB of verl's update_weights_bucket_megabytes"
    )
    parser.add_argument("--mbit", type=float, default=800.0, help="of a healthy link")
    parser.add_argument("--repeats", type=int, help="default 7, quick 3")
    parser.add_argument("--out", type=Path, help="folder for tent_weights.json")
    arguments = parser.parse_args()
    for name in ("mib", "bucket", "repeats"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if importlib.util.find_spec("verl") is None:
        parser.error("verl is not installed here: nox -s verl --install-only, then .nox/verl/bin/python")
    if problem := problem_here(links=not arguments.quick):
        parser.error(problem)
    mib = arguments.mib or (64 if arguments.quick else 512)
    repeats = arguments.repeats or (3 if arguments.quick else 7)
    cases = {"one host": one_host(mib, arguments.bucket, repeats)}
    if not arguments.quick:
        for title, last in (("2 links", arguments.mbit), ("2 links, one at 1/4", arguments.mbit / 4)):
            size = max(1, mib // 4)
            cases[title] = over_links(title, size, arguments.bucket, repeats, arguments.mbit, last)
    rows = [
        [f"{title}, {name}", f"{statistics.median(found):.3f}", f"{min(found):.3f}", f"{max(found):.3f}"]
        for title, (seconds, _) in cases.items()
        for name, found in seconds.items()
    ]
    table("seconds of an update", ["case", "median", "fastest", "slowest"], rows)
    save = arguments.out / "tent_weights.json" if arguments.out else None
    ratios = [ratio for _, found in cases.values() for ratio in found]
    seconds = {title: found for title, (found, _) in cases.items()}
    print_result("tent_weights", ratios, save, mebibytes=mib, bucket=arguments.bucket, seconds=seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
