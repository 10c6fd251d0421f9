"""The instance model of real engines: a `StepModel` fitted to measured steps, and what handing over a chunk takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from verl_seer.simulate.costs import StepModel
from verl_seer.simulate.rollout import Divided, simulate
from verl_seer.simulate.workload import Cluster, Sample

_FASTEST = 1e9  # tokens per second where the steps show no cost at all
_ROUNDS = 8  # of fits that weigh by the one before; the third changes little


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an engine.

    Args:
        seconds: from the end of the step before, which left requests running, to the end of this one.
        requests: that got a token by decoding.
        prefill_tokens: computed of prompts, and of preempted requests again.
        transferred_tokens: whose KV came from elsewhere.
        kv_tokens: that the batch attended to.
    """

    seconds: float
    requests: int
    prefill_tokens: int
    transferred_tokens: int
    kv_tokens: float


def fit_steps(steps: Sequence[Step]) -> StepModel:
    """The step model with the least squared error over `steps`, relative to what it says, its terms not negative.

    A first fit over all steps, relative to what was measured, says which took more than three times as long as they
    should: something else ran on the machine. Relative to the measured times slow steps count for little, so this fit
    is too low where times scatter; the others, without those steps, are relative to the fit before and have the right
    mean. What prefill or a transfer costs beside a decoding step is taken to be proportional to its tokens.

    Raises:
        ValueError: fewer than 20 steps, or the steps say nothing of the cost of decoding.
    """
    if len(steps) < 20:
        raise ValueError(f"steps must be at least 20, got {len(steps)}: measure a longer rollout")
    seconds = np.array([s.seconds for s in steps])
    if not (seconds > 0).all():
        raise ValueError(f"seconds of a step must be positive, got {seconds.min()}")
    terms = np.array(
        [[1.0, s.requests, s.prefill_tokens, s.transferred_tokens, s.kv_tokens] for s in steps], float
    )
    weights = _not_negative(terms, seconds, seconds)
    quiet = seconds <= 3 * terms @ weights
    terms, seconds = terms[quiet], seconds[quiet]
    for _ in range(_ROUNDS):
        weights = _not_negative(terms, seconds, terms @ weights)
    fixed, per_request, prefill, transfer, per_kv = weights
    if fixed <= 0:
        raise ValueError("the steps have no fixed cost: measure steps of different sizes")
    return StepModel(
        fixed=fixed,
        per_request=per_request,
        per_token=0.0,  # without drafts a request is a token
        per_kv=per_kv,
        draft_per_token=0.0,
        prefill_rate=min(_FASTEST, 1 / prefill) if prefill > 0 else _FASTEST,
        transfer_rate=min(_FASTEST, 1 / transfer) if transfer > 0 else _FASTEST,
    )


def fit_handover(
    samples: Sequence[Sample], cluster: Cluster, measured: Sequence[tuple[Divided, float]]
) -> float:
    """The `Cluster.handover` of at most a second with which the makespans are nearest to the measured ones.

    Args:
        samples: of the rollouts that were measured.
        cluster: with its step model; its own handover is not looked at.
        measured: policies, and the seconds of their rollouts.
    """
    if not measured:
        raise ValueError("measured must name at least one policy and its makespan")

    def error(seconds: float) -> float:
        tried = replace(cluster, handover=seconds)
        ratios = [simulate(samples, tried, how).makespan / makespan for how, makespan in measured]
        return float(np.abs(np.log(ratios)).sum())

    # Not by bisection: a longer way can place chunks better, so makespans do not only rise.
    return min((i / 100 for i in range(101)), key=error)


def _not_negative(terms: np.ndarray, seconds: np.ndarray, unit: np.ndarray) -> list[float]:
    """Weights that are not negative, of the least squared error in units of `unit`.

    A term whose weight would be negative is left out, the worst first.
    """
    relative, wanted = terms / unit[:, None], seconds / unit
    scale = np.abs(relative).max(axis=0)
    active = [i for i in range(terms.shape[1]) if scale[i] > 0]
    weights = np.zeros(terms.shape[1])
    while active:
        found = np.linalg.lstsq(relative[:, active] / scale[active], wanted, rcond=None)[0]
        if (found >= 0).all():
            weights[active] = found / scale[active]
            break
        del active[int(found.argmin())]
    return [float(w) for w in weights]
