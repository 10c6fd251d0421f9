"""Draft lengths of a running engine: Algorithm 1 fed with what the engine's own steps cost and accept."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from statistics import median

from verl_seer.acceptance import AcceptanceStats
from verl_seer.budget import BudgetConfig, draft_budget

WINDOW = 32  # steps that are remembered of each size


class StepTimes:
    """Seconds of a decoding step by the number of tokens that it runs, from the steps that were seen.

    Steps of similar size (within a fifth) share a median over the last `WINDOW` of them; between sizes it is
    linear, and it never falls with size. Beyond the largest size the last slope goes on: with one size only it is
    flat, which makes longer drafts look free, so that they are tried.
    """

    def __init__(self) -> None:
        self._seen: dict[int, deque[tuple[int, float]]] = {}
        self._curve: tuple[list[float], list[float]] | None = None

    def __bool__(self) -> bool:
        return bool(self._seen)

    def record(self, tokens: int, seconds: float) -> None:
        """One step."""
        if tokens < 1 or seconds < 0:
            raise ValueError(f"need tokens >= 1 and seconds >= 0, got {tokens} and {seconds}")
        self._seen.setdefault(round(4 * math.log2(tokens)), deque(maxlen=WINDOW)).append((tokens, seconds))
        self._curve = None

    def seconds(self, tokens: int) -> float:
        """Expected time of a step of so many tokens; 0 if none was seen."""
        if not self._seen:
            return 0.0
        if self._curve is None:
            self._curve = self._fit()
        sizes, times = self._curve
        if tokens <= sizes[0] or len(sizes) == 1:
            return times[0]
        i = min(bisect_left(sizes, tokens), len(sizes) - 1)
        slope = (times[i] - times[i - 1]) / (sizes[i] - sizes[i - 1])
        return times[i] + slope * (tokens - sizes[i])

    def _fit(self) -> tuple[list[float], list[float]]:
        points = sorted(
            (median(n for n, _ in steps), median(s for _, s in steps), len(steps))
            for steps in self._seen.values()
        )
        blocks: list[list[float]] = []  # sum of weighted times, weight, sizes in it: pool adjacent violators
        for _, time, weight in points:
            blocks.append([time * weight, weight, 1])
            while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
                last = blocks.pop()
                blocks[-1] = [a + b for a, b in zip(blocks[-1], last)]
        times = [total / weight for total, weight, sizes in blocks for _ in range(int(sizes))]
        return [size for size, _, _ in points], times


class MadeDrafts:
    """How far drafts get that may have a number of tokens: a request may have nothing, or little, to draft.

    Args:
        longest: most tokens of a draft.
        keep: weight of what was seen before, each time `shares` is asked.
    """

    def __init__(self, longest: int, keep: float = 0.95) -> None:
        self._allowed, self._made = [0.0] * (longest + 1), [0.0] * (longest + 1)  # drafts by length
        self._keep = keep

    def record(self, allowed: int, made: int) -> None:
        """A draft that might have had `allowed` tokens has `made`."""
        self._allowed[allowed] += 1
        self._made[made] += 1

    def shares(self) -> list[float]:
        """Share of the drafts that get to each position, of those that might; index 0 is position 1. Never rises.

        A position that was never allowed is taken to be like the one before it, the first to be always there.
        """
        self._allowed = [n * self._keep for n in self._allowed]
        self._made = [n * self._keep for n in self._made]
        out, before = [], 1.0
        for i in range(1, len(self._made)):
            before = min(before, (sum(self._made[i:]) + before) / (sum(self._allowed[i:]) + 1.0))
            out.append(before)
        return out


@dataclass
class _Costs:
    plain: StepTimes
    drafted: StepTimes
    per_draft: float
    made: Sequence[float]

    def draft(self, batch: int, length: int) -> float:
        return batch * self.per_draft if length else 0.0

    def forward(self, batch: int, length: int) -> float:
        plain = self.plain.seconds(batch)
        if plain and not length:
            return plain
        return max(plain, self.drafted.seconds(round(batch * (1 + sum(self.made[:length])))))


class DraftLengths:
    """Algorithm 1 for a running engine.

    Args:
        config: its options.
        period: steps between two decisions; a batch that grows or shrinks by a third is decided on at once.
        explore: every how many steps all requests get a length that may not be the one chosen, so that costs and
            acceptance of all stay known: no drafts and one of 1 to gamma_max in turn. The first time comes after 4
            steps, the next after twice as many each, up to this; 0 is never.
    """

    def __init__(self, config: BudgetConfig, period: int = 16, explore: int = 32) -> None:
        if period < 1 or explore < 0:
            raise ValueError(f"need period >= 1 and explore >= 0, got {period} and {explore}")
        self.config, self.period, self.explore = config, period, explore
        self.acceptance = AcceptanceStats(config.gamma_max, prior_weight=0.0)
        self.plain, self.with_drafts = StepTimes(), StepTimes()
        self.made = MadeDrafts(config.gamma_max)
        self._per_draft = 0.0
        self._step = self._decided_at = self._explored = 0
        self._explore_at = min(4, explore)
        self._decided_for = 0
        self._lengths = (config.gamma_max, config.gamma_max)

    def verified(self, drafted: int, accepted: int) -> None:
        """A draft was verified."""
        self.acceptance.record(drafted, accepted)

    def ran(self, tokens: int, drafted: int, seconds: float) -> None:
        """A step that only decoded: its tokens, those of them that were drafted, its time without that of drafting.

        Steps that verify are known apart from the others: attention, sampling and book-keeping are other code.
        """
        (self.with_drafts if drafted else self.plain).record(tokens, seconds)

    def drafted(self, requests: int, seconds: float) -> None:
        """Drafts were made for so many requests, in this time."""
        self._per_draft += (seconds / requests - self._per_draft) / 16

    def next(self, high: int, low: int) -> tuple[int, int]:
        """Draft lengths for the `high` and the `low` requests of the step that comes."""
        self._step += 1
        if self.explore and self._step == self._explore_at:
            self._explore_at += min(self.explore, self._step)
            self._explored += 1
            length = 0 if self._explored % 2 else 1 + self._explored // 2 % self.config.gamma_max
            return length, length
        batch = high + low
        due = self._step - self._decided_at >= self.period
        same = 3 * self._decided_for <= 4 * batch and 3 * batch <= 4 * self._decided_for
        if (self.plain or self.with_drafts) and batch and (due or not same):
            made = self.made.shares()
            costs = _Costs(self.plain, self.with_drafts, self._per_draft, made)
            budget = draft_budget(high, low, self._beta(), costs, self.config, made)
            self._lengths = (budget.high, budget.low)
            self._decided_at, self._decided_for = self._step, batch
        return self._lengths

    def _beta(self) -> Sequence[float]:
        beta = self.acceptance.chained()
        return list(accumulate(beta, mul)) if self.config.rule == "cumulative" else beta
