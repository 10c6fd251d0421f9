"""Random schedules of faults: what is posted, what breaks and when, and what must hold in the end.

    python tests/nixl/schedules.py PROGRAM --count 1000 --out RESULT.json

A schedule runs two engines in two processes, on the two sides of a lab. It posts one to four transfers at once, then
plays its faults: links are cut, swallow packets (in both directions or one), blink (so that slices arrive long after
younger ones on the other link), become slow; one side's kernel forgets its connections; either process is frozen, or
the target killed. Then everything heals, and it must hold that

- every transfer ends in time, and well, unless its target was killed or all links were taken away for good;
- what ended well is there, byte for byte; what lies around it is as it was;
- each notification arrived once, and none of a transfer that was not posted;
- memory that is cleared after the end stays clear: nothing is written late;
- a further transfer works over all links, after a kill with a new process of the same name;
- an engine that is closed leaves no descriptor, thread or memory behind.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent))
from nodes import CANCELED, DISCONNECTED, DONE, FAILED, Node

from nixl_tent import lab

LINKS = 2
MBIT = 160.0
AREA = 6 << 20  # of the memory, for one transfer
GUARD = 4096  # bytes behind each area that nobody may touch
MOST_TRANSFERS = 4
SIZE = MOST_TRANSFERS * (AREA + GUARD)
RECONNECT = 4.0  # seconds without any link until transfers fail
PROGRESS = 20.0
BOUND = RECONNECT + PROGRESS + 20  # generous: this machine may be busy, processes are frozen on purpose
SETTLE = 0.35  # seconds in which late bytes would arrive: some retransmissions of a connection that heals
GUARD_SEED = 77
HEAP_SLACK = 64 << 10  # what the C++ runtime keeps of its own; one leaked slice list would be more

Fault = Literal["cut", "hole", "hole-a", "hole-b", "blink", "slow", "heal", "lose-a", "lose-b", "freeze-a", "freeze-b",
                "kill"]  # fmt: skip
WEIGHTS: dict[Fault, int] = {
    "cut": 4, "hole": 4, "hole-a": 3, "hole-b": 3, "blink": 5, "slow": 4, "heal": 4, "lose-a": 3, "lose-b": 3,
    "freeze-a": 2, "freeze-b": 4, "kill": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    after: float  # seconds since the step before
    fault: Fault
    link: int
    value: float  # seconds, or Mbit/s where the link becomes slow


@dataclass(frozen=True)
class Post:
    op: Literal["READ", "WRITE"]
    length: int
    pieces: int
    priority: int
    notify: bool


@dataclass(frozen=True)
class Schedule:
    seed: int
    posts: list[Post]
    steps: list[Step]
    outage: bool  # all links end broken, until the transfers have failed

    @property
    def kills(self) -> bool:
        return any(step.fault == "kill" for step in self.steps)


def make(seed: int) -> Schedule:
    """The schedule of a seed: the same on every machine."""
    choose = random.Random(seed)
    posts = [
        Post(
            op=choose.choice(["WRITE", "WRITE", "READ"]),
            length=choose.choice([0, choose.randrange(1, 5000), choose.randrange(1, AREA), AREA, AREA]),
            pieces=choose.choice([1, 1, 1, 7, choose.randrange(1, 600)]),
            priority=choose.randrange(3),
            notify=choose.random() < 0.5,
        )
        for _ in range(choose.randint(1, MOST_TRANSFERS))
    ]
    steps: list[Step] = []
    for _ in range(choose.randint(1, 5)):
        fault = choose.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        value = choose.choice([4.0, 20.0, 100.0]) if fault == "slow" else choose.uniform(0.002, 0.25)
        steps.append(Step(choose.uniform(0, 0.15), fault, choose.randrange(LINKS), value))
        if fault == "kill":
            break
    outage = not any(step.fault == "kill" for step in steps) and choose.random() < 0.05
    return Schedule(seed, posts, steps, outage)


@dataclass
class Outcome:
    seed: int
    seconds: float
    states: list[int] = field(default_factory=list)
    longest: float = 0.0  # seconds of the transfer that took longest
    reroutes_ms: list[float] = field(default_factory=list)
    stalls: int = 0
    repeated: int = 0
    deaths: int = 0
    faults: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Play:
    """One schedule between two fresh processes, on links that are healthy."""

    def __init__(self, program: Path, links: lab.Lab, schedule: Schedule) -> None:
        self.program, self.lab, self.schedule = program, links, schedule
        self.outcome = Outcome(schedule.seed, 0.0)
        options = {"reconnect_s": RECONNECT, "progress_s": PROGRESS}
        self.a = Node(program, "A", options, links.command("a", []))
        self.b = self.start_b()
        self.regions = {"A": self.a.call("memory", "m", SIZE), "B": self.b.call("memory", "m", SIZE)}
        self.a.meet(self.b)
        self.b.meet(self.a)
        for node in (self.a, self.b):
            node.call("fill", "m", 0, SIZE, GUARD_SEED)
        self.guards = self.guard_digests(self.a)

    def start_b(self) -> Node:
        return Node(self.program, "B", {}, self.lab.command("b", []))

    def guard_digests(self, node: Node) -> list[int]:
        """Of everything that no transfer covers."""
        digests = []
        for index in range(MOST_TRANSFERS):
            begin = index * (AREA + GUARD)
            used = self.schedule.posts[index].length if index < len(self.schedule.posts) else 0
            digests.append(node.digest("m", begin + used, AREA + GUARD - used))
        return digests

    def claim(self, holds: bool, what: str) -> None:
        if not holds:
            self.outcome.problems.append(what)

    def post(self, index: int, post: Post, prefix: str = "n") -> None:
        begin = index * (AREA + GUARD)
        giver, taker = (self.a, self.b) if post.op == "WRITE" else (self.b, self.a)
        if post.length:
            giver.call("fill", "m", begin, post.length, 1000 + self.schedule.seed * 8 + index)
            taker.call("fill", "m", begin, post.length, 0)
        words: list[object] = [index, post.op, "B", "m", begin, post.length, self.regions["B"], begin, post.pieces,
                               post.priority]  # fmt: skip
        self.a.call("post", *words, *([f"{prefix}{index}"] if post.notify else []))

    def play(self, step: Step) -> None:
        time.sleep(step.after)
        other = 1 - step.link
        match step.fault:
            case "cut":
                self.lab.cut(step.link)
            case "hole":
                self.lab.hole(step.link)
            case "hole-a":
                self.lab.hole(step.link, "a")
            case "hole-b":
                self.lab.hole(step.link, "b")
            case "blink":
                self.lab.hole(step.link)
                time.sleep(step.value)
                self.lab.heal(step.link)
            case "slow":
                self.lab.rate(step.link, step.value)
            case "heal":
                self.lab.heal(step.link)
            case "lose-a" | "lose-b":
                node = self.a if step.fault == "lose-a" else self.b
                node.lose_connections(f"10.77.{step.link}.")
            case "freeze-a" | "freeze-b":
                node = self.a if step.fault == "freeze-a" else self.b
                node.process.send_signal(signal.SIGSTOP)
                time.sleep(step.value)
                node.process.send_signal(signal.SIGCONT)
            case "kill":
                self.b.kill()
        if step.fault in ("cut", "hole", "hole-a", "hole-b") and not self.schedule.outage:
            self.lab.heal(other)  # one way stays, or a transfer might rightly fail
        self.outcome.faults.append(f"{step.fault} {step.link}")

    def check_ends(self) -> list[int]:
        schedule = self.schedule
        allowed = {DONE}
        if schedule.kills:
            allowed |= {DISCONNECTED}
        if schedule.outage:
            allowed |= {DISCONNECTED, FAILED, CANCELED}
        good = []
        for index, post in enumerate(schedule.posts):
            status, took = self.a.wait(index, BOUND)
            self.outcome.states.append(status)
            self.outcome.longest = max(self.outcome.longest, took)
            self.claim(
                status in allowed, f"transfer {index} ({post.op}) ended as {status} after {took:.1f} s"
            )
            if status == DONE:
                good.append(index)
        return good

    def check_bytes(self, good: Iterable[int]) -> None:
        for index in good:
            post = self.schedule.posts[index]
            begin = index * (AREA + GUARD)
            same = self.a.digest("m", begin, post.length) == self.b.digest("m", begin, post.length)
            self.claim(same, f"transfer {index} ({post.op}) moved wrong bytes")
        self.claim(self.guard_digests(self.b) == self.guards, "the target's other memory changed")
        self.claim(self.guard_digests(self.a) == self.guards, "the initiator's other memory changed")

    def check_notifications(self, good: list[int]) -> None:
        must = {f"A=n{index}" for index in good if self.schedule.posts[index].notify}
        may = {f"A=n{index}" for index, post in enumerate(self.schedule.posts) if post.notify}
        found: Counter[str] = Counter()
        end = time.monotonic() + 20
        while True:
            found.update(self.b.call("notifications").split())
            if must <= set(found) or time.monotonic() > end:
                break
            time.sleep(0.02)
        self.claim(must <= set(found), f"notifications {sorted(must - set(found))} were lost")
        self.claim(set(found) <= may, f"notifications {sorted(set(found) - may)} came from nowhere")
        self.claim(all(count == 1 for count in found.values()), f"notifications came twice: {dict(found)}")

    def check_late(self, good: list[int]) -> None:
        """Clear what was written, let every link come back, look again."""
        taken = []
        for index in good:
            post = self.schedule.posts[index]
            taker = self.b if post.op == "WRITE" else self.a
            if post.length and taker.process.poll() is None:
                taker.call("fill", "m", index * (AREA + GUARD), post.length, 0)
                taken.append((taker, index, taker.digest("m", index * (AREA + GUARD), post.length)))
        self.heal()
        time.sleep(SETTLE)
        for taker, index, clear in taken:
            length = self.schedule.posts[index].length
            self.claim(
                taker.digest("m", index * (AREA + GUARD), length) == clear,
                f"transfer {index} was written late",
            )

    def heal(self) -> None:
        for link in range(LINKS):
            self.lab.heal(link)
            self.lab.rate(link, MBIT)

    def check_life_after(self) -> None:
        """A transfer over links that are well again, to a new process where the old one was killed."""
        for index in range(len(self.schedule.posts)):
            self.a.call("release", index)
        if self.schedule.kills:
            self.b = self.start_b()
            self.regions["B"] = self.b.call("memory", "m", SIZE)
            self.b.meet(self.a)
            self.a.meet(self.b)
        end = time.monotonic() + 30
        while True:
            self.post(0, Post("WRITE", AREA, 3, 1, True), "after")
            status, _ = self.a.wait(0, BOUND)
            self.a.call("release", 0)
            self.claim(status == DONE, f"a transfer after everything healed ended as {status}")
            up = [link["state"] for link in self.a.links()]
            if status != DONE or up == ["up"] * LINKS or time.monotonic() > end:
                break
        self.claim(up == ["up"] * LINKS, f"after everything healed the links are {up}")
        self.claim(
            self.a.digest("m", 0, AREA) == self.b.digest("m", 0, AREA),
            "a transfer after it moved wrong bytes",
        )
        peer = self.a.metrics()["peers"][0]
        self.claim(peer["transfers"] == 0 and peer["backlog"] == 0, "work is left that nobody posted")

    def observe(self) -> None:
        for link in self.a.links():
            self.outcome.stalls += int(link["stalls_total"])
            self.outcome.deaths += int(link["deaths_total"])
            self.outcome.repeated += int(link["repeated_slices_total"])
            if link["stalls_total"]:
                self.outcome.reroutes_ms.append(link["worst_reroute_ms"])

    def run(self) -> Outcome:
        begin = time.monotonic()
        try:
            self.post(0, Post("WRITE", 1 << 20, 1, 1, False))  # every link has been met
            self.claim(self.a.wait(0, BOUND)[0] == DONE, "the transfer before any fault failed")
            self.a.call("release", 0)
            for node in (self.a, self.b):
                node.call("fill", "m", 0, AREA + GUARD, GUARD_SEED)
            for index, post in enumerate(self.schedule.posts):
                self.post(index, post)
            for step in self.schedule.steps:
                self.play(step)
            if self.schedule.outage:
                for link in range(LINKS):
                    self.lab.hole(link)
            elif not self.schedule.kills:
                self.lab.heal(self.schedule.seed % LINKS)
            good = self.check_ends()
            self.observe()
            if self.b.process.poll() is None:
                self.check_bytes(good)
                self.heal()
                self.check_notifications(good)
            self.check_late(good)
            self.check_life_after()
            for node in (self.a, self.b):
                descriptors, threads, heap = node.close()
                self.claim(
                    descriptors == 0 and threads == 0,
                    f"{node.name} left {descriptors} files, {threads} threads",
                )
                self.claim(heap <= HEAP_SLACK, f"{node.name} left {heap} bytes of heap")
        except Exception as error:
            self.outcome.problems.append(f"{type(error).__name__}: {error}")
        finally:
            for node in (self.a, self.b):
                node.kill()
            self.heal()
        self.outcome.seconds = time.monotonic() - begin
        return self.outcome


def run(program: Path, seeds: Iterable[int], name: str | None = None) -> list[Outcome]:
    """Play the schedules of `seeds` one after the other in one lab."""
    with lab.running(LINKS, MBIT, name) as links:
        return [Play(program, links, make(seed)).run() for seed in seeds]


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """What happened, in figures; the outcomes with problems in full."""
    names = {DONE: "done", DISCONNECTED: "disconnected", FAILED: "failed", CANCELED: "canceled"}
    states = Counter(names.get(state, str(state)) for outcome in outcomes for state in outcome.states)
    reroutes = sorted(value for outcome in outcomes for value in outcome.reroutes_ms)
    faults = Counter(fault.split()[0] for outcome in outcomes for fault in outcome.faults)
    bad = [outcome for outcome in outcomes if outcome.problems]
    return {
        "schedules": len(outcomes),
        "with_problems": len(bad),
        "transfers": dict(sorted(states.items())),
        "faults": dict(sorted(faults.items())),
        "stalls": sum(o.stalls for o in outcomes),
        "connections_lost": sum(o.deaths for o in outcomes),
        "slices_sent_twice": sum(o.repeated for o in outcomes),
        "longest_transfer_s": round(max((o.longest for o in outcomes), default=0), 2),
        "worst_reroute_of_a_link_ms": {
            "links": len(reroutes),
            "median": round(statistics.median(reroutes), 1) if reroutes else None,
            "p99": round(reroutes[int(0.99 * (len(reroutes) - 1))], 1) if reroutes else None,
            "worst": round(reroutes[-1], 1) if reroutes else None,
        },
        "problems": [asdict(outcome) for outcome in bad],
    }


def origin(first: int, count: int) -> dict[str, Any]:
    """What a run's result must say of where it comes from."""
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())  # fmt: skip
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "kernel": platform.release()},
        "seeds": [first, first + count - 1],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program", type=Path, help="tent_node, built with -DTENT_TESTS=ON")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--name", help="of the lab; default: one of this process")
    parser.add_argument("--out", type=Path, help="write the summary as JSON")
    arguments = parser.parse_args()
    outcomes: list[Outcome] = []
    with lab.running(LINKS, MBIT, arguments.name) as links:
        for seed in range(arguments.first, arguments.first + arguments.count):
            outcome = Play(arguments.program, links, make(seed)).run()
            outcomes.append(outcome)
            line = f"{seed}: {outcome.states} in {outcome.seconds:.1f} s; {', '.join(outcome.faults)}"
            print(line, *outcome.problems, sep="\n    ", flush=True)
    found = {**origin(arguments.first, arguments.count), **summary(outcomes)}
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "problems"}))
    return 1 if found["with_problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
