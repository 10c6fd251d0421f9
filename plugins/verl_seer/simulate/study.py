"""Runs one trace under several policies and puts the outcomes side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from verl_seer.simulate.presets import BASELINE
from verl_seer.simulate.rollout import Outcome, Policy, simulate
from verl_seer.simulate.workload import Cluster, Sample

StudyProgress = Callable[[str, int, int], None]
FORMAT = "kimi-stack seer simulate, version 1"


def compare(
    samples: Sequence[Sample],
    cluster: Cluster,
    policies: dict[str, Policy],
    seed: int = 0,
    progress: StudyProgress | None = None,
) -> dict[str, Outcome]:
    """Every policy on the same samples. `progress(policy, finished, total)` is called now and then."""
    out = {}
    for name, policy in policies.items():
        step = None if progress is None else (lambda n, total, name=name: progress(name, n, total))
        out[name] = simulate(samples, cluster, policy, seed, step)
    return out


def gains(outcomes: dict[str, Outcome], against: str = BASELINE) -> dict[str, tuple[float, float]]:
    """Policy -> (throughput against that of `against`, part of its tail time that goes away)."""
    base = outcomes[against]
    return {
        name: (o.throughput / base.throughput, 1 - o.tail / base.tail if base.tail else 0.0)
        for name, o in outcomes.items()
    }


def document(
    title: str,
    samples: Sequence[Sample],
    cluster: Cluster,
    outcomes: dict[str, Outcome],
    settings: dict[str, object],
) -> dict[str, object]:
    """The JSON document that `kimi-stack seer report` draws."""
    lengths = sorted(s.tokens for s in samples)
    return {
        "format": FORMAT,
        "title": title,
        "settings": settings,
        "cluster": asdict(cluster),
        "samples": {
            "requests": len(samples),
            "groups": len({s.group for s in samples}),
            "mean_tokens": round(sum(lengths) / len(lengths), 1),
            "quantiles": [lengths[round(q / 20 * (len(lengths) - 1))] for q in range(21)],
        },
        "policies": {name: outcome.to_json() for name, outcome in outcomes.items()},
    }


def check_document(body: object, where: str) -> dict:
    """A document as `document` writes it. ValueError names the file and what is wrong."""
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        found = body.get("format") if isinstance(body, dict) else type(body).__name__
        raise ValueError(f"{where}: not a result of `{FORMAT}`, got {found!r}: run kimi-stack seer simulate")
    for key in ("title", "settings", "cluster", "samples", "policies"):
        if key not in body:
            raise ValueError(f"{where}: {key} is missing: the file is damaged, simulate again")
    if not body["policies"]:
        raise ValueError(f"{where}: policies is empty: nothing to report")
    return body
