"""Seer's request buffer as a verl router: it decides which chunk runs next, and where.

verl makes one actor of this class (`rollout.RouterActor`, which ``config/router.yaml`` names). Seer's clients ask it
chunk by chunk (`open_request`, `next_chunk`, `chunk_done`); any other client of verl uses the plain methods of verl's
router protocol and gets the server with the fewest requests in flight. All methods run on the actor's one event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl_seer.live import StatusFile
from verl_seer.scheduler import Scheduler, SchedulerConfig
from verl_seer.state import Instance, Request

logger = logging.getLogger("verl.seer")

RESTART_SECONDS = 1800.0  # longer than any engine takes to load its model


@dataclass(frozen=True)
class Grant:
    """One chunk that a client may run now.

    `server` is verl's handle of `server_id`; `probe` as in `Request`, `priority` as in `Assignment`.
    """

    server_id: str
    server: Any
    max_tokens: int
    probe: bool
    priority: int


@dataclass
class Counts:
    """What happened since the buffer was last empty."""

    requests: int = 0
    chunks: int = 0
    moved: int = 0
    lost: int = 0
    tokens: int = 0
    recomputed: int = 0


class SeerRouter:
    """verl's router protocol around `verl_seer.Scheduler`.

    Args:
        servers: server id -> handle, as verl passes it.
        yaml_config: the content of the YAML file that names this class; it takes no other key.

    Raises:
        ValueError: the YAML has keys that nothing reads.
    """

    def __init__(self, servers: Mapping[str, Any], yaml_config: Mapping[str, Any] | None = None) -> None:
        unknown = sorted(set(yaml_config or {}) - {"router_class"})
        if unknown:
            raise ValueError(
                f"router YAML has unknown keys {unknown}: Seer's options go under `seer` of verl's config"
            )
        self._servers: dict[str, Any] = dict(servers)
        self._plain: dict[str, int] = dict.fromkeys(servers, 0)
        self._sticky: dict[str, str] = {}
        self._config = SchedulerConfig()
        self._capacity: dict[str, tuple[int, int]] = {}
        self._scheduler = Scheduler(self._config)
        self._grants: dict[str, asyncio.Future[Grant]] = {}
        self._cancelled: set[str] = set()
        self._restarts: set[asyncio.Task[None]] = set()
        self._restarted: dict[str, Any] = {}
        self._counts = Counts()
        self._last = Counts()
        self._status: StatusFile | None = None

    # -- Seer ----------------------------------------------------------------------------------------------

    async def configure(self, options: Mapping[str, Any], capacity: Mapping[str, tuple[int, int]]) -> None:
        """Options of the scheduler, and server id -> (KV tokens, most requests at once).

        Raises:
            ValueError: a bad option, a server without a capacity, or requests are in the buffer already.
        """
        if self._scheduler.unfinished:
            raise ValueError(f"configure must come before any request: {self._scheduler.unfinished} are open")
        absent = sorted(set(self._servers) - set(capacity))
        if absent:
            raise ValueError(f"capacity lacks the servers {absent}: give every server's KV tokens")
        self._config = SchedulerConfig(**options)
        self._capacity = dict(capacity)
        self._status = self._status or StatusFile()
        self._renew()

    async def open_request(self, request_id: str, group_id: str, prompt_tokens: int, max_tokens: int) -> None:
        """Puts a request into the buffer.

        Raises:
            ValueError: the id was used before, or no server could ever hold the request.
            RuntimeError: there are no servers.
        """
        self._need_instances()
        largest = max(x.kv_capacity for x in self._scheduler.instances())
        if prompt_tokens + max_tokens > largest:
            raise ValueError(
                f"request {request_id!r} may grow to {prompt_tokens + max_tokens} tokens, the largest server holds "
                f"{largest}: lower data.max_response_length or give the servers more KV memory"
            )
        self._scheduler.add(Request(request_id, group_id, prompt_tokens, max_tokens))
        self._grants[request_id] = asyncio.get_running_loop().create_future()
        self._counts.requests += 1
        self._dispatch()

    async def next_chunk(self, request_id: str) -> Grant:
        """Waits until it is this request's turn. After a lost server this is the same chunk once more.

        Raises:
            RuntimeError: the last server is gone.
        """
        self._need_instances()
        if request_id not in self._grants:
            raise ValueError(f"request_id {request_id!r} is not open: open_request comes first")
        return await asyncio.shield(self._grants[request_id])

    async def chunk_done(
        self, request_id: str, server_id: str, new_tokens: int, finished: bool, recomputed: int = 0
    ) -> bool:
        """A chunk has ended. False: it was given away since, because its server was removed; drop its tokens.

        `recomputed` are tokens of the prompt and of earlier chunks that were computed once more for this one.
        """
        grant = self._grants.get(request_id)
        if grant is None or not grant.done() or grant.result().server_id != server_id:
            return False
        self._grants[request_id] = asyncio.get_running_loop().create_future()
        self._scheduler.completed(request_id, new_tokens, finished)
        self._counts.chunks += 1
        self._counts.tokens += new_tokens
        self._counts.recomputed += recomputed
        request = self._scheduler.request(request_id)
        if finished or request.generated == request.max_tokens:
            del self._grants[request_id]
        self._dispatch()
        return True

    async def close_request(self, request_id: str) -> None:
        """The client has given up on a request, in whatever state it is. Unknown ids are ignored."""
        grant = self._grants.get(request_id)
        if grant is None:
            return
        if grant.done():
            self._finish(request_id)
        else:
            self._cancelled.add(request_id)
        self._dispatch()

    async def server_lost(self, server_id: str) -> None:
        """A server has died: its chunks go back to the buffer as they were, and it is started again.

        The second report changes nothing.
        """
        if server_id in self._servers:
            logger.error("Seer: server %s is lost, its chunks run elsewhere", server_id)
            restart = asyncio.create_task(self._restart(server_id, self._servers[server_id]))
            self._restarts.add(restart)
            restart.add_done_callback(self._restarts.discard)
            self.remove_servers([server_id])

    async def restarts(self) -> None:
        """Returns once no server is being started again.

        Who lost a chunk waits for this before it hands over its response: the rollout ends with it, and verl's
        weight update, which follows, waits without an end for a server that does not run.
        """
        while self._restarts:
            await asyncio.wait(self._restarts)

    def restarted(self) -> dict[str, Any]:
        """Server id -> handle of those that run again but have not got the weights yet, or were not told of here.

        Their engines hold what they loaded at their start, so they get no chunk before `add_servers`.
        """
        return dict(self._restarted)

    async def _restart(self, server_id: str, handle: Any) -> None:
        try:
            await handle.set_global_steps.remote(None)  # a weight update sets it: see `rollout`
            await asyncio.wait_for(handle.launch_server.remote(), RESTART_SECONDS)
        except Exception as error:
            logger.error(
                "Seer: server %s cannot be started again (%s). verl's next weight update waits for it without an end: "
                "stop the run and resume from its last checkpoint",
                server_id,
                (str(error) or type(error).__name__).strip().splitlines()[-1],
            )
            return
        self._restarted[server_id] = handle
        print(f"Seer: server {server_id} runs again and takes part once it has new weights", flush=True)

    def handles(self) -> dict[str, Any]:
        """Server id -> handle."""
        return dict(self._servers)

    def last_rollout(self) -> dict[str, int]:
        """Requests, chunks, chunks that moved to another server, lost chunks, tokens and recomputed tokens of the
        last full rollout."""
        return dict(vars(self._last))

    def _need_instances(self) -> None:
        if not self._servers:
            raise RuntimeError("No available servers in load balancer")
        if not self._capacity:
            raise RuntimeError(
                "the Seer router has no options yet: set agent.agent_loop_manager_class to "
                "verl_seer.rollout.SeerAgentLoopManager, which configures it"
            )

    def _dispatch(self) -> None:
        """Grants as many chunks as there is room for."""
        while True:
            try:
                assignment = self._scheduler.next_assignment()
            except ValueError as error:  # no server left that could hold the request
                self._fail(error)
                return
            if assignment is None:
                break
            request_id, server_id = assignment.request_id, assignment.instance_id
            probe = self._scheduler.request(request_id).probe
            grant = Grant(
                server_id, self._servers[server_id], assignment.max_tokens, probe, assignment.priority
            )
            self._grants[request_id].set_result(grant)
            if request_id in self._cancelled:
                self._finish(request_id)
                continue
            previous = assignment.previous_instance_id
            self._counts.moved += previous is not None and previous != server_id
        ended = not self._scheduler.unfinished and self._counts.requests > 0
        if self._status is not None:
            self._status.update(self._scheduler, vars(self._counts), ended)
        if ended:
            # An actor's output, unlike its logger, reaches the training log.
            print("Seer: " + ", ".join(f"{n} {name}" for name, n in vars(self._counts).items()), flush=True)
            self._last, self._counts = self._counts, Counts()
            self._renew()

    def _finish(self, request_id: str) -> None:
        self._scheduler.completed(request_id, 0, True)
        self._cancelled.discard(request_id)
        del self._grants[request_id]

    def _fail(self, error: Exception) -> None:
        """Nothing can run any more: everyone who waits is told, and the buffer starts anew."""
        for grant in self._grants.values():
            if not grant.done():
                grant.set_exception(error)
                grant.exception()  # it may be that nobody waits for it
        self._grants.clear()
        self._cancelled.clear()
        self._counts = Counts()
        self._renew()

    def _renew(self) -> None:
        """A new scheduler, so that it does not remember every request of a training run."""
        self._scheduler = Scheduler(
            self._config, [Instance(s, *self._capacity[s]) for s in self._servers if s in self._capacity]
        )

    # -- verl's protocol -----------------------------------------------------------------------------------

    def acquire_server(self, request_id: str) -> tuple[str, Any]:
        """For clients without Seer: the server of the request's earlier turns, else the one with least in flight."""
        if not self._servers:
            raise RuntimeError("No available servers in load balancer")
        server_id = self._sticky.get(request_id)
        if server_id not in self._servers:
            load = self._load()
            server_id = min(load, key=lambda s: load[s])
            self._sticky[request_id] = server_id
        self._plain[server_id] += 1
        return server_id, self._servers[server_id]

    def release_server(self, server_id: str, request_id: str | None = None) -> None:
        """The counterpart of `acquire_server`; a server that is gone is ignored."""
        if self._plain.get(server_id, 0) > 0:
            self._plain[server_id] -= 1

    def require_acquire_fields(self) -> list[str]:
        """None: chunks are asked for by other methods."""
        return []

    def require_release_fields(self) -> list[str]:
        """None."""
        return []

    def add_servers(self, servers: Mapping[str, Any]) -> None:
        """New servers get the capacity of the smallest known one."""
        for server_id, handle in servers.items():
            self._restarted.pop(server_id, None)
            fresh = server_id not in self._servers
            self._servers[server_id] = handle
            self._plain.setdefault(server_id, 0)
            if fresh and self._capacity:
                self._capacity.setdefault(server_id, min(self._capacity.values()))
                self._scheduler.add_instance(Instance(server_id, *self._capacity[server_id]))
        self._dispatch()

    def remove_servers(self, server_ids: Sequence[str]) -> None:
        """Their chunks go back to the buffer; if no server is left, those who wait get an error."""
        known = {x.instance_id for x in self._scheduler.instances()}
        for server_id in server_ids:
            self._servers.pop(server_id, None)
            self._plain.pop(server_id, None)
            if server_id not in known:
                continue
            for request_id in self._scheduler.remove_instance(server_id):
                self._counts.lost += 1
                self._grants[request_id] = asyncio.get_running_loop().create_future()
        if not self._servers and self._scheduler.unfinished:
            self._fail(RuntimeError("No available servers in load balancer: the last one was lost"))
        else:
            self._dispatch()

    def get_all_servers(self) -> list[str]:
        """Ids of all servers."""
        return list(self._servers)

    def get_inflight_count(self, server_id: str) -> int:
        """Requests and chunks that run on a server."""
        return self._load().get(server_id, 0)

    def get_total_inflight(self) -> int:
        """Requests and chunks that run on all servers."""
        return sum(self._load().values())

    def get_status(self) -> dict[str, Any]:
        """What runs where, and how many requests wait in the buffer."""
        load = self._load()
        return {
            "servers": load,
            "total_inflight": sum(load.values()),
            "active_servers": len(load),
            "waiting": self._scheduler.waiting,
            "last_rollout": self.last_rollout(),
        }

    def clear_sticky_cache(self) -> dict[str, Any]:
        """Forgets which server had the earlier turns of plain requests."""
        cleared = len(self._sticky)
        self._sticky.clear()
        return {"cleared_entries": cleared, "server_loads": self._load()}

    def _load(self) -> dict[str, int]:
        chunks = {x.instance_id: len(x.running) for x in self._scheduler.instances()}
        return {s: n + chunks.get(s, 0) for s, n in self._plain.items()}
