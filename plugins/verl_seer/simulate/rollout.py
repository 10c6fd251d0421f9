"""A discrete-event simulation of one rollout, which drives the real scheduler, draft budgets and load balancers.

Two families of policies. `Whole` hands each request (or, as old verl did, each group) to an instance at the start,
whose own queue then admits and preempts as vLLM does: a running batch that outgrows the KV memory loses its latest
request, which is computed again later. `Divided` lets `verl_seer.Scheduler` place chunks.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from verl_seer.scheduler import Scheduler, SchedulerConfig
from verl_seer.simulate import drafts
from verl_seer.simulate.balancers import Balancer, LeastInFlight
from verl_seer.simulate.drafts import Drafting, GroupProgress
from verl_seer.simulate.engine import Engine
from verl_seer.simulate.workload import Cluster, Sample
from verl_seer.state import Instance, Request

TAIL_SHARE = 0.1  # the last tenth of the requests to finish, as in the paper
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Whole:
    """Requests stay where they start.

    Args:
        unit: what the router hands out: ``request`` through `balancer`, ``group`` round-robin.
        order: of the instance's queue and of its victims: ``arrival`` or ``priority`` (the sample's index, as verl's
            older trainer sets it).
        balancer: makes the load balancer from the servers' ids and a seed.
        drafting: speculative decoding, or None.
    """

    unit: Literal["request", "group"] = "request"
    order: Literal["arrival", "priority"] = "arrival"
    balancer: Callable[[Sequence[str], int], Balancer] = LeastInFlight
    drafting: Drafting | None = None


@dataclass(frozen=True)
class Divided:
    """Chunks placed by `verl_seer.Scheduler`, KV kept in a global pool between them."""

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    drafting: Drafting | None = None


Policy = Whole | Divided


@dataclass
class Outcome:
    """What a simulated rollout came to. Times in seconds, sizes in tokens.

    `tail` is the time in which the last tenth of the requests finishes. `occupancy` has, for each instance, rows of
    (time, running requests, share of KV memory in use) at its events; it is sampled in `to_json`.
    """

    makespan: float
    output_tokens: int
    tail: float
    preemptions: int
    recomputed_tokens: int
    chunks: int
    moved_chunks: int
    transferred_tokens: int
    transfer_seconds: float
    idle_share: float
    kv_use: float
    accepted_length: float | None
    finish_times: np.ndarray
    occupancy: list[list[tuple[float, int, float]]]

    @property
    def throughput(self) -> float:
        """Output tokens per second."""
        return self.output_tokens / self.makespan

    def figures(self) -> dict[str, float | int | None]:
        """The scalar results."""
        names = (
            "makespan", "output_tokens", "tail", "preemptions", "recomputed_tokens", "chunks", "moved_chunks",
            "transferred_tokens", "transfer_seconds", "idle_share", "kv_use", "accepted_length",
        )  # fmt: skip
        out = {name: getattr(self, name) for name in names}
        out["throughput"] = self.throughput
        return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in out.items()}

    def to_json(self, columns: int = 160) -> dict[str, object]:
        """The scalar results, finish times at 101 quantiles, and occupancy at `columns` times."""
        times = np.linspace(0, self.makespan, columns, endpoint=False) + self.makespan / columns / 2
        running, kv = [], []
        for rows in self.occupancy:
            at = np.searchsorted([r[0] for r in rows], times, side="right") - 1
            running.append([rows[i][1] for i in at])
            kv.append([round(rows[i][2], 4) for i in at])
        quantiles = np.quantile(self.finish_times, np.linspace(0, 1, 101))
        return {
            **self.figures(),
            "finish_quantiles": [round(float(t), 2) for t in quantiles],
            "running": running,
            "kv": kv,
        }


def simulate(
    samples: Sequence[Sample],
    cluster: Cluster,
    policy: Policy,
    seed: int = 0,
    progress: Progress | None = None,
) -> Outcome:
    """One rollout of `samples` on `cluster`. Deterministic. `progress(finished, total)` is called now and then."""
    if not samples:
        raise ValueError("samples must not be empty")
    largest = max(s.prompt_tokens + s.tokens for s in samples)
    if largest > cluster.kv_capacity:
        raise ValueError(
            f"kv_capacity must hold the longest request with its prompt ({largest} tokens), got {cluster.kv_capacity}"
        )
    if isinstance(policy, Divided):
        return _DividedRun(samples, cluster, policy, progress).run()
    return _WholeRun(samples, cluster, policy, seed, progress).run()


class _Run:
    """The event loop and the books; subclasses decide what runs where."""

    def __init__(
        self,
        samples: Sequence[Sample],
        cluster: Cluster,
        policy: Policy,
        progress: Progress | None,
    ) -> None:
        self.samples, self.cluster, self.drafting = samples, cluster, policy.drafting
        self.engines = [Engine(i, cluster) for i in range(cluster.instances)]
        self.now = 0.0
        self.generated = [0] * len(samples)
        self.finish_times = np.full(len(samples), np.nan)
        self.unfinished = len(samples)
        self.preemptions = self.recomputed = self.chunks = self.moved = 0
        self.transferred, self.transfer_seconds = 0, 0.0
        self._progress = progress
        self._members = defaultdict(list)
        for i, sample in enumerate(samples):
            self._members[sample.group].append(i)
        self.group = GroupProgress(self._sibling_table()) if self.drafting else None
        self._changed: set[int] = set()
        self._handed_over: list[tuple[float, int]] = []  # heap of (time, request): chunks on their way to the router

    def _sibling_table(self) -> np.ndarray:
        most = max(len(m) for m in self._members.values())
        table = np.full((len(self.samples), most - 1 or 1), -1)
        for members in self._members.values():
            for i in members:
                others = [j for j in members if j != i]
                table[i, : len(others)] = others
        return table

    # -- for subclasses ------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Places the first requests."""
        raise NotImplementedError

    def chunk_ended(self, engine: Engine, request: int) -> None:
        """The request has produced what `start` was told; it has left the engine."""
        raise NotImplementedError

    def settle(self, engine: Engine) -> None:
        """After the endings of an event: fill the room."""
        raise NotImplementedError

    def heard(self, request: int) -> None:
        """The router hears of a chunk's end, `Cluster.handover` after it."""
        raise NotImplementedError

    def probes(self, engine: Engine) -> np.ndarray:
        """Mask of the engine's requests that draft with high priority."""
        return np.zeros(engine.running, bool)

    def start(self, engine: Engine, request: int, tokens: int, stall: float) -> None:
        """The request goes on for `tokens` tokens on the engine, which first spends `stall` seconds on its KV."""
        if engine.time < self.now:
            engine.advance(self.now)
        context = self.samples[request].prompt_tokens + self.generated[request]
        engine.add(request, tokens, context, stall)
        self.target[request] = self.generated[request] + tokens
        if self.group is not None:
            self.group.place[request] = engine.index
        self._changed.add(engine.index)

    def evict(self, engine: Engine, at: int) -> int:
        """Takes the request at position `at` off the engine; its tokens stay, its KV does not."""
        request = int(engine.ids[at])
        self.generated[request] = int(self.target[request] - np.ceil(engine.left[at] - 1e-6))
        keep = np.ones(engine.running, bool)
        keep[at] = False
        engine.remove(keep)
        self.preemptions += 1
        return request

    # -- the loop ------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        self.target = [0] * len(self.samples)
        events: list[tuple[float, int, int]] = []
        version = [0] * len(self.engines)
        most = drafts.REFRESH_STEPS if self.drafting else float("inf")
        self.begin()
        while True:
            for index in sorted(self._changed):
                engine = self.engines[index]
                if engine.running and self.drafting and self.group:
                    drafts.plan(engine, self.probes(engine), self.group, self.drafting)
                engine.note()
                version[index] += 1
                time = engine.next_event(most)
                if time < float("inf"):
                    heapq.heappush(events, (time, index, version[index]))
            self._changed.clear()
            if not self.unfinished:
                return self._outcome()
            while events and version[events[0][1]] != events[0][2]:
                heapq.heappop(events)
            if self._handed_over and (not events or self._handed_over[0][0] <= events[0][0]):
                self.now, request = heapq.heappop(self._handed_over)
                self.heard(request)
                continue
            if not events:
                raise RuntimeError(f"the policy left {self.unfinished} requests without an instance")
            self.now, index, _ = heapq.heappop(events)
            self._event(self.engines[index])

    def _event(self, engine: Engine) -> None:
        engine.advance(self.now)
        self._changed.add(engine.index)
        ended = engine.ended()
        requests = engine.ids[ended].tolist()
        if self.group is not None:
            targets = np.array([self.target[i] for i in engine.ids.tolist()])
            self.group.generated[engine.ids] = targets - engine.left
        if requests:
            engine.remove(~ended)
        for request in requests:
            self.generated[request] = self.target[request]
            if self.generated[request] == self.samples[request].tokens:
                self.finish_times[request] = self.now
                self.unfinished -= 1
                if self._progress and self.unfinished % 64 == 0:
                    self._progress(len(self.samples) - self.unfinished, len(self.samples))
            self.chunk_ended(engine, request)
        self.settle(engine)

    def _outcome(self) -> Outcome:
        for engine in self.engines:
            if engine.time < self.now:
                engine.advance(self.now)
        finish = np.sort(self.finish_times)
        first_of_tail = int(np.ceil(len(finish) * (1 - TAIL_SHARE))) - 1
        capacity = self.cluster.kv_capacity
        slots = self.now * len(self.engines)
        drafted = sum(e.request_steps for e in self.engines)
        return Outcome(
            makespan=self.now,
            output_tokens=sum(s.tokens for s in self.samples),
            tail=float(finish[-1] - finish[max(first_of_tail, 0)]),
            preemptions=self.preemptions,
            recomputed_tokens=self.recomputed,
            chunks=self.chunks,
            moved_chunks=self.moved,
            transferred_tokens=self.transferred,
            transfer_seconds=self.transfer_seconds,
            idle_share=1 - sum(e.busy for e in self.engines) / slots,
            kv_use=sum(e.kv_seconds for e in self.engines) / (slots * capacity),
            accepted_length=sum(e.drafted_progress for e in self.engines) / drafted if drafted else None,
            finish_times=finish,
            occupancy=[[(t, n, kv / capacity) for t, n, kv in e.history] for e in self.engines],
        )


class _WholeRun(_Run):
    def __init__(
        self, samples: Sequence[Sample], cluster: Cluster, policy: Whole, seed: int, progress: Progress | None
    ) -> None:
        super().__init__(samples, cluster, policy, progress)
        self.policy = policy
        self.queues: list[deque[int]] = [deque() for _ in self.engines]
        self.server_of: dict[int, str] = {}
        self.balancer = policy.balancer([str(e.index) for e in self.engines], seed)
        self._evicted: set[int] = set()

    def begin(self) -> None:
        for number, members in enumerate(self._members.values()):
            for request in members:
                if self.policy.unit == "group":
                    index = number % len(self.engines)
                else:
                    self.server_of[request], _ = self.balancer.acquire_server(str(request))
                    index = int(self.server_of[request])
                self.queues[index].append(request)
        for engine in self.engines:
            self._admit(engine)

    def chunk_ended(self, engine: Engine, request: int) -> None:
        if request in self.server_of:
            self.balancer.release_server(self.server_of.pop(request), str(request))

    def settle(self, engine: Engine) -> None:
        if engine.full and engine.running > 1:
            at = engine.running - 1 if self.policy.order == "arrival" else int(engine.ids.argmax())
            request = self.evict(engine, at)
            self._evicted.add(request)
            self._return(engine, request)
        self._admit(engine)

    def _return(self, engine: Engine, request: int) -> None:
        """A preempted request waits before all that have not started, or by its priority among all."""
        queue = self.queues[engine.index]
        if self.policy.order == "arrival":
            queue.appendleft(request)
            return
        at = 0
        while at < len(queue) and queue[at] < request:
            at += 1
        queue.insert(at, request)

    def _admit(self, engine: Engine) -> None:
        queue = self.queues[engine.index]
        while queue and engine.running < self.cluster.max_running:
            request = queue[0]
            context = self.samples[request].prompt_tokens + self.generated[request]
            # The running requests' next step must fit as well, or the new one would be preempted at once.
            step = float(engine.rate.sum()) + 1
            if engine.running and engine.kv + context + step > self.cluster.kv_capacity:
                return
            queue.popleft()
            if request in self._evicted:
                self._evicted.remove(request)
                self.recomputed += context
            left = self.samples[request].tokens - self.generated[request]
            self.chunks += 1
            self.start(engine, request, left, context / self.cluster.costs.prefill_rate)


class _DividedRun(_Run):
    def __init__(
        self,
        samples: Sequence[Sample],
        cluster: Cluster,
        policy: Divided,
        progress: Progress | None,
    ) -> None:
        super().__init__(samples, cluster, policy, progress)
        oracle = (lambda r: samples[int(r)].tokens) if policy.scheduler.order == "oracle" else None
        instances = [Instance(str(e.index), cluster.kv_capacity, cluster.max_running) for e in self.engines]
        self.scheduler = Scheduler(policy.scheduler, instances, oracle)
        self._is_probe = np.zeros(len(samples), bool)
        self._ended_at = np.full(len(samples), -1.0)

    def begin(self) -> None:
        for i, sample in enumerate(self.samples):
            request = Request(str(i), sample.group, sample.prompt_tokens, sample.max_tokens)
            self.scheduler.add(request)
            self._is_probe[i] = request.probe
        self._place()

    def probes(self, engine: Engine) -> np.ndarray:
        return self._is_probe[engine.ids]

    def chunk_ended(self, engine: Engine, request: int) -> None:
        if self.cluster.handover > 0:
            heapq.heappush(self._handed_over, (self.now + self.cluster.handover, request))
        else:
            self._completed(request)

    def heard(self, request: int) -> None:
        self._completed(request)
        self._place()

    def _completed(self, request: int) -> None:
        before = self.scheduler.request(str(request)).generated
        finished = self.generated[request] == self.samples[request].tokens
        self.scheduler.completed(str(request), self.generated[request] - before, finished)
        self._ended_at[request] = self.now

    def settle(self, engine: Engine) -> None:
        self._place()

    def _place(self) -> None:
        costs = self.cluster.costs
        while (assignment := self.scheduler.next_assignment()) is not None:
            request = int(assignment.request_id)
            sample = self.samples[request]
            context = sample.prompt_tokens + self.generated[request]
            self.chunks += 1
            stall = 0.0
            if assignment.previous_instance_id is None:
                stall = sample.prompt_tokens / costs.prefill_rate
            elif (
                assignment.previous_instance_id != assignment.instance_id
                or self._ended_at[request] < self.now
            ):
                # Its KV has left the instance, or may have while it waited: it comes from the pool.
                self.moved += assignment.previous_instance_id != assignment.instance_id
                self.transferred += context
                stall = context / costs.transfer_rate
                self.transfer_seconds += stall
            left = min(assignment.max_tokens, sample.tokens - self.generated[request])
            self.start(self.engines[int(assignment.instance_id)], request, left, stall)
