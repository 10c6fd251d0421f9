"""An inference instance that is advanced from event to event instead of token by token.

Between two events the batch is constant and the KV grows linearly, so the time of s steps is a quadratic in s with a
closed inverse. Steps are not rounded to whole ones: an event falls inside a step of tens of milliseconds.
"""

from __future__ import annotations

import numpy as np

from verl_seer.simulate.workload import Cluster

DONE = 1e-3  # tokens: what is left of a chunk when it has ended, up to rounding


class Engine:
    """Running requests, and the time up to which they have been simulated.

    `ids`, `left`, `context` and `rate` are parallel arrays in the order of arrival: the request, tokens to the end
    of its chunk, KV tokens, and expected tokens a step.
    """

    def __init__(self, index: int, cluster: Cluster) -> None:
        self.index, self.cluster, self.costs = index, cluster, cluster.costs
        self.time = 0.0
        self.stall = 0.0  # seconds of prefill and transfer that delay the next decoding step
        self.ids = np.empty(0, np.int64)
        self.left = np.empty(0)
        self.context = np.empty(0)
        self.rate = np.empty(0)
        self.kv = 0.0
        self.draft_tokens = 0.0  # drafted a step by the whole batch
        self.steps = 0.0
        self.request_steps = 0.0  # steps times requests, of the steps with drafts
        self.drafted_progress = 0.0  # tokens that those made
        self.busy = 0.0
        self.kv_seconds = 0.0
        self.history: list[tuple[float, int, float]] = [(0.0, 0, 0.0)]

    @property
    def running(self) -> int:
        return len(self.ids)

    def add(self, request: int, left: float, context: float, stall: float) -> None:
        """A request begins or goes on: `left` tokens to the end of its chunk, `context` KV tokens."""
        self.ids = np.append(self.ids, request)
        self.left = np.append(self.left, left)
        self.context = np.append(self.context, context)
        self.rate = np.append(self.rate, 1.0)
        self.kv += context
        self.stall += stall

    def remove(self, keep: np.ndarray) -> None:
        """Keeps the requests where `keep` is true."""
        self.ids, self.left = self.ids[keep], self.left[keep]
        self.context, self.rate = self.context[keep], self.rate[keep]
        self.kv = float(self.context.sum())

    def note(self) -> None:
        """Adds the present batch and KV use to the history."""
        self.history.append((self.time, self.running, self.kv))

    def _linear(self) -> float:
        """Seconds of a step at the present KV use."""
        tokens = self.running + self.draft_tokens
        return self.costs.step(self.running, tokens, self.kv) + self.costs.draft_per_token * self.draft_tokens

    def _per_kv(self) -> float:
        """Seconds that one more KV token adds to a step."""
        c = self.costs
        return c.per_kv * c.speculation if self.draft_tokens else c.per_kv

    def steps_to_event(self, most: float) -> float:
        """Steps until a chunk ends or the KV memory is full, at most `most`."""
        growth = float(self.rate.sum())
        room = max(self.cluster.kv_capacity - self.kv, 0.0) / growth
        return min(most, room, float((self.left / self.rate).min()))

    def next_event(self, most: float) -> float:
        """The time of the next event; infinity for an idle instance."""
        if not self.running:
            return float("inf")
        s = self.steps_to_event(most)
        return self.time + self.stall + s * (self._linear() + self._per_kv() * float(self.rate.sum()) * s / 2)

    def advance(self, time: float) -> None:
        """Runs up to `time`."""
        seconds = time - self.time
        self.time = time
        if not self.running or seconds <= 0:
            return
        self.busy += seconds
        waited = min(self.stall, seconds)
        self.stall -= waited
        self.kv_seconds += self.kv * waited
        seconds -= waited
        if seconds <= 0:
            return
        growth = float(self.rate.sum())
        linear, square = self._linear(), 2 * self._per_kv() * growth
        steps = 2 * seconds / (linear + np.sqrt(linear * linear + square * seconds))
        progress = np.minimum(self.rate * steps, self.left)
        self.left = self.left - progress
        self.context = self.context + progress
        total = float(progress.sum())
        self.kv_seconds += (self.kv + total / 2) * seconds
        self.kv += total
        self.steps += steps
        if self.draft_tokens:
            self.request_steps += steps * self.running
            self.drafted_progress += total

    def ended(self) -> np.ndarray:
        """Mask of the requests whose chunk has ended."""
        return self.left <= DONE

    @property
    def full(self) -> bool:
        """Whether the KV memory has no room for another step."""
        return self.kv >= self.cluster.kv_capacity - DONE
