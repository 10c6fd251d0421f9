"""The options under ``seer`` of verl's config."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from verl_seer.budget import BenefitRule
from verl_seer.context import Estimate, Order
from verl_seer.drafting.engine import EngineOptions
from verl_seer.kv_files import MAX_BYTES
from verl_seer.scheduler import SchedulerConfig

DRAFTER = "verl_seer.drafter.SeerDrafter"  # what vLLM's speculative_config names
DRAFTER_OPTIONS = "seer_drafting"  # in vLLM's additional_config

KV_CONNECTOR = "SeerKVPool"  # a class of kv_pool


@dataclass(frozen=True)
class SeerOptions:
    """What a user may set; see `SchedulerConfig` for the first five.

    Args:
        kv_tokens: KV tokens that each server holds; None asks the servers (vLLM only).
        max_running: most requests a server runs at once; None takes ``rollout.max_num_seqs``.
        priorities: whether the engines are told the buffer's order, by which they preempt; needs
            ``rollout.scheduling_policy=priority``. None: where that is set.
        drafting: whether the engines draft, and share drafts through a server.
        draft_tokens: most tokens drafted for a request in a step.
        kv_pool: folder in memory through which the servers of a machine share KV blocks; None shares none.
        kv_pool_bytes: most bytes in it.
        draft_adaptive, draft_rule, draft_min_score, draft_update_seconds, draft_ttl_seconds: see `EngineOptions`.
    """

    chunk_size: int = SchedulerConfig.chunk_size
    order: Order = SchedulerConfig.order
    fairness_period: int = SchedulerConfig.fairness_period
    affinity_spread: int = SchedulerConfig.affinity_spread
    estimate: Estimate = SchedulerConfig.estimate
    kv_tokens: int | None = None
    max_running: int | None = None
    priorities: bool | None = None
    drafting: bool = True
    draft_tokens: int = EngineOptions.max_draft
    draft_adaptive: bool = EngineOptions.adaptive
    draft_rule: BenefitRule = EngineOptions.rule
    draft_min_score: float = EngineOptions.min_score
    draft_update_seconds: float = EngineOptions.update_seconds
    draft_ttl_seconds: float = EngineOptions.ttl_seconds
    kv_pool: str | None = None
    kv_pool_bytes: int = MAX_BYTES

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
        if self.priorities is not None and not isinstance(self.priorities, bool):
            raise ValueError(f"seer.priorities must be null, true or false, got {self.priorities!r}")
        if not isinstance(self.drafting, bool):
            raise ValueError(f"seer.drafting must be true or false, got {self.drafting!r}")
        if self.kv_pool is not None and not (isinstance(self.kv_pool, str) and os.path.isabs(self.kv_pool)):
            raise ValueError(f"seer.kv_pool must be null or an absolute path, got {self.kv_pool!r}")
        if not _integer(self.kv_pool_bytes) or self.kv_pool_bytes < 1:
            raise ValueError(
                f"seer.kv_pool_bytes must be an integer of at least 1, got {self.kv_pool_bytes!r}"
            )
        try:
            EngineOptions.of(self.drafts())
        except ValueError as error:
            raise ValueError(f"seer.draft_*: {error}") from None

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

    def use_priorities(self, policy: str | None) -> bool:
        """Whether chunks carry a priority to engines with this ``rollout.scheduling_policy``.

        Raises:
            ValueError: they are asked for and the engines would not look at them.
        """
        if self.priorities and policy != "priority":
            raise ValueError(
                f"seer.priorities=true needs actor_rollout_ref.rollout.scheduling_policy=priority, got {policy!r}: "
                "set it, or seer.priorities=null"
            )
        return policy == "priority" and self.priorities is not False

    def scheduler(self) -> dict[str, Any]:
        """Keywords of `SchedulerConfig`."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(SchedulerConfig)}

    def drafts(self) -> dict[str, Any]:
        """Keywords of `EngineOptions`."""
        return {
            "max_draft": self.draft_tokens,
            "adaptive": self.draft_adaptive,
            "rule": self.draft_rule,
            "min_score": self.draft_min_score,
            "update_seconds": self.draft_update_seconds,
            "ttl_seconds": self.draft_ttl_seconds,
        }

    def additional_config(self) -> dict[str, Any] | None:
        """vLLM's option of that name, where the drafter finds its own; None without drafting."""
        return {DRAFTER_OPTIONS: self.drafts()} if self.drafting else None

    def kv_transfer_config(self) -> dict[str, Any] | None:
        """vLLM's option of that name; None without a pool."""
        if self.kv_pool is None:
            return None
        return {
            "kv_connector": KV_CONNECTOR,
            "kv_connector_module_path": "verl_seer.kv_pool",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"folder": self.kv_pool, "max_bytes": self.kv_pool_bytes},
        }

    def speculative_config(self) -> dict[str, Any] | None:
        """vLLM's option of that name; None without drafting."""
        if not self.drafting:
            return None
        return {"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": self.draft_tokens}


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
