"""Runs cases: results compared, then everybody timed in turn; rows, ratios, and what was left out and why."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Ratio, paired_ratio
from benchmarks.gpu.case import OURS, Absent, Call, Case
from benchmarks.gpu.timing import Deadline, Machine, Timer


@dataclass(frozen=True)
class Row:
    """One contender at one shape in one mode. Seconds: median, least and most of the rounds."""

    op: str
    shape: str
    mode: str
    who: str
    seconds: float
    low: float
    high: float
    of_copy: float  # bytes of the case a second, as a share of a copy's
    of_gemm: float  # FLOP of the case a second, as a share of a large product's


@dataclass
class Report:
    """What a run found."""

    rows: list[Row] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    host: dict[str, dict[str, float]] = field(default_factory=dict)  # case -> who -> seconds of the host a call
    absent: dict[str, str] = field(default_factory=dict)  # who, where -> why
    not_run: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "rows": [asdict(row) for row in self.rows],
            "host_seconds": self.host,
            "absent": self.absent,
            "not_run": self.not_run,
        }


def label(case: Case) -> str:
    return f"{case.op} {case.shape}"


def contenders(case: Case, device: torch.device, report: Report) -> dict[str, Call]:
    """Everybody who is here and takes this shape. Ours must; others are noted as absent with their reason."""
    calls: dict[str, Call] = {}
    for who, make in case.make(device).items():
        try:
            calls[who] = make()
            calls[who]()
        except Exception as error:
            if who == OURS:
                raise
            said = str(error).splitlines() or [""]
            kind = "" if isinstance(error, Absent) else f"{type(error).__name__}: "
            report.absent[f"{who}, {label(case)}"] = f"{kind}{said[0][:200]}"
            calls.pop(who, None)
    return calls


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if isinstance(x, Tensor)]


def difference(case: Case, calls: Mapping[str, Call]) -> dict[str, float]:
    """Relative difference (L2) of each contender's first result from ours.

    Raises:
        AssertionError: one is beyond the case's bound; then somebody computes something else.
    """
    ours = _tensors(calls[OURS]())[0].double()
    found = {}
    for who, call in calls.items():
        if who == OURS:
            continue
        theirs = _tensors(call())[0].double().reshape(ours.shape)
        found[who] = ((theirs - ours).norm() / ours.norm().clamp_min(1e-30)).item()
        if not found[who] <= case.error:
            raise AssertionError(f"{label(case)}: {who} differs from ours by {found[who]:.2g} > {case.error:g}")
    return found


def check(cases: Iterable[Case], device: torch.device) -> tuple[list[tuple[str, str, float]], Report]:
    """Compares the results of all contenders; no timing. (case, who, difference) of each."""
    report = Report()
    compared = []
    for case in cases:
        calls = contenders(case, device, report)
        if case.error == float("inf"):
            compared += [(label(case), who, float("nan")) for who in calls if who != OURS]
        else:
            compared += [(label(case), who, x) for who, x in difference(case, calls).items()]
    return compared, report


def _row(case: Case, mode: str, who: str, times: Sequence[float], machine: Machine) -> Row:
    seconds = statistics.median(times)
    return Row(
        case.op, case.shape, mode, who, seconds, min(times), max(times),
        case.bytes / seconds / machine.copy, case.flops / seconds / machine.gemm,
    )  # fmt: skip


def measure(case: Case, timer: Timer, machine: Machine, report: Report) -> None:
    """All of one case: eager and, where it can be captured, as a graph."""
    calls = contenders(case, timer.device, report)
    if case.error != float("inf"):
        difference(case, calls)
    modes = {"eager": calls}
    if case.graph:
        graphs = {}
        for who, call in calls.items():
            try:
                graphs[who] = timer.captured(call)
            except Exception as error:
                said = (str(error).splitlines() or [""])[0][:200]
                report.absent[f"{who} as a graph, {label(case)}"] = said
        if OURS in graphs:
            modes["graph"] = graphs
    for mode, of in modes.items():
        times = timer.in_turn(of)
        for who, found in times.items():
            report.rows.append(_row(case, mode, who, found, machine))
            if who != OURS:
                goal = case.goals.get(who, 1.0)
                name = f"{label(case)}, {mode}: {who} over ours"
                report.ratios.append(paired_ratio(name, found, times[OURS], goal))
        for floor, (size, goal) in case.floors.items():
            least = [size / machine.copy] * len(times[OURS])
            report.ratios.append(
                paired_ratio(f"{label(case)}, {mode}: {floor} over ours", least, times[OURS], goal)
            )
    report.host[label(case)] = {who: timer.host(call) for who, call in calls.items()}


def run(cases: Sequence[Case], timer: Timer, machine: Machine, deadline: Deadline, say: Any) -> Report:
    """Cases in order until the time is up; one that fails is noted, and the others go on."""
    report = Report()
    for case in cases:
        if deadline.passed():
            report.not_run.append(f"{label(case)}: the time was up")
            continue
        say(label(case))
        try:
            measure(case, timer, machine, report)
        except torch.cuda.OutOfMemoryError as error:
            report.not_run.append(f"{label(case)}: out of memory: {str(error).splitlines()[0][:160]}")
        except Exception as error:
            report.not_run.append(f"{label(case)}: {type(error).__name__}: {str(error).strip()[:400]}")
        gc.collect()
        torch.cuda.empty_cache()
    return report
