"""What the scheduler knows of requests and instances. Plain data; lengths and capacities are in tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Status(Enum):
    """Where a request is: in the buffer, on an instance with one of its chunks, or done."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True)
class Request:
    """One sample of a group.

    Args:
        request_id: unique in the scheduler.
        group_id: the prompt that it belongs to.
        prompt_tokens: length of the prompt, at least 1.
        max_tokens: most tokens that it may generate in all its chunks, at least 1.
    """

    request_id: str
    group_id: str
    prompt_tokens: int
    max_tokens: int
    generated: int = 0
    status: Status = Status.WAITING
    probe: bool = False
    instance_id: str | None = None  # where it runs, or ran last: the one that may still hold its KV
    reserved: int = 0  # KV tokens reserved there for the chunk that is running

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "max_tokens"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} of request {self.request_id!r} must be at least 1, got {value}")

    @property
    def context_tokens(self) -> int:
        """Tokens whose KV the next chunk needs."""
        return self.prompt_tokens + self.generated


@dataclass(slots=True)
class Instance:
    """One inference engine.

    Args:
        instance_id: unique in the scheduler.
        kv_capacity: KV tokens that it can hold.
        max_running: most requests that it runs at once.
    """

    instance_id: str
    kv_capacity: int
    max_running: int
    kv_reserved: int = 0
    running: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name in ("kv_capacity", "max_running"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} of instance {self.instance_id!r} must be at least 1, got {value}")

    @property
    def kv_free(self) -> int:
        """KV tokens that no running chunk has reserved."""
        return self.kv_capacity - self.kv_reserved

    def has_room(self, tokens: int) -> bool:
        """Whether a chunk that reserves `tokens` can start now."""
        return len(self.running) < self.max_running and self.kv_reserved + tokens <= self.kv_capacity


@dataclass(frozen=True, slots=True)
class Assignment:
    """One chunk to run: generate up to `max_tokens` more tokens of the request on the instance."""

    request_id: str
    instance_id: str
    max_tokens: int
    previous_instance_id: str | None  # where the KV of the earlier chunks was made; None for the first chunk
    priority: int  # its place in the buffer's order, smallest first
