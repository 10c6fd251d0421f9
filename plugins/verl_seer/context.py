"""What a group's finished requests tell about the others (Seer, section on context-aware scheduling)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

Order = Literal["context", "arrival", "round-robin", "oracle"]
ORDERS: tuple[Order, ...] = ("context", "arrival", "round-robin", "oracle")
Estimate = Literal["longest", "exposure"]
ESTIMATES: tuple[Estimate, ...] = ("longest", "exposure")


class LengthContext:
    """The length estimate of each group; its limit while none of its responses has finished.

    Before the first response ends the estimate is the group's limit, so that an unknown group is served as a
    long one: the error of that is a wait, the error of the opposite is a long request that starts last.

    Args:
        estimate: ``longest`` is the paper's, the longest finished response. Those that finish first are a group's
            shortest, so it is too low while others run. ``exposure`` is all tokens that the group has generated, by
            finished and by unfinished responses, over the number of finished ones: the maximum-likelihood mean of
            lengths of which some are only known to be longer than what is there (exact for exponential ones).
    """

    def __init__(self, estimate: Estimate = "longest") -> None:
        if estimate not in ESTIMATES:
            raise ValueError(f"estimate must be one of {', '.join(ESTIMATES)}, got {estimate!r}")
        self._exposure = estimate == "exposure"
        self._limit: dict[str, int] = {}
        self._longest: dict[str, int] = {}
        self._generated: dict[str, int] = {}
        self._finished: dict[str, int] = {}

    def add_group(self, group_id: str, max_tokens: int) -> None:
        """A group whose requests may generate up to `max_tokens`; a second call raises the limit if it is higher."""
        self._limit[group_id] = max(max_tokens, self._limit.get(group_id, 0))

    def chunk(self, group_id: str, new_tokens: int, length: int | None = None) -> bool:
        """Notes `new_tokens` of a response, and its `length` if it has finished; says whether the estimate changed."""
        before = self.estimate(group_id)
        self._generated[group_id] = self._generated.get(group_id, 0) + new_tokens
        if length is not None:
            self._longest[group_id] = max(length, self._longest.get(group_id, 0))
            self._finished[group_id] = self._finished.get(group_id, 0) + 1
        return self.estimate(group_id) != before

    def known(self, group_id: str) -> bool:
        """Whether any response of the group has finished."""
        return group_id in self._longest

    def estimate(self, group_id: str) -> int:
        """Expected length of the group's other responses, in generated tokens."""
        try:
            limit = self._limit[group_id]
        except KeyError:
            raise ValueError(f"group_id {group_id!r} is not known: add its requests first") from None
        if group_id not in self._longest:
            return limit
        if self._exposure:
            return min(self._generated[group_id] // self._finished[group_id], limit)
        return self._longest[group_id]


TrueLength = Callable[[str], int]
"""Request id -> tokens it will generate in all; for the oracle order only."""
