"""Divided rollout with context-aware scheduling (Seer, Algorithm 2).

Groups are split into requests and requests into chunks. Each decision takes one waiting request, the number of
tokens of its next chunk, and an instance with room for it. The order of requests:

1. One request of every group is its probe. Probes go first, least generated first, so that short ones end early
   and tell about their group.
2. Then the others, longest first by their group's estimate (`context.LengthContext`).
3. Every `fairness_period`-th decision takes the request that has waited longest instead. The paper says that
   such a rule exists, not which; this one bounds the wait: with m requests in the buffer before it, a
   request is taken within `fairness_period * (m + 1)` decisions.

A decision is deterministic: ties go to the request that was added or returned first.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from verl_seer.context import ESTIMATES, ORDERS, Estimate, LengthContext, Order, TrueLength
from verl_seer.state import Assignment, Instance, Request, Status

PROBES_FIRST = 1 << 31  # more than any response has tokens, and `LengthContext` estimates no more than its limit


@dataclass(frozen=True)
class SchedulerConfig:
    """Options of the scheduler.

    Args:
        chunk_size: most tokens of one chunk. The paper's deployments use about 8192.
        order: ``context`` is Algorithm 2; ``arrival`` is first come, first served, a request keeping its place over
            all its chunks; ``round-robin`` sends a request to the end after each chunk; ``oracle`` is longest
            remaining first by true lengths, which only a simulation has.
        fairness_period: every how many decisions the longest-waiting request is taken; 0 is never.
        estimate: of a group's length for ``context``: ``longest`` is the paper's, ``exposure`` also counts what the
            unfinished responses have generated (`context.LengthContext`).
        affinity_spread: a request returns to the instance that holds its KV while that one runs at most this many
            requests more than the least busy one (the paper's 32).
    """

    chunk_size: int = 8192
    order: Order = "context"
    fairness_period: int = 64
    affinity_spread: int = 32
    estimate: Estimate = "longest"

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 token, got {self.chunk_size}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")
        if self.estimate not in ESTIMATES:
            raise ValueError(f"estimate must be one of {', '.join(ESTIMATES)}, got {self.estimate!r}")
        for name in ("fairness_period", "affinity_spread"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")


class Scheduler:
    """The request buffer and the decisions of a rollout.

    Args:
        config: options.
        instances: the engines; more can be added and lost ones removed at any time.
        true_length: needed by, and only used for, ``order="oracle"``.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        instances: Iterable[Instance] = (),
        true_length: TrueLength | None = None,
    ) -> None:
        if (config.order == "oracle") != (true_length is not None):
            raise ValueError("true_length must be given for order 'oracle' and for no other")
        self.config = config
        self.context = LengthContext(config.estimate)
        self._true_length = true_length
        self._requests: dict[str, Request] = {}
        self._instances: dict[str, Instance] = {}
        self._members: dict[str, list[str]] = {}
        self._arrival: dict[str, int] = {}
        # Entries of the three heaps are dropped lazily: one is live while its ticket is the request's.
        self._tickets: dict[str, int] = {}
        self._ticket = itertools.count()
        self._probes: list[tuple[int, int, str]] = []
        self._others: list[tuple[int, int, str]] = []
        self._oldest: list[tuple[int, str]] = []
        self._decisions = 0
        self._unfinished = 0
        for instance in instances:
            self.add_instance(instance)

    # -- what there is -------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Requests in the buffer."""
        return len(self._tickets)

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return self._unfinished

    def request(self, request_id: str) -> Request:
        """The state of a request. Do not change it."""
        try:
            return self._requests[request_id]
        except KeyError:
            raise ValueError(f"request_id {request_id!r} is not known: add it first") from None

    def instance(self, instance_id: str) -> Instance:
        """The state of an instance. Do not change it."""
        try:
            return self._instances[instance_id]
        except KeyError:
            raise ValueError(f"instance_id {instance_id!r} is not known: add it first") from None

    def instances(self) -> Iterator[Instance]:
        """All instances, in the order in which they were added."""
        return iter(self._instances.values())

    def groups(self) -> Iterator[tuple[str, list[Request]]]:
        """All groups with their requests, in the order in which they were added. Do not change them."""
        for group_id, members in self._members.items():
            yield group_id, [self._requests[r] for r in members]

    # -- requests and instances come and go ----------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Puts a new request into the buffer. The first of a group is the group's probe."""
        if request.request_id in self._requests:
            raise ValueError(f"request_id {request.request_id!r} was added before: ids must be unique")
        if request.status is not Status.WAITING or request.generated:
            raise ValueError(f"request {request.request_id!r} must be new, is {request.status.value}")
        members = self._members.setdefault(request.group_id, [])
        request.probe = not members
        members.append(request.request_id)
        self._requests[request.request_id] = request
        self._arrival[request.request_id] = len(self._arrival)
        self.context.add_group(request.group_id, request.max_tokens)
        self._unfinished += 1
        self._enqueue(request)

    def add_instance(self, instance: Instance) -> None:
        """An engine that may be given chunks from now on."""
        if instance.instance_id in self._instances:
            raise ValueError(f"instance_id {instance.instance_id!r} was added before: ids must be unique")
        if instance.running or instance.kv_reserved:
            raise ValueError(f"instance {instance.instance_id!r} must be idle when it is added")
        self._instances[instance.instance_id] = instance

    def remove_instance(self, instance_id: str) -> list[str]:
        """Forgets an engine that is gone; its chunks go back to the buffer as they were before. Returns their ids."""
        instance = self.instance(instance_id)
        lost = sorted(instance.running)
        del self._instances[instance_id]
        for request_id in lost:
            request = self._requests[request_id]
            request.status, request.reserved, request.instance_id = Status.WAITING, 0, None
            self._enqueue(request)
        return lost

    # -- decisions -----------------------------------------------------------------------------------------

    def next_assignment(self) -> Assignment | None:
        """The next chunk and its place, or None when nothing waits or no instance has room for what comes next.

        None says: ask again after a completion. A request that fits into no instance at all raises ValueError.
        """
        request = self._choose()
        if request is None:
            return None
        tokens = min(self.config.chunk_size, request.max_tokens - request.generated)
        instance = self._place(request, request.context_tokens + tokens)
        if instance is None:
            return None
        self._decisions += 1
        del self._tickets[request.request_id]
        previous = request.instance_id
        request.status, request.instance_id = Status.RUNNING, instance.instance_id
        request.reserved = request.context_tokens + tokens
        instance.running.add(request.request_id)
        instance.kv_reserved += request.reserved
        return Assignment(request.request_id, instance.instance_id, tokens, previous, self._urgency(request))

    def completed(self, request_id: str, new_tokens: int, finished: bool) -> None:
        """A chunk has ended with `new_tokens` tokens.

        `finished`: the request has ended by itself (a stop token). A request that reaches its `max_tokens` is
        finished either way; any other goes back to the buffer.
        """
        request = self.request(request_id)
        if request.status is not Status.RUNNING or request.instance_id is None:
            raise ValueError(
                f"request {request_id!r} is {request.status.value}: only a running chunk completes"
            )
        allowed = request.reserved - request.context_tokens
        if not 0 <= new_tokens <= allowed:
            raise ValueError(f"new_tokens of {request_id!r} must be in 0..{allowed}, got {new_tokens}")
        instance = self._instances[request.instance_id]
        instance.running.remove(request_id)
        instance.kv_reserved -= request.reserved
        request.reserved = 0
        request.generated += new_tokens
        ended = finished or request.generated == request.max_tokens
        length = request.generated if ended else None
        if self.context.chunk(request.group_id, new_tokens, length):
            self._reorder(request.group_id)
        if ended:
            request.status = Status.FINISHED
            self._unfinished -= 1
        else:
            request.status = Status.WAITING
            self._enqueue(request)

    # -- the order -----------------------------------------------------------------------------------------

    def _key(self, request: Request) -> int:
        """Sort key among the requests that are not probes, smallest first."""
        if self._true_length is not None:
            return request.generated - self._true_length(request.request_id)
        if self.config.order == "context":
            return -self.context.estimate(request.group_id)
        return self._arrival[request.request_id] if self.config.order == "arrival" else 0

    def _urgency(self, request: Request) -> int:
        """The order of the buffer as one number, smallest first, for engines that have an order of their own."""
        if request.probe and self.config.order == "context":
            return request.generated - PROBES_FIRST
        return self._key(request)

    def _enqueue(self, request: Request) -> None:
        ticket = next(self._ticket)
        self._tickets[request.request_id] = ticket
        self._offer(request, ticket)
        heapq.heappush(self._oldest, (ticket, request.request_id))

    def _offer(self, request: Request, ticket: int) -> None:
        if request.probe and self.config.order == "context":
            heapq.heappush(self._probes, (request.generated, ticket, request.request_id))
        else:
            heapq.heappush(self._others, (self._key(request), ticket, request.request_id))

    def _reorder(self, group_id: str) -> None:
        """The estimate of a group has changed: offer its waiting requests again under the new one."""
        if self.config.order != "context":
            return
        for request_id in self._members[group_id]:
            ticket = self._tickets.get(request_id)
            if ticket is not None and not self._requests[request_id].probe:
                self._offer(self._requests[request_id], ticket)

    def _choose(self) -> Request | None:
        period = self.config.fairness_period
        if period and self._decisions % period == period - 1:
            while self._oldest:
                ticket, request_id = self._oldest[0]
                if self._tickets.get(request_id) == ticket:
                    return self._requests[request_id]
                heapq.heappop(self._oldest)
        for heap in (self._probes, self._others):
            while heap:
                key, ticket, request_id = heap[0]
                request = self._requests[request_id]
                if self._tickets.get(request_id) == ticket and (
                    heap is self._probes or key == self._key(request)
                ):
                    return request
                heapq.heappop(heap)
        return None

    def _place(self, request: Request, tokens: int) -> Instance | None:
        """The instance that holds the request's KV unless it is much busier, else the one with the lowest KV use."""
        if self._instances and all(tokens > x.kv_capacity for x in self._instances.values()):
            most = max(x.kv_capacity for x in self._instances.values())
            raise ValueError(
                f"request {request.request_id!r} needs {tokens} KV tokens for its next chunk, the largest instance "
                f"has {most}: lower max_tokens or chunk_size, or give the instances more KV memory"
            )
        roomy = [x for x in self._instances.values() if x.has_room(tokens)]
        if not roomy:
            return None
        home = self._instances.get(request.instance_id) if request.instance_id is not None else None
        if home is not None and home.has_room(tokens):
            least = min(len(x.running) for x in roomy)
            if len(home.running) - least <= self.config.affinity_spread:
                return home
        # min keeps the first of equals: the order of the instances breaks ties.
        return min(roomy, key=lambda x: (x.kv_reserved / x.kv_capacity, len(x.running)))
