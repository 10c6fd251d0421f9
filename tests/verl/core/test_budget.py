"""Algorithm 1 and the acceptance statistics it is fed with."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_seer import AcceptanceStats, BudgetConfig, draft_budget
from verl_seer.budget import BENEFIT_RULES, best_length, time_per_token, tokens_per_step


@dataclass(frozen=True)
class Costs:
    fixed: float = 10.0
    token: float = 0.1
    drafted: float = 0.01

    def draft(self, batch, length):
        return self.drafted * batch * length

    def forward(self, batch, length):
        return self.fixed + self.token * batch * (1 + length)


probabilities = st.lists(st.floats(0, 1), min_size=8, max_size=8)
falling = probabilities.map(lambda b: sorted(b, reverse=True))


@settings(max_examples=200, deadline=None)
@given(
    high=st.integers(0, 30),
    low=st.integers(0, 300),
    beta=falling,
    rule=st.sampled_from(BENEFIT_RULES),
    token=st.floats(0, 2),
    gamma_max=st.integers(1, 8),
)
def test_the_budget_and_the_longest_draft_are_kept(high, low, beta, rule, token, gamma_max):
    b = draft_budget(high, low, beta, Costs(token=token), BudgetConfig(rule, gamma_max))
    assert 0 <= b.high <= gamma_max and 0 <= b.low <= gamma_max
    assert high * b.high + low * b.low <= b.tokens <= gamma_max * (high + low)
    assert b.high == 0 or high > 0
    assert b.low == 0 or low > 0


def as_printed(high, low, beta, budget, worth, lam, gamma_max):
    """Algorithm 1 from line 4 on, letter by letter, for high >= 1 and low >= 1."""
    if budget < high:
        return 0, 0
    gh, gl, remaining = 1, 0, budget - high
    while True:
        bh = high * worth(gh) if gh < gamma_max else 0
        bl = low * worth(gl) if gl < gamma_max else 0
        if bh > lam * bl and gh < gamma_max and remaining >= high:
            gh, remaining = gh + 1, remaining - high
        elif low > 0 and gl < gamma_max and remaining >= low:
            gl, remaining = gl + 1, remaining - low
        else:
            return gh, gl


@settings(max_examples=100, deadline=None)
@given(high=st.integers(1, 20), low=st.integers(1, 100), beta=falling, lam=st.floats(0.5, 4))
def test_the_printed_rule_is_the_printed_algorithm(high, low, beta, lam):
    costs, config = Costs(), BudgetConfig("printed", lam=lam)
    alpha = sum(beta) / 8
    budget = min(range(9), key=lambda g: (costs.draft(high + low, g) + costs.forward(high + low, g)) / sum(
        alpha**i for i in range(g + 1)
    )) * (high + low)  # fmt: skip
    b0 = [1.0, *beta]
    want = as_printed(high, low, beta, budget, lambda g: b0[g] - b0[g + 1], lam, 8) if budget else (0, 0)
    got = draft_budget(high, low, beta, costs, config)
    assert (got.high, got.low) == want


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 12), beta=falling, rule=st.sampled_from(["conditional", "cumulative"]))
def test_two_equal_classes_get_what_brute_force_finds_best(size, beta, rule):
    """Worths fall along a draft, so taking the best next token is optimal for classes of one size and lam = 1."""
    config = BudgetConfig(rule, lam=1.0)
    got = draft_budget(size, size, beta, Costs(token=0.02), config)
    worth = []
    product = 1.0
    for b in beta:
        product *= b
        worth.append(product if rule == "conditional" else b)
    value = lambda high, low: sum(worth[:high]) + sum(worth[:low])
    best = max(
        value(h, l)
        for h, l in itertools.product(range(9), range(9))
        if size * (h + l) <= got.tokens and (h >= 1 or got.tokens == 0)
    )
    assert value(got.high, got.low) == pytest.approx(best, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(batch=st.integers(1, 400), alphas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)))
def test_drafts_get_longer_with_acceptance_and_shorter_with_the_batch(batch, alphas):
    low, high = sorted(alphas)
    few, many = ([tokens_per_step(alpha, n) for n in range(9)] for alpha in (low, high))
    assert best_length(Costs(), batch, few) <= best_length(Costs(), batch, many)
    assert best_length(Costs(), 2 * batch, many) <= best_length(Costs(), batch, many)


def test_drafting_stops_where_it_costs():
    assert draft_budget(4, 400, [0.3] * 8, Costs(fixed=0.0), BudgetConfig()).tokens == 0
    assert draft_budget(4, 400, [0.0] * 8, Costs(), BudgetConfig()).tokens == 0
    assert draft_budget(1, 0, [1.0] * 8, Costs(token=0.0, drafted=0.0), BudgetConfig()).high == 8


def test_tokens_per_step_is_the_sum_of_the_powers():
    for alpha in (0.0, 0.3, 0.9, 1.0):
        assert tokens_per_step(alpha, 5) == pytest.approx(sum(alpha**i for i in range(6)), rel=1e-12)
    assert time_per_token(Costs(), 3, 0, 1.0) == Costs().forward(3, 0)


def test_measured_drafts_are_counted_as_they_are():
    """Right once in ten at first, nearly always after that: 8 tokens are worth 1.7, where their mean promises 5.5."""
    beta, made = [0.1, *[0.95] * 7], [1.0] * 8
    costs = Costs(token=1.0)
    assert draft_budget(0, 4, beta, costs, BudgetConfig()).low > 0
    assert draft_budget(0, 4, beta, costs, BudgetConfig(), made).low == 0
    right = [0.95] * 8
    assert draft_budget(0, 4, right, costs, BudgetConfig(), made).low > 0
    assert draft_budget(0, 4, right, costs, BudgetConfig(), [0.0] * 8).low == 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BudgetConfig("guess"), "rule must be one of printed, conditional, cumulative"),
        (lambda: BudgetConfig(gamma_max=0), "gamma_max must be at least 1"),
        (lambda: BudgetConfig(lam=0), "lam must be positive"),
        (lambda: draft_budget(-1, 2, [1.0] * 8, Costs(), BudgetConfig()), "must not be negative"),
        (lambda: draft_budget(1, 2, [1.0] * 7, Costs(), BudgetConfig()), r"gamma_max \(8\) values, got 7"),
        (
            lambda: draft_budget(1, 2, [1.0] * 8, Costs(), BudgetConfig(), [0.5] * 7),
            "made must have gamma_max",
        ),
        (lambda: draft_budget(1, 2, [1.0] * 8, Costs(), BudgetConfig(), [1.5] * 8), r"shares in \[0, 1\]"),
        (lambda: draft_budget(1, 2, [1.1] * 8, Costs(), BudgetConfig()), r"probabilities in \[0, 1\]"),
        (
            lambda: draft_budget(1, 2, [0.1, 0.9] * 4, Costs(), BudgetConfig("cumulative")),
            "cumulative beta must not rise",
        ),
        (lambda: AcceptanceStats(0), "max_length must be at least 1"),
        (lambda: AcceptanceStats(4).record(5, 1), "0 <= accepted <= drafted <= 4"),
        (lambda: AcceptanceStats(4).record(2, 3), "0 <= accepted <= drafted <= 4"),
        (lambda: AcceptanceStats(4, half_life=-1), "half_life must not be negative"),
        (lambda: AcceptanceStats(4, prior=2), r"prior must be in \[0, 1\]"),
    ],
)
def test_bad_arguments_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_statistics_find_the_acceptance_that_made_the_drafts():
    """20,000 drafts: the standard error of position 1 is 0.004, of position 4 (reached one time in five) 0.008."""
    rng, true = random.Random(0), [0.8, 0.6, 0.5, 0.4]
    stats = AcceptanceStats(4, half_life=0)
    lengths = []
    for _ in range(20_000):
        accepted = next((i for i, p in enumerate(true) if rng.random() >= p), 4)
        stats.record(4, accepted)
        lengths.append(1 + accepted)
    assert stats.conditional() == pytest.approx(true, abs=0.03)
    product = [0.8, 0.48, 0.24, 0.096]
    assert stats.cumulative() == pytest.approx(product, abs=0.02)
    assert stats.mean_accepted_length == pytest.approx(sum(lengths) / 20_000, rel=1e-12)


def test_statistics_forget():
    stats = AcceptanceStats(2, half_life=50)
    for _ in range(1000):
        stats.record(2, 2)
    for _ in range(500):
        stats.record(2, 0)
    assert stats.conditional()[0] < 0.01


def test_a_short_draft_says_nothing_of_later_positions():
    stats = AcceptanceStats(3, prior=0.5)
    for _ in range(100):
        stats.record(1, 1)
    stats.record(0, 0)
    assert stats.conditional()[0] > 0.9 and stats.conditional()[1:] == [0.5, 0.5]
    assert stats.drafts == 100
