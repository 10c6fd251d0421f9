"""What a group's finished requests tell about the others (Seer, section on context-aware scheduling)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

Order = Literal["context", "arrival", "round-robin", "oracle"]
ORDERS: tuple[Order, ...] = ("context", "arrival", "round-robin", "oracle")


class LengthContext:
    """The length estimate of each group: the longest finished response, or the limit while none has finished.

    Before the first response ends the estimate is the group's limit, so that an unknown group is served as a
    long one: the error of that is a wait, the error of the opposite is a long request that starts last.
    """

    def __init__(self) -> None:
        self._limit: dict[str, int] = {}
        self._longest: dict[str, int] = {}

    def add_group(self, group_id: str, max_tokens: int) -> None:
        """A group whose requests may generate up to `max_tokens`; a second call raises the limit if it is higher."""
        self._limit[group_id] = max(max_tokens, self._limit.get(group_id, 0))

    def finished(self, group_id: str, generated: int) -> bool:
        """Notes a finished response; says whether the group's estimate has changed."""
        before = self.estimate(group_id)
        self._longest[group_id] = max(generated, self._longest.get(group_id, 0))
        return self.estimate(group_id) != before

    def known(self, group_id: str) -> bool:
        """Whether any response of the group has finished."""
        return group_id in self._longest

    def estimate(self, group_id: str) -> int:
        """Expected length of the group's other responses, in generated tokens."""
        if group_id in self._longest:
            return self._longest[group_id]
        try:
            return self._limit[group_id]
        except KeyError:
            raise ValueError(f"group_id {group_id!r} is not known: add its requests first") from None


TrueLength = Callable[[str], int]
"""Request id -> tokens it will generate in all; for the oracle order only."""
