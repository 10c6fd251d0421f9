"""What a decoding step costs, and how far it gets: the model of an inference instance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from verl_seer.budget import tokens_per_step


@dataclass(frozen=True)
class StepModel:
    """Seconds of a decoding step: a sum of the terms below.

    Args:
        fixed: of any step, whatever the batch.
        per_request: of each request in the batch: scheduling, sampling, detokenisation.
        per_token: of each token that the target model computes, drafted ones included.
        per_kv: of each KV token that the batch attends to.
        draft_per_token: of making one drafted token.
        speculation: factor on the terms other than per_token of a step that verifies drafts: attention over several
            queries, sampling and rejection, the drafter's own calls. At least 1.
        prefill_rate: tokens per second of a prompt, or of a preempted request that is computed again.
        transfer_rate: KV tokens per second between an instance and the global pool.
    """

    fixed: float
    per_request: float
    per_token: float
    per_kv: float
    draft_per_token: float
    prefill_rate: float
    transfer_rate: float
    speculation: float = 1.0

    def __post_init__(self) -> None:
        for name in ("fixed", "prefill_rate", "transfer_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("per_request", "per_token", "per_kv", "draft_per_token"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.speculation >= 1:
            raise ValueError(f"speculation must be at least 1, got {self.speculation}")

    def step(self, requests: int, tokens: float, kv_tokens: float) -> float:
        """Seconds of a step over `requests` requests and `tokens` tokens that attends to `kv_tokens`."""
        rest = self.fixed + self.per_request * requests + self.per_kv * kv_tokens
        if tokens > requests:
            rest *= self.speculation
        return rest + self.per_token * tokens


@dataclass(frozen=True)
class BatchCosts:
    """The costs that Algorithm 1 asks for: a `StepModel` at the KV use of one moment, drafts of `paths` branches."""

    model: StepModel
    kv_tokens: float
    paths: int = 1

    def draft(self, batch: int, length: int) -> float:
        return self.model.draft_per_token * batch * length * self.paths

    def forward(self, batch: int, length: int) -> float:
        return self.model.step(batch, batch * (1 + length * self.paths), self.kv_tokens)


# Seer, table of mean accepted lengths when 0, 1, 5, 15 other responses of the group are known, for linear drafts and
# drafts of 2 and 4 branches. Drafts are taken to be of GAMMA_OF_TABLE tokens; the paper does not say.
SIBLINGS = (0, 1, 5, 15)
ACCEPTED = {1: (1.70, 2.04, 2.32, 2.53), 2: (1.77, 2.14, 2.44, 2.69), 4: (1.85, 2.25, 2.59, 2.85)}
PATHS = tuple(ACCEPTED)
GAMMA_OF_TABLE = 8


def acceptance_of(mean_length: float, gamma: int = GAMMA_OF_TABLE) -> float:
    """The acceptance per position at which drafts of `gamma` tokens give steps of `mean_length` tokens."""
    if not 1 <= mean_length <= gamma + 1:
        raise ValueError(f"mean_length must be in 1..{gamma + 1}, got {mean_length}")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens_per_step(middle, gamma) < mean_length else (low, middle)
    return (low + high) / 2


@lru_cache(maxsize=4096)
def acceptance(siblings: float, paths: int) -> float:
    """Acceptance per position with `siblings` other responses known, between the table's by log(1 + siblings)."""
    at = math.log2(1 + min(max(siblings, 0.0), SIBLINGS[-1]))
    knots = [math.log2(1 + n) for n in SIBLINGS]
    values = ACCEPTED[paths]
    for i in range(len(knots) - 1):
        if at <= knots[i + 1]:
            share = (at - knots[i]) / (knots[i + 1] - knots[i])
            break
    return acceptance_of(values[i] + share * (values[i + 1] - values[i]))
