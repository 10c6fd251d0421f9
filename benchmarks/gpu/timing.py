"""Times on a GPU: each call between two events, with the caches emptied before it; contenders take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarks.gpu.case import Call

ROUNDS = 7  # turns of each contender; a ratio's spread is over them
BURST_SECONDS = 0.012  # of one turn, but at least MIN_CALLS
MIN_CALLS, MAX_CALLS = 2, 20
FLUSH_BYTES = 256 << 20  # more than any second-level cache


@dataclass(frozen=True)
class Machine:
    """What this GPU really does: bytes a second of a copy (read and written), FLOP a second of a large product."""

    name: str
    copy: float
    gemm: float


class Timer:
    """Measures calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def once(self, call: Call, calls: int) -> float:
        """Median seconds of `calls` calls."""
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3

    def warm(self, call: Call) -> int:
        """Runs a call until it is compiled; returns how many fit into a turn."""
        call()
        torch.cuda.synchronize(self.device)
        took = self.once(call, 2)
        return max(MIN_CALLS, min(MAX_CALLS, int(BURST_SECONDS / max(took, 1e-6))))

    def in_turn(self, calls: Mapping[str, Call]) -> dict[str, list[float]]:
        """Seconds of each contender, one figure a round."""
        sizes = {name: self.warm(call) for name, call in calls.items()}
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                found[name].append(self.once(call, sizes[name]))
        return found

    def captured(self, call: Call) -> Call:
        """The call as a CUDA graph: a replay costs no host time."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def host(self, call: Call, calls: int = 30) -> float:
        """Seconds that a call takes of the host, median: until it has been queued, not until it is done."""
        call()
        times = []
        for _ in range(calls):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        torch.cuda.synchronize(self.device)
        return statistics.median(times)

    def machine(self) -> Machine:
        """Measures the two ceilings."""
        source = torch.empty(1 << 30, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        copy = min(self.once(lambda: target.copy_(source), 10) for _ in range(3))
        side = 8192
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        gemm = min(self.once(lambda: torch.mm(a, b), 10) for _ in range(3))
        return Machine(torch.cuda.get_device_name(self.device), 2 * source.numel() / copy, 2 * side**3 / gemm)


class Deadline:
    """How much of the time is left, and whether to begin something else."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    def passed(self) -> bool:
        return self._clock() >= self._end
