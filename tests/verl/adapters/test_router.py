"""The request buffer as verl's router: order, loss of a server, cancelled requests, verl's own protocol."""

from __future__ import annotations

import asyncio
import random

import pytest

from verl_seer.options import SeerOptions
from verl_seer.router import SeerRouter

BIG = (10_000, 8)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 30))


async def router(servers=("a", "b"), capacity=BIG, **options):
    r = SeerRouter({s: f"handle {s}" for s in servers}, {"router_class": "x"})
    await r.configure({"chunk_size": 8, **options}, dict.fromkeys(servers, capacity))
    return r


async def respond(r, request_id, group, length, limit, log, lose=None):
    """A client: asks for chunks until `length` tokens are there. Reports the server `lose` as lost when it is met."""
    await r.open_request(request_id, group, 4, limit)
    got = 0
    while True:
        grant = await r.next_chunk(request_id)
        await asyncio.sleep(random.random() / 1000)
        if lose is not None and grant.server_id in lose:
            await r.server_lost(grant.server_id)
            continue
        new = min(grant.max_tokens, length - got)
        finished = got + new == length
        if not await r.chunk_done(request_id, grant.server_id, new, finished):
            continue
        got += new
        log.append((request_id, grant.server_id, new))
        if finished or got == limit:
            return got


@pytest.mark.parametrize("lose", [None, {"b"}])
def test_every_request_gets_its_tokens_once(lose):
    """40 requests of 5 groups over three servers, one of which may die with whatever runs on it."""
    random.seed(0)
    lengths = {f"g{g}:{i}": 1 + (7 * g + 13 * i) % 50 for g in range(5) for i in range(8)}

    async def rollout():
        r = await router(("a", "b", "c"), capacity=(400, 4))
        log = []
        got = await asyncio.gather(*(respond(r, k, k[:2], n, 60, log, lose) for k, n in lengths.items()))
        return got, log, r

    got, log, r = run(rollout())
    assert got == list(lengths.values())
    for request_id, length in lengths.items():
        assert sum(new for who, _, new in log if who == request_id) == length
    counts = r.last_rollout()
    assert counts["requests"] == 40 and counts["tokens"] == sum(lengths.values())
    assert counts["chunks"] == len(log) == sum(-(-n // 8) for n in lengths.values())
    assert (counts["lost"] > 0) == (lose is not None)
    assert r.get_total_inflight() == 0 and r.get_status()["waiting"] == 0
    assert sorted(r.get_all_servers()) == (["a", "c"] if lose else ["a", "b", "c"])


def test_a_server_takes_no_more_than_it_holds():
    async def rollout():
        r = await router(("a",), capacity=(30, 8))
        for i in range(4):
            await r.open_request(str(i), "g", 4, 20)
        return r.get_inflight_count("a"), r.get_status()["waiting"]

    assert run(rollout()) == (2, 2)  # 12 KV tokens for each chunk


def test_a_given_up_request_leaves_its_place_whether_it_runs_or_waits():
    async def rollout():
        r = await router(("a",), capacity=(30, 1))
        for i in range(3):
            await r.open_request(str(i), "g", 4, 20)
        await r.close_request("0")  # runs
        assert r.get_inflight_count("a") == 1
        await r.close_request("2")  # waits
        await r.close_request("never seen")
        for _ in range(3):
            grant = await r.next_chunk("1")
            done = await r.chunk_done("1", grant.server_id, grant.max_tokens, False)
        return done, r.get_total_inflight(), r.get_status()["waiting"]

    assert run(rollout()) == (True, 0, 0)


def test_a_chunk_of_a_removed_server_is_dropped_and_granted_again():
    async def rollout():
        r = await router()
        await r.open_request("x", "g", 4, 8)
        first = await r.next_chunk("x")
        r.remove_servers([first.server_id])
        second = await r.next_chunk("x")
        late = await r.chunk_done("x", first.server_id, 8, True)
        kept = await r.chunk_done("x", second.server_id, 8, True)
        again = await r.chunk_done("x", second.server_id, 8, True)
        return first.server_id != second.server_id, late, kept, again, r.last_rollout()["tokens"]

    assert run(rollout()) == (True, False, True, False, 8)


def test_without_servers_those_who_wait_are_told():
    async def rollout():
        r = await router(("a",), capacity=(30, 1))
        await r.open_request("x", "g", 4, 8)
        await r.open_request("y", "g", 4, 8)
        waiting = asyncio.create_task(r.next_chunk("y"))
        await asyncio.sleep(0)
        await r.server_lost("a")
        await r.server_lost("a")
        with pytest.raises(RuntimeError, match="No available servers"):
            await waiting
        with pytest.raises(RuntimeError, match="No available servers"):
            await r.next_chunk("x")
        with pytest.raises(RuntimeError, match="No available servers"):
            r.acquire_server("z")

    run(rollout())


def test_a_server_can_be_added():
    async def rollout():
        r = await router(("a",), capacity=(30, 1))
        await r.open_request("x", "g", 4, 8)
        await r.open_request("y", "g", 4, 8)
        r.add_servers({"n": "handle n"})
        grant = await asyncio.wait_for(r.next_chunk("y"), 1)
        return grant.server_id, grant.server

    assert run(rollout()) == ("n", "handle n")


def test_clients_without_seer_share_the_servers():
    """Least in flight, chunks counted; later turns return to their server."""

    async def rollout():
        r = await router()
        await r.open_request("x", "g", 4, 8)
        busy = (await r.next_chunk("x")).server_id
        idle = "b" if busy == "a" else "a"
        assert r.acquire_server("p") == (idle, f"handle {idle}")
        r.release_server(idle, "p")
        r.release_server("gone")
        for _ in range(3):
            assert r.acquire_server("p")[0] == idle
        assert r.get_total_inflight() == 4
        assert r.clear_sticky_cache()["cleared_entries"] == 1
        return r.acquire_server("p")[0] == busy

    assert run(rollout())


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"unknown keys \['chunk'\]"):
        SeerRouter({}, {"router_class": "x", "chunk": 3})

    async def rollout():
        bare = SeerRouter({"a": 1})
        with pytest.raises(RuntimeError, match="no options yet"):
            await bare.open_request("x", "g", 4, 8)
        with pytest.raises(ValueError, match=r"capacity lacks the servers \['a'\]"):
            await bare.configure({}, {})
        r = await router(capacity=(20, 1))
        with pytest.raises(ValueError, match="may grow to 24 tokens, the largest server holds 20"):
            await r.open_request("x", "g", 4, 20)
        with pytest.raises(ValueError, match="'x' is not open"):
            await r.next_chunk("x")
        await r.open_request("y", "g", 4, 8)
        with pytest.raises(ValueError, match="before any request: 1 are open"):
            await r.configure({}, {"a": BIG, "b": BIG})

    run(rollout())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"chunks": 3}, r"unknown options \['chunks'\]"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"chunk_size": "8k"}, "seer.chunk_size must be an integer, got '8k'"),
        ({"kv_tokens": 0}, "seer.kv_tokens must be null or an integer of at least 1, got 0"),
        ({"max_running": True}, "seer.max_running must be null or an integer"),
        ({"order": "oracle"}, "only a simulation knows the lengths"),
        ({"order": "best"}, "order must be one of"),
    ],
)
def test_bad_options_are_named(given, said):
    with pytest.raises(ValueError, match=said):
        SeerOptions.of({"seer": given})


def test_options_have_defaults():
    assert SeerOptions.of({}) == SeerOptions()
    assert SeerOptions.of({"seer": {"chunk_size": 64}}).scheduler()["chunk_size"] == 64


class Engine:
    """What a router needs of a server that starts again, and when it may."""

    def __init__(self, fails: bool = False) -> None:
        self.gate, self.fails, self.calls = asyncio.Event(), fails, []
        self.launch_server = self.set_global_steps = self

    def remote(self, *args):
        self.calls.append(args)
        return self._launch() if not args else asyncio.sleep(0)

    async def _launch(self):
        await self.gate.wait()
        if self.fails:
            raise OSError("no memory")


@pytest.mark.parametrize("fails", [False, True])
def test_a_lost_server_starts_again_but_gets_no_chunk_before_it_is_added(fails, caplog):
    async def rollout():
        engine = Engine(fails)
        r = SeerRouter({"a": engine, "b": "handle b"}, {"router_class": "x"})
        await r.configure({"chunk_size": 8}, {"a": BIG, "b": BIG})
        await r.server_lost("a")
        await r.server_lost("a")
        waiting = asyncio.create_task(r.restarts())
        await asyncio.sleep(0.01)
        assert not waiting.done() and r.restarted() == {}
        engine.gate.set()
        await waiting
        assert engine.calls == [(None,), ()], "its weights are unknown, then it starts, both once"
        assert r.get_all_servers() == ["b"]
        log: list[tuple[str, str, int]] = []
        assert await respond(r, "x", "g", 20, 20, log) == 20
        assert {server for _, server, _ in log} == {"b"}
        if fails:
            assert r.restarted() == {}
            assert "cannot be started again (no memory)" in caplog.text
            return
        assert r.restarted() == {"a": engine}
        r.add_servers(r.restarted())
        assert r.restarted() == {}
        await asyncio.gather(*(respond(r, f"y{i}", f"h{i}", 20, 20, log) for i in range(4)))
        assert {server for _, server, _ in log} == {"a", "b"}

    run(rollout())


def test_restarts_ends_at_once_where_nothing_was_lost():
    async def rollout():
        await (await router()).restarts()

    run(rollout())
