"""Speculative decoding in the simulator: how many tokens a step of each request makes.

The real policy (`verl_seer.budget.draft_budget`) chooses the lengths; the paper's table of accepted lengths
(`costs.ACCEPTED`) says what they bring with how many siblings known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np

from verl_seer.budget import BudgetConfig, best_length, draft_budget, time_per_token
from verl_seer.simulate.costs import PATHS, BatchCosts, acceptance
from verl_seer.simulate.engine import Engine

REFRESH_STEPS = 256.0  # drafts are planned again after so many steps


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


@lru_cache(maxsize=100_000)
def _rate(sixteenths: int, paths: int, length: int) -> float:
    alpha = acceptance(sixteenths / 16, paths)
    return (1 - alpha ** (length + 1)) / (1 - alpha)


def plan(engine: Engine, probes: np.ndarray, progress: GroupProgress, drafting: Drafting) -> None:
    """Sets the engine's draft tokens and every request's tokens a step. `probes`: mask of the high class."""
    batch = engine.running
    known = progress.known_siblings(engine, drafting)
    mean = round(float(known.mean()) * 4) / 4
    if drafting.length is not None:
        paths, high, low = 1, drafting.length, drafting.length
    else:
        paths, high, low = _adaptive(engine, int(probes.sum()), mean, drafting)
    lengths = np.where(probes, high, low)
    engine.draft_tokens = float(lengths.sum() * paths)
    engine.rate = np.ones(batch)
    sixteenths = np.round(known * 16).astype(int)
    for key in set(zip(sixteenths.tolist(), lengths.tolist())):
        if key[1]:
            engine.rate[(sixteenths == key[0]) & (lengths == key[1])] = _rate(key[0], paths, key[1])


def _adaptive(engine: Engine, high: int, siblings: float, drafting: Drafting) -> tuple[int, int, int]:
    """(paths, length for probes, length for others): Algorithm 1 at the number of branches that pays best."""
    batch, config = engine.running, drafting.budget

    def cost(paths: int) -> float:
        costs, alpha = BatchCosts(engine.costs, engine.kv, paths), acceptance(siblings, paths)
        return time_per_token(costs, batch, best_length(costs, batch, alpha, config.gamma_max), alpha)

    paths = min(PATHS, key=cost) if drafting.multi_path else 1
    alpha = acceptance(siblings, paths)
    beta = [alpha] * config.gamma_max
    if config.rule == "cumulative":
        beta = [alpha ** (i + 1) for i in range(config.gamma_max)]
    budget = draft_budget(high, batch - high, beta, BatchCosts(engine.costs, engine.kv, paths), config)
    return paths, budget.high, budget.low
