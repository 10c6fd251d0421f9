"""What an index of a group's responses takes and gives; shared by the native index and the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

TokenIds: TypeAlias = Sequence[int] | NDArray[np.integer]
MAX_DEPTH = 64  # longest substring that is counted: context and draft together
TOKEN_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """How to draft.

    Args:
        max_length: longest path of the draft, in tokens; 0 drafts nothing.
        max_paths: leaves of the draft; 1 is a linear draft.
        max_tokens: tokens of the draft in all; None is max_length * max_paths.
        min_match: shortest context that is trusted.
        levels: contexts of falling length whose estimates are blended; the later ones give candidates only while
            there are fewer than max_paths.
        smoothing: weight, in occurrences, of the next shorter context's estimate.
        min_score: least probability, by the index's own estimate, that a drafted token and all before it are
            accepted; candidates below it are left out.
    """

    max_length: int = 8
    max_paths: int = 1
    max_tokens: int | None = None
    min_match: int = 1
    levels: int = 3
    smoothing: float = 2.0
    min_score: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("max_length", 0), ("max_paths", 1), ("min_match", 1), ("levels", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.max_tokens is not None and self.max_tokens < 0:
            raise ValueError(f"max_tokens must not be negative, got {self.max_tokens}")
        if self.smoothing < 0:
            raise ValueError(f"smoothing must not be negative, got {self.smoothing}")
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"min_score must be in [0, 1], got {self.min_score}")

    @property
    def token_limit(self) -> int:
        """Most tokens that a draft can have."""
        most = self.max_length * self.max_paths
        return most if self.max_tokens is None else min(self.max_tokens, most)


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft: a forest of tokens in the order of their scores.

    Args:
        tokens: token ids.
        parents: index of each token's parent in the draft, -1 for one that follows the context.
        scores: estimated probability that the token and all before it are accepted; never rises.
        match: length of the context that the draft came from; 0 where nothing matched.
    """

    tokens: list[int]
    parents: list[int]
    scores: list[float]
    match: int

    def paths(self) -> list[list[int]]:
        """The token ids of every path from the context to a leaf."""
        inner = set(self.parents)
        out = []
        for leaf in range(len(self.tokens)):
            if leaf in inner:
                continue
            path, at = [], leaf
            while at >= 0:
                path.append(self.tokens[at])
                at = self.parents[at]
            out.append(path[::-1])
        return out


EMPTY_DRAFT = Draft([], [], [], 0)


def check_tokens(tokens: TokenIds, vocab_size: int) -> NDArray[np.int32]:
    """`tokens` as int32, each in [0, vocab_size)."""
    array = np.asarray(tokens)
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"tokens must be one row of integers, got shape {list(array.shape)} of {array.dtype}"
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab_size:
        place = int(np.flatnonzero((array < 0) | (array >= vocab_size))[0])
        raise ValueError(
            f"tokens must be in [0, {vocab_size}), got {int(array[place])} at index {place}: "
            "do not append padding or placeholders"
        )
    return np.ascontiguousarray(array, dtype=np.int32)


def check_depth(max_depth: int, vocab_size: int) -> None:
    """The arguments of an index."""
    if max_depth < 2:
        raise ValueError(f"max_depth must be at least 2 (a context and what follows), got {max_depth}")
    if not 1 <= vocab_size <= TOKEN_LIMIT:
        raise ValueError(f"vocab_size must be in 1..{TOKEN_LIMIT}, got {vocab_size}")
