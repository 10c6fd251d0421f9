"""How many tokens to draft (Seer, Algorithm 1: the marginal-benefit-aware policy).

The printed algorithm compares beta[g] - beta[g + 1], differences of acceptance. What one more drafted token is
worth is the probability that it is accepted with all before it. If beta is conditional on the position having
been reached, that is the product of beta up to g + 1; if beta is cumulative, it is beta[g + 1] itself. All three
are here under names; see `BenefitRule`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Literal, Protocol

BenefitRule = Literal["printed", "conditional", "cumulative"]
BENEFIT_RULES: tuple[BenefitRule, ...] = ("printed", "conditional", "cumulative")

GAMMA_MAX = 8  # longest draft, Algorithm 1
LAMBDA = 2.0  # how much more a token of the high class must be worth, Algorithm 1


class StepCosts(Protocol):
    """Profiled costs of one decoding step, in any one unit of time."""

    def draft(self, batch: int, length: int) -> float:
        """D(B, gamma): making drafts of `length` tokens for `batch` requests; 0 for length 0."""

    def forward(self, batch: int, length: int) -> float:
        """T(B, gamma): the target model over `length` + 1 tokens of each of `batch` requests."""


@dataclass(frozen=True)
class BudgetConfig:
    """Options of Algorithm 1.

    Args:
        rule: what beta means and how a further token is valued: ``printed`` takes the difference of successive
            beta as the paper prints it (beta[0] = 1); ``conditional`` reads beta as conditional acceptance and
            values the product up to the position; ``cumulative`` reads beta as the probability of accepting
            everything up to the position and values that.
        gamma_max: longest draft.
        lam: factor by which the benefit for the high class must exceed that for the low class.
    """

    rule: BenefitRule = "conditional"
    gamma_max: int = GAMMA_MAX
    lam: float = LAMBDA

    def __post_init__(self) -> None:
        if self.rule not in BENEFIT_RULES:
            raise ValueError(f"rule must be one of {', '.join(BENEFIT_RULES)}, got {self.rule!r}")
        if self.gamma_max < 1:
            raise ValueError(f"gamma_max must be at least 1, got {self.gamma_max}")
        if self.lam <= 0:
            raise ValueError(f"lam must be positive, got {self.lam}")


@dataclass(frozen=True)
class DraftBudget:
    """Draft lengths of the two classes of requests, and the token budget of the step that they keep within."""

    high: int
    low: int
    tokens: int


NO_DRAFTS = DraftBudget(0, 0, 0)


def tokens_per_step(alpha: float, length: int) -> float:
    """Expected tokens of a step with drafts of `length` at acceptance `alpha` in [0, 1]: 1 + alpha + ... ."""
    return length + 1.0 if alpha == 1 else (1 - alpha ** (length + 1)) / (1 - alpha)


def time_per_token(costs: StepCosts, batch: int, length: int, tokens: float) -> float:
    """T_SD(B, gamma), the expected time of a request's token in steps of `tokens` each; length 0 is plain decoding."""
    return (costs.draft(batch, length) + costs.forward(batch, length)) / tokens


def best_length(costs: StepCosts, batch: int, tokens: Sequence[float]) -> int:
    """The draft length of least `time_per_token`, the same for all; the shortest of equals, 0 if drafting costs.

    `tokens` are those expected of a step with drafts of each length, from 0 on.
    """
    return min(range(len(tokens)), key=lambda length: time_per_token(costs, batch, length, tokens[length]))


def benefits(beta: Sequence[float], config: BudgetConfig) -> list[float]:
    """What each position of a draft is worth, for one request; index 0 is position 1."""
    known = [float(b) for b in beta[: config.gamma_max]]
    if config.rule == "cumulative":
        return known
    if config.rule == "printed":
        return [before - after for before, after in zip([1.0, *known], known)]
    out, product = [], 1.0
    for b in known:
        product *= b
        out.append(product)
    return out


def draft_budget(
    high: int,
    low: int,
    beta: Sequence[float],
    costs: StepCosts,
    config: BudgetConfig,
    made: Sequence[float] | None = None,
) -> DraftBudget:
    """Algorithm 1: draft lengths for `high` requests of high and `low` requests of low priority.

    Args:
        high, low: requests of each class in the batch; the probes are the high class.
        beta: acceptance by position, at least `gamma_max` values in [0, 1], read as `config.rule` says.
        costs: profiled costs of a step, for the drafts that are made.
        made: share of requests, by position, whose draft gets that far if it may: not every request has something to
            draft. Expected tokens are then the sum of made times the product of beta, as measured. None takes
            every request to have its draft, and alpha, the mean of beta, for every position, as the paper does:
            far too much where first tokens are hardly ever right but those after a right one mostly are.

    The lengths keep within the budget: high * result.high + low * result.low <= result.tokens.
    """
    if high < 0 or low < 0:
        raise ValueError(f"high and low must not be negative, got {high} and {low}")
    if len(beta) < config.gamma_max:
        raise ValueError(f"beta must have gamma_max ({config.gamma_max}) values, got {len(beta)}")
    if not all(0 <= b <= 1 for b in beta):
        raise ValueError(f"beta must hold probabilities in [0, 1], got {list(beta)}")
    batch = high + low
    if made is not None and (len(made) < config.gamma_max or not all(0 <= m <= 1 for m in made)):
        raise ValueError(f"made must have gamma_max ({config.gamma_max}) shares in [0, 1], got {list(made)}")
    if batch == 0:
        return NO_DRAFTS
    budget = best_length(costs, batch, _expected_tokens(beta, config, made)) * batch
    if budget == 0 or budget < high:  # line 4
        return NO_DRAFTS
    worth = benefits(beta, config)
    gamma_high, gamma_low = (1 if high else 0), 0
    remaining = budget - high  # line 7
    while True:
        worth_high = high * worth[gamma_high] if gamma_high < config.gamma_max else 0.0
        worth_low = low * worth[gamma_low] if gamma_low < config.gamma_max else 0.0
        if worth_high > config.lam * worth_low and gamma_high < config.gamma_max and remaining >= high:
            gamma_high += 1
            remaining -= high
        elif low > 0 and gamma_low < config.gamma_max and remaining >= low:
            gamma_low += 1
            remaining -= low
        else:
            return DraftBudget(gamma_high, gamma_low, budget)


def _expected_tokens(
    beta: Sequence[float], config: BudgetConfig, made: Sequence[float] | None
) -> list[float]:
    """Tokens of a step with drafts of each length up to gamma_max, from 0 on."""
    values = list(beta[: config.gamma_max])
    if made is not None:
        reached = values if config.rule == "cumulative" else accumulate(values, mul)
        return list(accumulate(map(mul, made, reached), initial=1.0))
    alpha = _mean_acceptance(values, config)
    return [tokens_per_step(alpha, length) for length in range(config.gamma_max + 1)]


def _mean_acceptance(beta: Sequence[float], config: BudgetConfig) -> float:
    """alpha = E(beta), of conditional acceptances: a cumulative beta is turned into those first."""
    values = list(beta)
    if config.rule == "cumulative":
        values = [b / before if before else 0.0 for before, b in zip([1.0, *values], values)]
        if max(values) > 1:
            raise ValueError(f"a cumulative beta must not rise, got {list(beta)}")
    return sum(values) / len(values)
