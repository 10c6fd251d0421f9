"""What is rolled out and on what: samples of groups, and clusters of instances.

The presets are fitted to the table of workloads in the Seer paper. It gives requests, instances, mean and
greatest length; the distribution between those it does not. Lengths here are log-normal, cut at the limit, with the
median solved so that the mean is the paper's. The logarithms of a group's lengths correlate by `correlation`;
each length's own distribution does not depend on it, so that a sweep changes nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from verl_seer.simulate.costs import StepModel


@dataclass(frozen=True, slots=True)
class Sample:
    """One response to produce: its group, the prompt's tokens, the tokens it will generate, and its limit."""

    group: str
    prompt_tokens: int
    tokens: int
    max_tokens: int


@dataclass(frozen=True)
class Cluster:
    """Identical instances.

    Args:
        instances: how many.
        kv_capacity: KV tokens of one.
        max_running: most requests that one runs at once.
        costs: its step.
        kv_bytes: bytes of one KV token, for the report of what moves.
        handover: seconds from the end of a chunk until its place is free and the response may go on: the way to the
            client and the router and back. Whole responses have none.
    """

    instances: int
    kv_capacity: int
    max_running: int
    costs: StepModel
    kv_bytes: int
    handover: float = 0.0

    def __post_init__(self) -> None:
        for name in ("instances", "kv_capacity", "max_running", "kv_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.handover < float("inf"):
            raise ValueError(f"handover must be a number of seconds, at least 0, got {self.handover}")


@dataclass(frozen=True)
class Workload:
    """A preset: one row of the paper's table, with what had to be assumed or fitted.

    Args:
        sigma: standard deviation of the logarithm of the lengths.
        correlation: of the logarithms within a group.
        paper: the name under which `paper.RESULTS` has this workload's figures.
    """

    name: str
    requests: int
    group_size: int
    prompt_tokens: int
    mean_tokens: int
    max_tokens: int
    sigma: float
    correlation: float
    cluster: Cluster
    paper: str


def synthesize(
    workload: Workload, seed: int, group_size: int | None = None, correlation: float | None = None
) -> list[Sample]:
    """The samples of one rollout, group after group. Deterministic by seed."""
    size = workload.group_size if group_size is None else group_size
    rho = workload.correlation if correlation is None else correlation
    if size < 1 or workload.requests % size:
        raise ValueError(f"group_size must divide the {workload.requests} requests, got {size}")
    if not 0 <= rho <= 1:
        raise ValueError(f"correlation must be in [0, 1], got {rho}")
    rng = np.random.default_rng(seed)
    groups = workload.requests // size
    shared = rng.standard_normal((groups, 1))
    own = rng.standard_normal((groups, size))
    z = np.sqrt(rho) * shared + np.sqrt(1 - rho) * own
    median = _median(workload.mean_tokens, workload.max_tokens, workload.sigma)
    lengths = np.clip(np.round(median * np.exp(workload.sigma * z)), 1, workload.max_tokens).astype(int)
    return [
        Sample(f"g{g}", workload.prompt_tokens, int(n), workload.max_tokens)
        for g, row in enumerate(lengths)
        for n in row
    ]


def _median(mean: float, limit: float, sigma: float) -> float:
    """The median of the log-normal whose mean, cut at `limit`, is `mean`."""
    if not 0 < mean < limit:
        raise ValueError(f"mean_tokens must be in 0..max_tokens ({limit}), got {mean}")
    # The mean of a cut distribution is the integral of its survival function; a fine quantile grid will do.
    z = np.sqrt(2) * _erfinv(np.linspace(-1, 1, 4003)[1:-1])
    low, high = 1.0, limit * 10.0
    for _ in range(60):
        middle = np.sqrt(low * high)
        cut = np.minimum(middle * np.exp(sigma * z), limit).mean()
        low, high = (middle, high) if cut < mean else (low, middle)
    return float(np.sqrt(low * high))


def _erfinv(x: np.ndarray) -> np.ndarray:
    from statistics import NormalDist

    normal = NormalDist()
    return np.array([normal.inv_cdf((1 + v) / 2) for v in x]) / np.sqrt(2)


_FIELDS = {"group": str, "prompt_tokens": int, "tokens": int, "max_tokens": int}


def read_trace(path: str | Path) -> list[Sample]:
    """Samples from a JSONL file: one object a line with `group`, `prompt_tokens`, `tokens` and `max_tokens`.

    Lines may come in any order; `max_tokens` may be left out and is then the largest `tokens` of the file.
    ValueError names the file, the line and what is wrong with it.
    """
    rows: list[tuple[int, dict]] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON: {error}") from None
        _check_row(row, where)
        rows.append((number, row))
    if not rows:
        raise ValueError(f"{path}: no samples: write one JSON object a line with {', '.join(_FIELDS)}")
    longest = max(row["tokens"] for _, row in rows)
    out = []
    for number, row in rows:
        limit = row.get("max_tokens", longest)
        if row["tokens"] > limit:
            raise ValueError(f"{path}, line {number}: tokens ({row['tokens']}) exceeds max_tokens ({limit})")
        out.append(Sample(row["group"], row["prompt_tokens"], row["tokens"], limit))
    return sorted(out, key=lambda s: s.group)  # stable: a group's samples keep their order


def _check_row(row: object, where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be a JSON object, got {type(row).__name__}")
    missing = [name for name in _FIELDS if name not in row and name != "max_tokens"]
    unknown = [name for name in row if name not in _FIELDS]
    if missing or unknown:
        raise ValueError(
            f"{where}: missing {missing}, unknown {unknown}; the fields are {', '.join(_FIELDS)}"
        )
    for name, value in row.items():
        if type(value) is not _FIELDS[name] or (isinstance(value, int) and value < 1):
            wanted = "a string" if _FIELDS[name] is str else "an integer of at least 1"
            raise ValueError(f"{where}: {name} must be {wanted}, got {value!r}")


def write_trace(path: str | Path, samples: Sequence[Sample]) -> None:
    """The file that `read_trace` reads."""
    lines = (
        json.dumps(
            {
                "group": s.group,
                "prompt_tokens": s.prompt_tokens,
                "tokens": s.tokens,
                "max_tokens": s.max_tokens,
            }
        )
        for s in samples
    )
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
