"""Links that break while they are used: nothing is lost, nothing is wrong, nothing arrives late.

The lab's links are far slower than this machine, so that what is tested is the links. How fast it heals is measured by
benchmarks/tent.py, not here: this machine may be busy.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import schedules
from hosts import AgentHost, HostError, introduce

from nixl_tent import lab, top

SIZE = 24 << 20
SCHEDULES = 12


class Bench:
    """Two agents in the two namespaces of a lab, with a buffer each."""

    def __init__(self, links: lab.Lab, size: int = SIZE, options: dict[str, str] | None = None) -> None:
        self.lab, self.size = links, size
        self.a = AgentHost("A", options=options, prefix=links.command("a", []))
        self.b = AgentHost("B", options=options, prefix=links.command("b", []))
        self.x = self.a.buffer(name="x", size=size, fill="random", seed=1)
        self.y = self.b.buffer(name="y", size=size)
        introduce(self.a, self.b)

    def begin(self, op: str, seed: int, notify: str | None = None) -> int:
        """Fresh bytes on the side that gives, zeros on the other; posted."""
        giver, taker = (self.a, "x"), (self.b, "y")
        if op == "READ":
            giver, taker = taker, giver
        giver[0].fill(name=giver[1], seed=seed)
        taker[0].fill(name=taker[1], seed=-1)
        handle = self.a.prepare(
            op=op, local=[[self.x, self.size]], remote=[[self.y, self.size]], agent="B", notify=notify
        )
        self.a.post(handle=handle)
        return handle

    def end(self, handle: int) -> None:
        assert self.a.wait(handle=handle)["state"] == "DONE"
        assert self.a.crc(name="x") == self.b.crc(name="y")
        self.a.release(handle=handle)

    def links(self) -> list[dict[str, object]]:
        engine = next(e for e in top.snapshots() if e["pid"] == self.a.process.pid)
        return engine["peers"][0]["links"]

    def close(self) -> None:
        self.a.close()
        self.b.close()


@pytest.fixture
def bench(needs_lab: None) -> Iterator[Bench]:
    with lab.running(links=2, mbit=400) as links:
        made = Bench(links)
        yield made
        made.close()


@pytest.mark.parametrize("op", ["WRITE", "READ"])
@pytest.mark.parametrize("fault", ["cut", "hole", "hole-a", "hole-b", "slow"])
def test_a_link_that_breaks_does_not_break_a_transfer(bench: Bench, op: str, fault: str) -> None:
    bench.end(bench.begin(op, seed=2))  # both links are up and measured
    handle = bench.begin(op, seed=3, notify="through")
    time.sleep(0.1)
    if fault == "cut":
        bench.lab.cut(1)
    elif fault == "slow":
        bench.lab.rate(1, 20)
    else:
        bench.lab.hole(1, fault.removeprefix("hole-").replace("hole", "both"))  # type: ignore[arg-type]
    bench.end(handle)
    assert bench.b.notifications(count=1) == [["A", "through"]]
    bench.end(bench.begin(op, seed=4))  # while it is broken

    bench.lab.heal(1)
    bench.lab.rate(1, 400)
    end = time.monotonic() + 60
    while any(link["state"] != "up" for link in bench.links()) and time.monotonic() < end:
        bench.end(bench.begin(op, seed=5))
    assert [link["state"] for link in bench.links()] == ["up", "up"]
    bench.end(bench.begin(op, seed=6))


@pytest.mark.parametrize("fault", ["cut", "hole"])
def test_nothing_is_written_after_the_end(bench: Bench, fault: str) -> None:
    """The bytes a dead link still holds must not reach memory that its owner uses again, also not when it heals."""
    bench.end(bench.begin("WRITE", seed=2))
    for seed in range(3):
        handle = bench.begin("WRITE", seed=10 + seed)
        time.sleep(0.1)
        getattr(bench.lab, fault)(1)
        bench.end(handle)
        bench.b.fill(name="y", seed=-1)
        zeros = bench.b.crc(name="y")
        bench.lab.heal(1)
        for _ in range(12):  # past several retransmissions of the old connection
            time.sleep(0.1)
            assert bench.b.crc(name="y") == zeros


def test_a_receiver_that_pauses_is_waited_for(bench: Bench) -> None:
    bench.end(bench.begin("WRITE", seed=2))
    for op in ("WRITE", "READ"):
        handle = bench.begin(op, seed=3)
        time.sleep(0.05)
        bench.b.process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        bench.b.process.send_signal(signal.SIGCONT)
        bench.end(handle)
    # A pause of the whole peer is no fault of a link: none was given up for good, none is down.
    assert [link["state"] for link in bench.links()] == ["up", "up"]


def test_a_killed_peer_is_an_error_and_soon(needs_lab: None) -> None:
    with lab.running(links=2, mbit=400) as links:
        bench = Bench(links, options={"reconnect_s": "3"})
        bench.end(bench.begin("WRITE", seed=2))
        handle = bench.begin("WRITE", seed=3)
        bench.b.kill()
        begin = time.monotonic()
        with pytest.raises(HostError, match="DISCONNECT"):
            bench.a.wait(handle=handle)
        assert time.monotonic() - begin < 30
        bench.close()


@pytest.mark.slow
def test_random_schedules_of_faults(needs_lab: None, programs_with: Callable[[str], Path]) -> None:
    """schedules.py says what is broken and what must hold; the engines run under the address sanitizer.

    The long run of a thousand schedules is in docs/tent.md.
    """
    outcomes = schedules.run(programs_with("address,undefined") / "tent_node", range(SCHEDULES))
    assert not schedules.summary(outcomes)["problems"]
