"""The options under ``seer`` of verl's config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from verl_seer.context import Order
from verl_seer.scheduler import SchedulerConfig


@dataclass(frozen=True)
class SeerOptions:
    """What a user may set; see `SchedulerConfig` for the first four.

    Args:
        kv_tokens: KV tokens that each server holds; None asks the servers (vLLM only).
        max_running: most requests a server runs at once; None takes ``rollout.max_num_seqs``.
    """

    chunk_size: int = SchedulerConfig.chunk_size
    order: Order = SchedulerConfig.order
    fairness_period: int = SchedulerConfig.fairness_period
    affinity_spread: int = SchedulerConfig.affinity_spread
    kv_tokens: int | None = None
    max_running: int | None = None

    def __post_init__(self) -> None:
        for name in ("chunk_size", "fairness_period", "affinity_spread"):
            if not _integer(getattr(self, name)):
                raise ValueError(f"seer.{name} must be an integer, got {getattr(self, name)!r}")
        for name in ("kv_tokens", "max_running"):
            value = getattr(self, name)
            if value is not None and (not _integer(value) or value < 1):
                raise ValueError(f"seer.{name} must be null or an integer of at least 1, got {value!r}")
        if self.order == "oracle":
            raise ValueError("seer.order must not be oracle: only a simulation knows the lengths")
        SchedulerConfig(**self.scheduler())

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> SeerOptions:
        """The options of verl's whole config; those that are not there have their defaults.

        Raises:
            ValueError: an unknown name or a value out of range.
        """
        given = dict(config.get("seer") or {})
        names = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ValueError(f"seer has unknown options {unknown}: it takes {', '.join(names)}")
        return cls(**given)

    def scheduler(self) -> dict[str, Any]:
        """Keywords of `SchedulerConfig`."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(SchedulerConfig)}


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
