"""Stand-in, see arguments.py."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from .global_vars import get_args


def setup_optimizer(model: list[Any], **options: Any) -> Any:
    args = get_args()
    config = OptimizerConfig(
        optimizer=args.optimizer, weight_decay=args.weight_decay, adam_beta2=args.adam_beta2, **options
    )
    return get_megatron_optimizer(config, model, use_gloo_process_groups=True)
