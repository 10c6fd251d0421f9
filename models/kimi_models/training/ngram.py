"""A 5-gram with back-off, the baseline that a trained model must beat: interpolated modified Kneser-Ney.

Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1999), section 3: three
discounts per order from the counts of counts, continuation counts below the highest order, and the uniform
distribution at the bottom.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Order:
    """One order: the n-grams seen (as sorted keys) with their discounted counts, and its contexts."""

    grams: np.ndarray
    discounted: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    backoff: np.ndarray


class KneserNey:
    """An interpolated modified Kneser-Ney model of token sequences.

    `vocab_size ** order` must fit 63 bits, as an n-gram is kept as one integer. Sequences are padded on the left
    with `pad`, so that their first tokens have a full context.
    """

    def __init__(self, sequences: list[np.ndarray], vocab_size: int, order: int = 5, pad: int = 0) -> None:
        if vocab_size**order >= 2**63:
            raise ValueError(
                f"order must keep vocab_size ** order below 2**63, got {order} with {vocab_size}"
            )
        self.vocab_size, self.order, self.pad = vocab_size, order, pad
        keys = np.concatenate([self._windows(s) for s in sequences])
        grams, counts = np.unique(keys, return_counts=True)
        self._orders = []
        for n in range(order, 0, -1):
            self._orders.append(self._fit(grams, counts))
            # Below the top, a word counts once for every different word before it.
            grams, counts = (
                np.unique(grams % vocab_size ** (n - 1), return_counts=True) if n > 1 else (grams, counts)
            )

    def bits(self, sequence: np.ndarray) -> float:
        """-log2 of the probability of the whole sequence."""
        if len(sequence) == 0:
            return 0.0
        windows = self._windows(sequence)
        p = np.full(len(windows), 1.0 / self.vocab_size)
        for n, fitted in zip(range(1, self.order + 1), reversed(self._orders)):
            keys = windows % self.vocab_size**n
            at, known = _find(fitted.contexts, keys // self.vocab_size)
            gram, seen = _find(fitted.grams, keys)
            mass = np.where(seen, fitted.discounted[gram], 0.0) / fitted.totals[at]
            p = np.where(known, mass + fitted.backoff[at] * p, p)
        return float(-np.log2(p).sum())

    def _windows(self, sequence: np.ndarray) -> np.ndarray:
        padded = np.concatenate([np.full(self.order - 1, self.pad), sequence]).astype(np.int64)
        keys = np.zeros(len(sequence), np.int64)
        for i in range(self.order):
            keys = keys * self.vocab_size + padded[i : i + len(sequence)]
        return keys

    def _fit(self, grams: np.ndarray, counts: np.ndarray) -> _Order:
        n1, n2, n3, n4 = (max(int((counts == c).sum()), 1) for c in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        # Small or odd data can push a discount out of the range in which probabilities stay positive.
        discounts = np.clip(discounts, 0.05, np.array([1.0, 1.0, 2.0, 3.0])) * (np.arange(4) > 0)
        taken = discounts[np.minimum(counts, 3)]
        contexts, start = np.unique(grams // self.vocab_size, return_index=True)
        totals = np.add.reduceat(counts, start).astype(np.float64)
        backoff = np.add.reduceat(taken, start) / totals
        return _Order(grams, counts - taken, contexts, totals, backoff)


def _find(sorted_keys: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of `keys` in `sorted_keys`, and whether each is really there."""
    at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return at, sorted_keys[at] == keys
