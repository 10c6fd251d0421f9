"""Transfers between memory and files: the same bytes as NIXL's POSIX backend, and errors that say what is wrong."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import environment_of, matrix
from hosts import AgentHost, HostError, introduce

from nixl_tent import top

METHODS = ["io_uring", "threads"]
# Runs its arguments under a system-call filter that answers io_uring_setup (425) with EPERM, as containers do.
WITHOUT_IO_URING = """
import ctypes, os, struct, sys
rows = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *row) for row in rows))
program = ctypes.create_string_buffer(struct.pack("=H6xQ", len(rows), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
no_more_rights, filter_mode = 38, 2
assert libc.prctl(no_more_rights, 1, 0, 0, 0) == 0
where = ctypes.c_void_p(ctypes.addressof(program))
assert libc.prctl(22, filter_mode, where, 0, 0) == 0, os.strerror(ctypes.get_errno())
os.execv(sys.argv[1], sys.argv[1:])
"""
SIZE = (5 << 20) + 12_345
OPEN = os.O_RDWR | os.O_CREAT


@pytest.fixture(params=METHODS)
def agent(request: pytest.FixtureRequest) -> Iterator[AgentHost]:
    with host_with(request.param) as made:
        yield made


def host_with(method: str, **options: str) -> AgentHost:
    try:
        return AgentHost("A", options={"file_io": method, **options})
    except HostError:
        if method == "io_uring":
            pytest.skip("io_uring is not permitted here")
        raise


def pieces_of(size: int, seed: int) -> list[tuple[int, int]]:
    """(offset, bytes) that cover `size` once, in an order of their own, some far smaller than a page."""
    choose = random.Random(seed)
    edges = sorted({0, size, *(choose.randrange(size) for _ in range(40)), 7, 8})
    pieces = [(begin, end - begin) for begin, end in pairwise(edges)]
    choose.shuffle(pieces)
    return pieces


def move(host: AgentHost, op: str, base: int, descriptor: int, pieces: list[tuple[int, int]]) -> str:
    handle = host.prepare_file(
        op=op,
        local=[[base + at, size] for at, size in pieces],
        file=[[at, size, descriptor] for at, size in pieces],
        agent=host.name,
    )
    state = host.run(handle=handle)["state"]
    host.release(handle=handle)
    return state


def register(host: AgentHost, path: Path, size: int, name: str = "f") -> int:
    descriptor = host.open_file(path=str(path), flags=OPEN)
    host.file(name=name, descriptor=descriptor, size=size)
    return descriptor


def report(host: AgentHost) -> dict[str, object]:
    return next(e for e in top.snapshots() if e["pid"] == host.process.pid)["files"]


def test_files_hold_the_same_bytes_as_those_of_posix(agent: AgentHost, tmp_path: Path) -> None:
    """Each backend writes a file and reads the other's."""
    with AgentHost("P", backend="POSIX") as posix:
        bases, descriptors = {}, {}
        for host in (agent, posix):
            bases[host.name] = host.buffer(name="x", size=SIZE, fill="random", seed=4)
            for owner in "AP":
                descriptors[host.name, owner] = register(host, tmp_path / owner, SIZE, owner)
            pieces = pieces_of(SIZE, seed=len(bases))
            assert move(host, "WRITE", bases[host.name], descriptors[host.name, host.name], pieces) == "DONE"
        assert (tmp_path / "A").read_bytes() == (tmp_path / "P").read_bytes()
        expected = agent.crc(name="x")
        for host, owner in ((agent, "P"), (posix, "A")):
            host.fill(name="x", seed=-1)
            pieces = pieces_of(SIZE, seed=9)
            assert move(host, "READ", bases[host.name], descriptors[host.name, owner], pieces) == "DONE"
            assert host.crc(name="x") == expected


def test_the_method_that_was_asked_for_is_used_and_counted(tmp_path: Path) -> None:
    for method in METHODS:
        with host_with(method) as host:
            base = host.buffer(name="x", size=SIZE, fill="random")
            descriptor = register(host, tmp_path / method, SIZE)
            assert report(host)["method"] == ""
            move(host, "WRITE", base, descriptor, [(0, SIZE)])
            move(host, "READ", base, descriptor, [(0, 100)])
            seen = report(host)
            assert seen["method"] == method
            assert (seen["done"], seen["failed"]) == (2, 0)
            assert (seen["bytes_written"], seen["bytes_read"]) == (SIZE, 100)


def test_where_io_uring_is_not_permitted_threads_do_the_work(tmp_path: Path) -> None:
    prefix = [sys.executable, "-c", WITHOUT_IO_URING]
    with AgentHost("A", prefix=prefix) as host:
        base = host.buffer(name="x", size=SIZE, fill="random", seed=2)
        descriptor = register(host, tmp_path / "f", SIZE)
        assert move(host, "WRITE", base, descriptor, [(0, SIZE)]) == "DONE"
        assert report(host)["method"] == "threads"
    with pytest.raises(HostError):
        AgentHost("A", options={"file_io": "io_uring"}, prefix=prefix)


def test_a_file_may_be_named_by_its_path(agent: AgentHost, tmp_path: Path) -> None:
    path = tmp_path / "named"
    base = agent.buffer(name="x", size=SIZE, fill="random", seed=3)
    agent.file(name="f", descriptor=11, size=SIZE, text=f"rw,create:{path}")
    assert move(agent, "WRITE", base, 11, [(0, SIZE)]) == "DONE"
    with pytest.raises(HostError):
        agent.file(name="g", descriptor=11, size=SIZE, offset=2 * SIZE, text=f"rw,create:{path}.other")
    agent.drop_file(name="f")
    agent.file(name="f", descriptor=12, size=SIZE, text=f"ro:{path}")
    expected = agent.crc(name="x")
    agent.fill(name="x", seed=-1)
    assert move(agent, "READ", base, 12, [(0, SIZE)]) == "DONE"
    assert agent.crc(name="x") == expected


def test_questions_about_files_are_answered_as_posix_does(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(bytes(1234))
    paths = [str(tmp_path / "there"), str(tmp_path / "missing")]
    with AgentHost("A") as ours, AgentHost("P", backend="POSIX") as posix:
        found = ours.query_files(paths=paths)
        assert found == posix.query_files(paths=paths)
        assert found[0]["size"] == "1234" and found[1] is None
        assert {"DRAM_SEG", "FILE_SEG"} <= set(ours.memory_kinds())


def test_a_descriptor_may_be_closed_once_it_is_registered(agent: AgentHost, tmp_path: Path) -> None:
    """Its number may by then belong to another file, which must not be written to."""
    base = agent.buffer(name="x", size=SIZE, fill="random", seed=3)
    descriptor = register(agent, tmp_path / "first", SIZE)
    agent.close_file(descriptor=descriptor)
    assert agent.open_file(path=str(tmp_path / "second"), flags=OPEN) == descriptor
    assert move(agent, "WRITE", base, descriptor, [(0, SIZE)]) == "DONE"
    assert (tmp_path / "first").stat().st_size == SIZE
    assert (tmp_path / "second").stat().st_size == 0


def test_a_notification_comes_after_the_bytes(agent: AgentHost, tmp_path: Path) -> None:
    base = agent.buffer(name="x", size=SIZE, fill="random", seed=1)
    descriptor = register(agent, tmp_path / "f", SIZE)
    handle = agent.prepare_file(
        op="WRITE", local=[[base, SIZE]], file=[[0, SIZE, descriptor]], agent="A", notify="on disk"
    )
    agent.post(handle=handle)
    assert agent.notifications(count=1) == [["A", "on disk"]]
    assert (tmp_path / "f").stat().st_size == SIZE
    assert agent.wait(handle=handle)["state"] == "DONE"


def test_what_ends_early_fails_and_says_where(agent: AgentHost, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(3 << 20))
    base = agent.buffer(name="x", size=SIZE)
    descriptor = register(agent, tmp_path / "short", SIZE)
    with pytest.raises(HostError, match="BACKEND"):
        move(agent, "READ", base, descriptor, [(0, SIZE)])
    seen = report(agent)
    assert seen["failed"] == 1 and seen["done"] == 0
    assert "the file ends before that" in str(seen["trouble"])
    assert move(agent, "READ", base, descriptor, [(0, 1 << 20)]) == "DONE"


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that takes 2 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small file system cannot be mounted here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_is_an_error_and_not_half_a_success(agent: AgentHost, full_disk: Path) -> None:
    base = agent.buffer(name="x", size=SIZE, fill="random")
    descriptor = register(agent, full_disk / "f", SIZE)
    handle = agent.prepare_file(
        op="WRITE", local=[[base, SIZE]], file=[[0, SIZE, descriptor]], agent="A", notify="never"
    )
    with pytest.raises(HostError, match="BACKEND"):
        agent.run(handle=handle)
    assert "No space left" in str(report(agent)["trouble"])
    assert agent.notifications(count=1, timeout=0.2) == []
    agent.close_file(descriptor=descriptor)


def test_what_cannot_be_registered_or_asked_is_refused(agent: AgentHost, tmp_path: Path) -> None:
    base = agent.buffer(name="x", size=SIZE)
    (tmp_path / "f").write_bytes(bytes(SIZE))
    for descriptor, text in ((999, ""), (0, f"ro:{tmp_path}/missing"), (0, f"ro:{tmp_path}")):
        with pytest.raises(HostError):
            agent.file(name="bad", descriptor=descriptor, size=SIZE, text=text)
    descriptor = agent.open_file(path=str(tmp_path / "f"), flags=os.O_RDONLY)
    agent.file(name="f", descriptor=descriptor, size=SIZE)
    with pytest.raises(HostError, match="INVALID_PARAM"):
        move(agent, "WRITE", base, descriptor, [(0, SIZE)])
    with pytest.raises(HostError):  # more than what was registered
        move(agent, "READ", base, descriptor, [(1, SIZE)])
    assert move(agent, "READ", base, descriptor, [(0, SIZE)]) == "DONE"


def test_a_release_in_flight_leaves_the_memory_alone(agent: AgentHost, tmp_path: Path) -> None:
    size = 128 << 20
    base = agent.buffer(name="x", size=size, fill="random", seed=1)
    descriptor = register(agent, tmp_path / "f", size)
    assert move(agent, "WRITE", base, descriptor, [(0, size)]) == "DONE"
    agent.fill(name="x", seed=-1)
    handle = agent.prepare_file(op="READ", local=[[base, size]], file=[[0, size, descriptor]], agent="A")
    agent.post(handle=handle)
    agent.release(handle=handle)
    before = agent.crc(name="x")
    time.sleep(0.3)
    assert agent.crc(name="x") == before
    assert move(agent, "READ", base, descriptor, [(0, size)]) == "DONE"


def test_an_agent_with_files_still_talks_to_others_who_may_not_use_them(tmp_path: Path) -> None:
    with AgentHost("A") as a, AgentHost("B") as b:
        x, y = a.buffer(name="x", size=SIZE, fill="random", seed=5), b.buffer(name="y", size=SIZE)
        descriptor = register(b, tmp_path / "f", SIZE)
        introduce(a, b)
        handle = a.prepare(op="WRITE", local=[[x, SIZE]], remote=[[y, SIZE]], agent="B")
        assert a.run(handle=handle)["state"] == "DONE"
        assert b.crc(name="y") == a.crc(name="x")
        with pytest.raises(HostError):
            a.prepare_file(op="WRITE", local=[[x, SIZE]], file=[[0, SIZE, descriptor]], agent="B")
        assert (tmp_path / "f").stat().st_size == 0


@pytest.mark.parametrize("folder", matrix(), ids=lambda path: path.name)
def test_every_supported_nixl_has_files(folder: Path, tmp_path: Path) -> None:
    with AgentHost("A", environment=environment_of(folder)) as host:
        base = host.buffer(name="x", size=SIZE, fill="random", seed=6)
        descriptor = register(host, tmp_path / "f", SIZE)
        assert move(host, "WRITE", base, descriptor, pieces_of(SIZE, seed=1)) == "DONE"
        expected = host.crc(name="x")
        host.fill(name="x", seed=-1)
        assert move(host, "READ", base, descriptor, pieces_of(SIZE, seed=2)) == "DONE"
        assert host.crc(name="x") == expected
        assert [row is not None for row in host.query_files(paths=[str(tmp_path / "f"), "/nowhere"])] == [
            True,
            False,
        ]
