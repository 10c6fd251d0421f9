"""Which instance a whole request goes to in a rollout that does not divide it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol


class Balancer(Protocol):
    """The calls of verl's `RequestLoadBalancer` that a rollout without sticky sessions makes."""

    def acquire_server(self, request_id: str) -> tuple[str, Any]: ...

    def release_server(self, server_id: str, request_id: str | None = None) -> None: ...


class LeastInFlight:
    """Our description of verl 0.9.1's `GlobalRequestLoadBalancer` for requests of one turn.

    The server with the fewest requests in flight; among equals a random one. Its sticky sessions do not
    matter here, because each request asks once.
    """

    def __init__(self, server_ids: Sequence[str], seed: int = 0) -> None:
        self._in_flight = dict.fromkeys(server_ids, 0)
        self._random = random.Random(seed)

    def acquire_server(self, request_id: str) -> tuple[str, Any]:
        least = min(self._in_flight.values())
        server = self._random.choice([s for s, n in self._in_flight.items() if n == least])
        self._in_flight[server] += 1
        return server, None

    def release_server(self, server_id: str, request_id: str | None = None) -> None:
        self._in_flight[server_id] -= 1


def verl_balancer(server_ids: Sequence[str], seed: int = 0) -> Balancer:
    """verl's own balancer, as the plain class that it is; seeds the `random` module, which it draws from.

    ImportError where verl and its router's dependencies (Ray among them) are not installed.
    """
    from verl.workers.rollout.router import GlobalRequestLoadBalancer

    random.seed(seed)
    return GlobalRequestLoadBalancer(dict.fromkeys(server_ids))
