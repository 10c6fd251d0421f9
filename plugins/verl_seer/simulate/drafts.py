"""Speculative decoding in the simulator: how many tokens a step of each request makes.

The real policy (`verl_seer.budget.draft_budget`) chooses the lengths; the paper's table of accepted lengths
(`costs.ACCEPTED`) says what they bring with how many siblings known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np

from verl_seer.budget import BudgetConfig, best_length, draft_budget, time_per_token, tokens_per_step
from verl_seer.simulate.costs import PATHS, SIBLINGS, BatchCosts, acceptance
from verl_seer.simulate.engine import Engine

REFRESH_STEPS = 128.0  # drafts are planned again after so many steps
LONGEST = 16  # longest draft that can be asked for


@dataclass(frozen=True)
class Drafting:
    """How an instance drafts.

    Args:
        siblings: whose responses are known: ``instance`` for those that are or were last on the same instance (one
            suffix tree an engine), ``group`` for all (a draft server that aggregates across instances).
        length: fixed draft length, or None for Algorithm 1.
        multi_path: whether drafts of several branches may be chosen.
    """

    siblings: Literal["instance", "group"]
    length: int | None = None
    multi_path: bool = False
    budget: BudgetConfig = field(default_factory=BudgetConfig)

    def __post_init__(self) -> None:
        longest = self.budget.gamma_max if self.length is None else self.length
        if not 1 <= longest <= LONGEST:
            raise ValueError(f"length and budget.gamma_max must be in 1..{LONGEST}, got {longest}")


class GroupProgress:
    """Tokens of every request so far, and where it ran last: what drafts can be made from."""

    def __init__(self, members: np.ndarray) -> None:
        """`members` [requests, largest group]: every request's siblings without itself, -1 for none."""
        self.members = members
        self.generated = np.zeros(len(members) + 1)  # the last entry stands for "none"
        self.place = np.full(len(members) + 1, -1)

    def known_siblings(self, engine: Engine, drafting: Drafting) -> np.ndarray:
        """For each running request, siblings known as far as the request itself; one known in part counts in part."""
        ids = engine.ids
        siblings = self.members[ids]
        share = np.minimum(1.0, self.generated[siblings] / np.maximum(self.generated[ids], 1.0)[:, None])
        if drafting.siblings == "instance":
            share = share * (self.place[siblings] == engine.index)
        return np.where(siblings < 0, 0.0, share).sum(axis=1)


@lru_cache
def _rates(paths: int) -> np.ndarray:
    """Tokens a step by known siblings, in sixteenths up to the table's last, and draft length."""
    steps = np.arange(16 * SIBLINGS[-1] + 1) / 16
    return np.array(
        [[tokens_per_step(acceptance(n, paths), length) for length in range(LONGEST + 1)] for n in steps]
    )


def plan(engine: Engine, probes: np.ndarray, progress: GroupProgress, drafting: Drafting) -> None:
    """Sets the engine's draft tokens and every request's tokens a step. `probes`: mask of the high class."""
    known = progress.known_siblings(engine, drafting)
    mean = round(float(known.mean()) * 4) / 4
    if drafting.length is not None:
        paths, high, low = 1, drafting.length, drafting.length
    else:
        paths, high, low = _adaptive(engine, int(probes.sum()), mean, drafting)
    lengths = np.where(probes, high, low)
    engine.draft_tokens = float(lengths.sum() * paths)
    rates = _rates(paths)
    sixteenths = np.minimum(np.round(known * 16).astype(int), len(rates) - 1)
    engine.rate = rates[sixteenths, lengths]


def _adaptive(engine: Engine, high: int, siblings: float, drafting: Drafting) -> tuple[int, int, int]:
    """(paths, length for probes, length for others): Algorithm 1 at the number of branches that pays best."""
    batch, config = engine.running, drafting.budget

    def cost(paths: int) -> float:
        costs, alpha = BatchCosts(engine.costs, engine.kv, paths), acceptance(siblings, paths)
        tokens = [tokens_per_step(alpha, length) for length in range(config.gamma_max + 1)]
        length = best_length(costs, batch, tokens)
        return time_per_token(costs, batch, length, tokens[length])

    paths = min(PATHS, key=cost) if drafting.multi_path else 1
    alpha = acceptance(siblings, paths)
    beta = [alpha] * config.gamma_max
    if config.rule == "cumulative":
        beta = [alpha ** (i + 1) for i in range(config.gamma_max)]
    budget = draft_budget(high, batch - high, beta, BatchCosts(engine.costs, engine.kv, paths), config)
    return paths, budget.high, budget.low
