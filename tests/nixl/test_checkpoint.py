"""Weights from process to process: the line that verl's adapter uses, and checkpoint-engine's store. Real processes."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="weights are torch's")
import torch
from checkpoint_host import told, weights
from hosts import AgentHost, HostError
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_stack.compat import LiveSource, missing
from nixl_tent import lab
from nixl_tent.checkpoint import compat
from nixl_tent.checkpoint.buckets import ALIGN, Assembler, Bucket

SCRIPT = Path(__file__).with_name("checkpoint_host.py")

KIB, MIB = 1 << 10, 1 << 20


class CheckpointHost(AgentHost):
    """A process of checkpoint_host.py; `ready` waits for it, so that several start at once."""

    def __init__(self, kind: str, prefix: list[str] | None = None, **arguments: Any) -> None:
        self.name = kind
        self.process = subprocess.Popen(
            [*(prefix or []), sys.executable, str(SCRIPT), kind, json.dumps(arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=dict(os.environ),
        )  # fmt: skip

    def ready(self) -> CheckpointHost:
        self._answer()
        return self


# Buckets


@given(
    sizes=st.lists(st.integers(0, 300_000), max_size=12),
    capacity=st.integers(66_000, 400_000),
)
@settings(max_examples=60, deadline=None)
def test_whatever_goes_into_buckets_comes_out_of_them(sizes: list[int], capacity: int) -> None:
    made = torch.Generator().manual_seed(0)
    tensors = {
        str(i): torch.randint(0, 256, (n,), dtype=torch.uint8, generator=made) for i, n in enumerate(sizes)
    }
    assembler = Assembler()
    found = {}
    bucket = Bucket(torch.empty(capacity, dtype=torch.uint8))

    def empty() -> None:
        payload, table = bucket.close()
        assert payload + table <= capacity
        for name, tensor in assembler.take(bucket.memory, payload, table):
            assert tensor.data_ptr() % ALIGN == bucket.memory.data_ptr() % ALIGN or tensor.nbytes == 0
            found[name] = tensor.clone()

    for name, tensor in tensors.items():
        begin = 0
        while True:
            took = bucket.add(name, tensor, begin)
            if took < 0:
                empty()
                bucket = Bucket(torch.empty(capacity, dtype=torch.uint8))
                continue
            begin += took
            if begin == tensor.nbytes:
                break
    empty()
    assembler.finish()
    assert list(found) == list(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_bucket_too_small_for_a_name_says_so() -> None:
    with pytest.raises(ValueError, match=r"no room for a piece of 'x+': raise the bucket size"):
        Bucket(torch.empty(1024, dtype=torch.uint8)).add("x" * 2000, torch.zeros(4), 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a", "float32", [4], 0, 16, 64], "does not lie in its bucket"),
        (["a", "float32", [4], 0, 16, -16], "does not lie in its bucket"),
        (["a", "float32", [4], 8, 16, 0], "does not lie in its bucket"),
        (["a", "float31", [4], 0, 16, 0], "dtype is 'float31'"),
        (["a", "float32", [8], 16, 16, 0], "goes on at byte 16, 0 of None are here"),
    ],
)
def test_a_table_that_lies_is_refused(row: list[Any], message: str) -> None:
    table = json.dumps(row).encode() + b"\n"
    memory = torch.frombuffer(bytearray(64) + bytearray(table), dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        list(Assembler().take(memory, 64, len(table)))


def test_an_update_that_ends_within_a_tensor_is_an_error() -> None:
    bucket = Bucket(torch.empty(100 * KIB, dtype=torch.uint8))
    bucket.add("long", torch.zeros(MIB, dtype=torch.uint8), 0)
    assembler = Assembler()
    assert not list(assembler.take(bucket.memory, *bucket.close()))
    with pytest.raises(ValueError, match="leaves 'long' incomplete"):
        assembler.finish()


# The line of processes


@pytest.fixture
def line(request: pytest.FixtureRequest) -> Iterator[list[CheckpointHost]]:
    """A trainer and two receivers, with small buckets."""
    arguments = {"bucket_bytes": MIB, "timeout": 30.0, **getattr(request, "param", {})}
    hosts = [CheckpointHost("chain", **arguments) for _ in range(3)]
    try:
        yield [host.ready() for host in hosts]
    finally:
        for host in hosts:
            host.close()


def join(hosts: list[CheckpointHost]) -> None:
    places = [host.place() for host in hosts]
    for index, host in enumerate(hosts):
        before = places[index - 1] if index else None
        after = places[index + 1] if index + 1 < len(hosts) else None
        host.join(before=before, after=after)


def update(hosts: list[CheckpointHost], seed: int, mebibytes: float, pause: float = 0.0) -> None:
    join(hosts)
    expected = hosts[0].make(seed=seed, mebibytes=mebibytes)
    for host in hosts[1:]:
        host.begin("receive", pause=pause)
    hosts[0].send()
    for host in hosts[1:]:
        assert host.end() == expected
    for host in hosts:
        host.leave()


@pytest.mark.parametrize(
    "line", [{}, {"backend": "UCX"}, {"options": {"cma": False}}], indirect=True, ids=str
)
def test_every_update_arrives_everywhere_bit_for_bit(line: list[CheckpointHost]) -> None:
    for seed, mebibytes in enumerate((20, 0.01, 7)):
        update(line, seed, mebibytes)
    update(line, 9, 4, pause=0.01)  # a receiver slower than its sender


def test_what_a_receiver_gets_is_what_was_made_here(line: list[CheckpointHost]) -> None:
    """The hosts' own checksums are checked against this process's."""
    assert line[0].make(seed=3, mebibytes=1) == json.loads(json.dumps(told(weights(3, 1))))


@pytest.mark.parametrize("line", [{"timeout": 2.0}], indirect=True, ids=str)
def test_a_silent_trainer_is_an_error_in_bounded_time(line: list[CheckpointHost]) -> None:
    join(line)
    line[0].make(seed=0, mebibytes=8)
    line[1].begin("receive")
    line[2].begin("receive")
    with pytest.raises(HostError, match="the trainer failed"):
        line[0].send(fail_after=12)
    for host in line[1:]:
        with pytest.raises(HostError, match=r"waited 2 s until .* sends the next bucket"):
            host.end()


@pytest.mark.parametrize("line", [{"timeout": 5.0}], indirect=True, ids=str)
def test_a_receiver_that_died_is_an_error_in_bounded_time(line: list[CheckpointHost]) -> None:
    join(line)
    line[0].make(seed=0, mebibytes=30)
    line[1].begin("receive", pause=0.5)
    line[0].begin("send")
    time.sleep(0.3)
    line[1].kill()
    begin = time.monotonic()
    with pytest.raises(HostError, match="TransferError"):
        line[0].end()
    assert time.monotonic() - begin < 20


def test_a_link_cut_during_an_update_loses_nothing(needs_lab: None) -> None:
    options = {"cma": False, "links": "link0,link1"}
    with lab.running(links=2, mbit=200) as made:
        hosts = [
            CheckpointHost("chain", made.command(side, []), bucket_bytes=4 * MIB, options=options)
            for side in ("a", "b")
        ]
        try:
            join([host.ready() for host in hosts])
            expected = hosts[0].make(seed=5, mebibytes=64)  # more than a second on both links
            hosts[1].begin("receive")
            hosts[0].begin("send")
            time.sleep(0.4)
            made.cut(1)
            assert hosts[1].end() == expected
            assert hosts[0].end() > 1.0, "the cut came after the update: send more"
        finally:
            for host in hosts:
                host.close()


def test_wrong_arguments_are_named() -> None:
    for arguments, message in (
        ({"bucket_bytes": 10}, "bucket_bytes must be at least 1024, got 10"),
        ({"bucket_bytes": MIB, "backend": "TELEPATHY"}, "no backend 'TELEPATHY'"),
        ({"bucket_bytes": MIB, "options": {"links": "no-such-link"}}, "TENT does not start with options"),
        ({"bucket_bytes": MIB, "timeout": 0}, "timeout must be positive"),
    ):
        with pytest.raises(HostError, match=message):
            CheckpointHost("chain", **arguments).ready()


# MoonshotAI's checkpoint-engine


@pytest.fixture
def stores() -> Iterator[tuple[CheckpointHost, CheckpointHost]]:
    pytest.importorskip("checkpoint_engine", reason="pip install checkpoint-engine")
    with CheckpointHost("store", rank=0) as a, CheckpointHost("store", rank=1) as b:
        yield a.ready(), b.ready()


def test_named_tensors_are_read_by_another_process(stores: tuple[CheckpointHost, CheckpointHost]) -> None:
    owner, reader = stores
    found = [row for row in owner.register(seed=1, mebibytes=12).values() if row[1]]
    assert reader.read(target=owner.addr(), rows=[row[:2] for row in found]) == [row[2] for row in found]
    # What was registered since the reader asked is found too.
    assert owner.unregister(names=["large"]) == 1
    again = owner.register(seed=2, mebibytes=12, only=["large"])["large"]
    assert reader.read(target=owner.addr(), rows=[again[:2]]) == [again[2]]


def test_what_cannot_be_read_is_an_error(stores: tuple[CheckpointHost, CheckpointHost]) -> None:
    owner, reader = stores
    found = owner.register(seed=1, mebibytes=1)
    address, size, _ = found["large"]
    with pytest.raises(HostError, match=r"ValueError: 64 bytes at .* are in no registered tensor"):
        reader.read_elsewhere(target=owner.addr(), address=address, size=64)
    assert owner.unregister(names=["large"]) == 1
    with pytest.raises(HostError, match="TransferError"):
        reader.read(target=owner.addr(), rows=[[address, size]])
    with pytest.raises(HostError, match="KeyError: 'large not registered'"):
        owner.unregister(names=["last", "large"])
    assert owner.unregister(names=["last"]) == 1  # the refused call took nothing away
    with pytest.raises(HostError, match="is registered already"):
        owner.register(seed=1, mebibytes=1)
    with pytest.raises(HostError, match=r"TransferError: the store at 127\.0\.0\.1:1 does not answer"):
        reader.read(target="127.0.0.1:1", rows=[[address, 64]])


def test_the_store_has_everything_that_checkpoint_engine_uses() -> None:
    pytest.importorskip("checkpoint_engine", reason="pip install checkpoint-engine")
    assert missing(compat.CHECKPOINT_ENGINE_HOOKS, LiveSource()) == []
    import checkpoint_engine.ps as ps
    from checkpoint_engine.p2p_store import P2PStore as Theirs

    from nixl_tent.checkpoint import p2p_store

    ours = p2p_store.P2PStore
    for name, method in inspect.getmembers(Theirs, inspect.isfunction):
        if not name.startswith("__"):
            assert list(inspect.signature(method).parameters) == list(
                inspect.signature(getattr(ours, name)).parameters
            )
    used = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(ps.ParameterServer)))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "_p2p_store"
    }
    assigned = {
        node.attr for node in ast.walk(ast.parse(inspect.getsource(ours))) if isinstance(node, ast.Attribute)
    }
    assert (
        {"register_named_tensors", "batch_transfer_sync_read", "addr", "device"}
        <= used
        <= assigned | set(dir(ours))
    )
    p2p_store.use()
    assert ps.P2PStore is ours


def test_verl_has_everything_that_the_engine_uses() -> None:
    pytest.importorskip("verl.checkpoint_engine", reason="pip install verl")
    assert missing(compat.VERL_HOOKS, LiveSource()) == []


def test_the_first_trainer_leads_a_line_of_all_rollout_workers() -> None:
    pytest.importorskip("verl.checkpoint_engine", reason="pip install verl")
    from nixl_tent.checkpoint.verl import TentCheckpointEngine

    places: Any = ["trainer 0", "trainer 1", "worker 0", "worker 1", "worker 2"]
    trainers, workers = TentCheckpointEngine.build_topology(2, 3, places)
    assert trainers == {"rank": [0, -1], "before": [None, None], "after": ["worker 0", None]}
    assert workers == {
        "rank": [1, 2, 3],
        "before": ["trainer 0", "worker 0", "worker 1"],
        "after": ["worker 1", "worker 2", None],
    }
