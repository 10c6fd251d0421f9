"""Transfers between two processes through NIXL's own Python API, checked by checksum."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from conftest import environment_of, matrix
from hosts import AgentHost, HostError, introduce

SIZES = [0, 1, 63, 4096, 65_537, (1 << 20) + 3, 16 << 20, 256 << 20]


def check_both_ways(a: AgentHost, b: AgentHost, size: int) -> None:
    x = a.buffer(name="x", size=max(size, 1), fill="random", seed=size)
    y = b.buffer(name="y", size=max(size, 1))
    introduce(a, b)
    expected = a.crc(name="x")
    for op in ("WRITE", "READ"):
        if size:
            (b if op == "WRITE" else a).fill(name="y" if op == "WRITE" else "x", seed=-1)
        handle = a.prepare(op=op, local=[[x, size]], remote=[[y, size]], agent="B", notify=f"{op} over")
        assert a.run(handle=handle)["state"] == "DONE"
        if size:
            assert a.crc(name="x") == b.crc(name="y") == expected
        assert b.notifications(count=1) == [["A", f"{op} over"]]
        a.release(handle=handle)


@pytest.mark.parametrize("cma", ["true", "false"], ids=["cma", "tcp"])
@pytest.mark.parametrize("size", SIZES)
def test_write_and_read_move_every_byte(size: int, cma: str) -> None:
    with AgentHost("A", options={"cma": cma}) as a, AgentHost("B", options={"cma": cma}) as b:
        check_both_ways(a, b, size)


@pytest.mark.slow
def test_one_gibibyte() -> None:
    with AgentHost("A") as a, AgentHost("B") as b:
        check_both_ways(a, b, 1 << 30)


@pytest.mark.parametrize("folder", matrix(), ids=lambda path: path.name)
def test_every_supported_nixl(folder: Path) -> None:
    environment = environment_of(folder)
    with AgentHost("A", environment=environment) as a, AgentHost("B", environment=environment) as b:
        assert "TENT" in a.plugins() and "UCX" in a.plugins()
        check_both_ways(a, b, (4 << 20) + 5)
        check_descriptors(a, b, count=1000)


def test_different_nixls_understand_each_other() -> None:
    folders = matrix()
    if len(folders) < 2:
        pytest.skip("NIXL_MATRIX names fewer than two versions")
    old, new = environment_of(folders[0]), environment_of(folders[-1])
    with AgentHost("A", environment=old) as a, AgentHost("B", environment=new) as b:
        check_both_ways(a, b, (2 << 20) + 1)


def check_descriptors(a: AgentHost, b: AgentHost, count: int) -> None:
    piece = 192
    x = a.buffer(name="many", size=count * piece, fill="random", seed=count)
    y = b.buffer(name="many", size=count * piece)
    introduce(a, b)
    for op in ("WRITE", "READ"):
        handle = a.prepare_split(op=op, local=x, remote=y, size=piece, count=count, agent="B")
        assert a.run(handle=handle)["state"] == "DONE"
        assert a.crc(name="many") == b.crc(name="many")
        (a if op == "WRITE" else b).fill(name="many", seed=-1)


@pytest.mark.parametrize("cma", ["true", "false"], ids=["cma", "tcp"])
def test_ten_thousand_descriptors_in_one_request(cma: str) -> None:
    with AgentHost("A", options={"cma": cma}) as a, AgentHost("B", options={"cma": cma}) as b:
        check_descriptors(a, b, count=10_000)


def test_threads_share_an_agent(pair: tuple[AgentHost, AgentHost]) -> None:
    a, b = pair
    threads, size = 8, 300_000
    x = a.buffer(name="x", size=threads * size, fill="random", seed=5)
    y = b.buffer(name="y", size=threads * size)
    introduce(a, b)
    states = a.hammer(op="WRITE", local=x, remote=y, size=size, agent="B", threads=threads, each=20)
    assert states == ["DONE"] * (threads * 20)
    assert a.crc(name="x") == b.crc(name="y")


def test_a_handle_can_be_posted_again(pair: tuple[AgentHost, AgentHost]) -> None:
    a, b = pair
    size = 100_000
    x, y = a.buffer(name="x", size=size), b.buffer(name="y", size=size)
    introduce(a, b)
    handle = a.prepare(op="WRITE", local=[[x, size]], remote=[[y, size]], agent="B", notify="again")
    for seed in range(5):
        a.fill(name="x", seed=seed)
        assert a.run(handle=handle)["state"] == "DONE"
        assert a.crc(name="x") == b.crc(name="y")
    assert b.notifications(count=5) == [["A", "again"]] * 5


@pytest.mark.parametrize("spin_us", ["0", "200"])
def test_small_transfers_in_a_row_by_a_caller_who_polls(spin_us: str) -> None:
    """The caller reads the answers himself, beside the thread, which sleeps or looks again."""
    options = {"spin_us": spin_us}
    with AgentHost("A", options=options) as a, AgentHost("B", options=options) as b:
        size = 5000
        x, y = a.buffer(name="x", size=size, fill="random", seed=3), b.buffer(name="y", size=size)
        introduce(a, b)
        for op in ("WRITE", "READ"):
            handle = a.prepare(op=op, local=[[x, size]], remote=[[y, size]], agent="B", notify=op)
            taker, name = (b, "y") if op == "WRITE" else (a, "x")
            taker.fill(name=name, seed=-1)
            a.latencies(handle=handle, count=400)
            assert a.crc(name="x") == b.crc(name="y")
            assert b.notifications(count=400) == [["A", op]] * 400
            a.release(handle=handle)


def test_plain_notifications_arrive_in_order_and_once(pair: tuple[AgentHost, AgentHost]) -> None:
    a, b = pair
    for number in range(200):
        a.notify(agent="B", message=f"number {number}")
    assert b.notifications(count=200) == [["A", f"number {n}"] for n in range(200)]
    assert b.notifications(count=1, timeout=0.1) == []


@pytest.mark.parametrize("size", [1000, 8 << 20])
def test_local_transfers(size: int) -> None:
    with AgentHost("A") as a:
        x = a.buffer(name="x", size=size, fill="random", seed=1)
        y = a.buffer(name="y", size=size)
        for op, source, target in (("WRITE", "x", "y"), ("READ", "y", "x")):
            a.fill(name=source, seed=size)
            handle = a.prepare(op=op, local=[[x, size]], remote=[[y, size]], agent="A", notify=op)
            assert a.run(handle=handle)["state"] == "DONE"
            assert a.crc(name=source) == a.crc(name=target)
        assert a.notifications(count=2) == [["A", "WRITE"], ["A", "READ"]]


def test_a_release_in_flight_stops_it_and_the_next_one_works(pair: tuple[AgentHost, AgentHost]) -> None:
    a, b = pair
    size = 64 << 20
    x = a.buffer(name="x", size=size, fill="random", seed=1)
    y = b.buffer(name="y", size=size)
    introduce(a, b)
    for op in ("WRITE", "READ"):
        handle = a.prepare(op=op, local=[[x, size]], remote=[[y, size]], agent="B")
        a.post(handle=handle)
        a.release(handle=handle)
        # Released means: this side's memory is ours again. For a read, nothing arrives any more.
        before = a.crc(name="x")
        time.sleep(0.2)
        assert a.crc(name="x") == before
    handle = a.prepare(op="WRITE", local=[[x, size]], remote=[[y, size]], agent="B")
    assert a.run(handle=handle)["state"] == "DONE"
    assert a.crc(name="x") == b.crc(name="y")


def test_a_small_transfer_on_one_host_needs_nothing_of_the_other_process(
    pair: tuple[AgentHost, AgentHost],
) -> None:
    """Its bytes are there while that process is stopped; its notification waits until it goes on."""
    a, b = pair
    size = 60_000
    x = a.buffer(name="x", size=size, fill="random", seed=1)
    y = b.buffer(name="y", size=size, fill="random", seed=2)
    introduce(a, b)
    plain = a.prepare_split(op="WRITE", local=x, remote=y, size=60, count=1000, agent="B")
    told = a.prepare(op="WRITE", local=[[x, size]], remote=[[y, size]], agent="B", notify="here")
    assert a.run(handle=told)["state"] == "DONE"  # and the link is up
    assert b.notifications(count=1) == [["A", "here"]]
    a.fill(name="x", seed=3)
    os.kill(b.process.pid, signal.SIGSTOP)
    try:
        assert a.run(handle=plain)["state"] == "DONE"
        a.post(handle=told)
        time.sleep(0.05)
        assert a.state(handle=told) == "PROC"
    finally:
        os.kill(b.process.pid, signal.SIGCONT)
    assert b.crc(name="y") == a.crc(name="x")
    assert b.notifications(count=1) == [["A", "here"]]
    b.kill()
    with pytest.raises(HostError):
        a.run(handle=plain)


@pytest.mark.parametrize("size", [64, 1 << 20])
def test_memory_that_was_deregistered_is_refused_by_the_target(
    pair: tuple[AgentHost, AgentHost], size: int
) -> None:
    a, b = pair
    x = a.buffer(name="x", size=size, fill="random", seed=1)
    y = b.buffer(name="y", size=size)
    introduce(a, b)
    handle = a.prepare(op="WRITE", local=[[x, size]], remote=[[y, size]], agent="B")
    assert a.run(handle=handle)["state"] == "DONE"
    b.deregister(name="y")
    b.fill(name="y", seed=-1)
    zeros = b.crc(name="y")
    with pytest.raises(HostError):
        a.run(handle=handle)
    assert b.crc(name="y") == zeros


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rails": "eth0"}, "unknown option 'rails'"),
        ({"mode": "fast"}, "spray or static"),
        ({"links": "no-such-link"}, "no-such-link"),
        ({"stall_ms": "-1"}, "stall_ms must be a number"),
    ],
)
def test_wrong_options_are_named(options: dict[str, str], message: str, tmp_path: Path) -> None:
    with (tmp_path / "errors").open("w+") as errors:
        with pytest.raises(HostError):
            AgentHost("A", options=options, stderr=errors)
        errors.seek(0)
        assert message in errors.read()
