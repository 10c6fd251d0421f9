"""Fitting the simulator's instance model to measured steps."""

from __future__ import annotations

import numpy as np
import pytest

from verl_seer.scheduler import SchedulerConfig
from verl_seer.simulate.costs import StepModel
from verl_seer.simulate.fit import Step, fit_handover, fit_steps
from verl_seer.simulate.rollout import Divided, Whole, simulate
from verl_seer.simulate.workload import Cluster, Sample

FIXED, REQUEST, PREFILL, TRANSFER, KV = 4e-3, 2e-4, 5e-5, 1e-6, 3e-7


def measured(n=400, noise=0.02, seed=0, slow=0):
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        requests, kv = int(rng.integers(1, 32)), float(rng.integers(100, 8000))
        prefill = int(rng.integers(0, 200)) if i % 7 == 0 else 0
        moved = int(rng.integers(0, 900)) if i % 11 == 0 else 0
        seconds = FIXED + REQUEST * requests + PREFILL * prefill + TRANSFER * moved + KV * kv
        seconds *= np.exp(noise * rng.standard_normal()) * (20 if i < slow else 1)
        out.append(Step(seconds, requests, prefill, moved, kv))
    return out


@pytest.mark.parametrize("slow", [0, 12])
def test_the_costs_that_made_the_steps_are_found(slow):
    """Noise of 2 % over 400 steps: terms that are a good part of a step within 10 %, a rarely seen one within 50 %;
    a few steps during which something else ran change nothing."""
    model = fit_steps(measured(slow=slow))
    assert model.fixed == pytest.approx(FIXED, rel=0.1)
    assert model.per_request == pytest.approx(REQUEST, rel=0.1)
    assert model.prefill_rate == pytest.approx(1 / PREFILL, rel=0.1)
    assert model.per_kv == pytest.approx(KV, rel=0.1)
    assert model.transfer_rate == pytest.approx(1 / TRANSFER, rel=0.5)


def test_times_that_scatter_give_their_mean():
    """Half of the steps take twice as long as the others. A fit relative to what was measured would say 1.2 of the
    shorter; their mean is 1.5, of 4000 steps within 1 % (0.5 / sqrt(4000), over 1.5) at one standard deviation."""
    rng = np.random.default_rng(1)
    steps = [Step(5e-3 * float(rng.integers(1, 3)), i % 32 + 1, 0, 0, 1.0) for i in range(4000)]
    model = fit_steps(steps)
    said = model.fixed + model.per_kv + 16.5 * model.per_request
    assert said == pytest.approx(1.5 * 5e-3, rel=0.03)


def test_a_cost_that_is_not_there_is_not_negative():
    steps = [Step(5e-3 - 1e-8 * s.kv_tokens, s.requests, 0, 0, s.kv_tokens) for s in measured()]
    model = fit_steps(steps)
    assert model.per_kv == 0 and model.per_request >= 0
    assert model.fixed + 16 * model.per_request == pytest.approx(5e-3, rel=0.05)
    assert model.prefill_rate == model.transfer_rate == 1e9


def test_too_little_is_refused():
    with pytest.raises(ValueError, match="at least 20, got 3"):
        fit_steps(measured(3))
    with pytest.raises(ValueError, match="must be positive, got 0"):
        fit_steps([*measured(30), Step(0.0, 1, 0, 0, 1.0)])


def test_the_handover_that_made_the_makespans_is_found():
    """Within the grid's step of 10 ms: the rollouts repeat exactly."""
    samples = [Sample(f"g{i // 4}", 32, 20 + (37 * i) % 200, 400) for i in range(48)]
    cluster = Cluster(2, 3000, 8, StepModel(5e-3, 1e-4, 0.0, 1e-6, 0.0, 7000.0, 8e4), 1, handover=0.13)
    policies = [Divided(SchedulerConfig(32, order=order)) for order in ("arrival", "context")]
    measured = [(how, simulate(samples, cluster, how).makespan) for how in policies]
    assert fit_handover(samples, cluster, measured) == pytest.approx(0.13, abs=0.0101)
    with pytest.raises(ValueError, match="at least one policy"):
        fit_handover(samples, cluster, [])


def test_a_handover_delays_each_chunk_of_a_lone_response_and_no_whole_one():
    """Ten chunks, nine hand-overs between them; what comes after the last is no part of the rollout."""
    sample = [Sample("g", 10, 100, 100)]
    costs = StepModel(1e-2, 0.0, 0.0, 0.0, 0.0, 1e9, 1e9)
    divided = Divided(SchedulerConfig(10))
    at_once, later = (Cluster(1, 1000, 4, costs, 1, handover=h) for h in (0.0, 0.5))
    added = simulate(sample, later, divided).makespan - simulate(sample, at_once, divided).makespan
    assert added == pytest.approx(9 * 0.5)
    assert simulate(sample, later, Whole()).makespan == simulate(sample, at_once, Whole()).makespan
    with pytest.raises(ValueError, match="handover must be"):
        Cluster(1, 1000, 4, costs, 1, handover=-1.0)
