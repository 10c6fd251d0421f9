"""What is measured: one operation at one shape, and everybody who can do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Size = Literal["tiny", "quick", "full"]  # tiny: to compare results, also in Triton's interpreter
Call = Callable[[], Any]

OURS = "ours"


class Absent(Exception):
    """A peer is not here, or does not take this shape; the message says which and why."""


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Args:
        op: the row's group in tables and plots.
        shape: what distinguishes it within the group.
        make: device -> name -> what makes a contender's call, `OURS` first. Inputs are made there, so that cases that
            wait their turn hold no memory. A call returns its result; the first tensor of it is compared.
        bytes: that have to be moved at least, if everything is read and written once.
        flops: of the usual algorithm; a multiply-add is two.
        goals: peer -> how many times our time the peer's should be.
        floors: name -> bytes; our time is compared with a copy of so many.
        graph: whether it is also measured as a CUDA graph.
        error: largest relative difference (L2) of two contenders' results.
    """

    op: str
    shape: str
    make: Callable[[Any], Mapping[str, Callable[[], Call]]]
    bytes: int
    flops: int = 0
    goals: Mapping[str, float] = field(default_factory=dict)
    floors: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    graph: bool = True
    error: float = 2e-2
