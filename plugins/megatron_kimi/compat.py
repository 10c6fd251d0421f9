"""The only place that lists what the plugin uses of Megatron, and in which versions it is known to be there.

`python -m megatron_kimi.compat` checks the Megatron that this Python would import.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import lru_cache
from pathlib import Path

from kimi_stack.compat import Hook, LiveSource, Source, TreeSource, missing

# Series that the tests train with. Another one may work: only the rows below decide.
TESTED = ("0.16", "0.19")

_OPTIMIZER = "megatron.core.optimizer"
_WRAPPERS = f"{_OPTIMIZER}.optimizer"
_SHARDED = f"{_OPTIMIZER}.distrib_optimizer:DistributedOptimizer"
_STATE = "megatron.core.parallel_state"

CORE_HOOKS: tuple[Hook, ...] = (
    Hook(
        f"{_OPTIMIZER}:get_megatron_optimizer",
        (
            "config",
            "model_chunks",
            "config_overrides",
            "use_gloo_process_groups",
            "pg_collection",
            "dump_param_to_param_group_map",
        ),
        "the optimizer chain",
    ),
    Hook(f"{_OPTIMIZER}:USING_PYTORCH_OPTIMIZER", (), "the inner optimizer"),
    Hook(f"{_OPTIMIZER}:DistributedOptimizer", (), "the distributed optimizer"),
    Hook(f"{_OPTIMIZER}:OptimizerConfig.optimizer", (), "the optimizer chain"),
    Hook(f"{_WRAPPERS}:ChainedOptimizer", ("chained_optimizers",), "the optimizer chain"),
    Hook(f"{_WRAPPERS}:ChainedOptimizer.step", (), "QK-Clip"),
    Hook(f"{_WRAPPERS}:MegatronOptimizer.get_parameters", (), "master weights"),
    Hook(f"{_WRAPPERS}:Float16OptimizerWithFloat16Params.float16_groups", (), "master weights"),
    Hook(f"{_WRAPPERS}:Float16OptimizerWithFloat16Params.fp32_from_float16_groups", (), "master weights"),
    Hook(f"{_WRAPPERS}:Float16OptimizerWithFloat16Params.fp32_from_fp32_groups", (), "master weights"),
    Hook(f"{_SHARDED}._get_main_param_and_optimizer_states", ("model_param",), "checkpoints"),
    Hook(f"{_SHARDED}._set_main_param_and_optimizer_states", ("model_param", "tensors"), "checkpoints"),
    Hook(f"{_SHARDED}._get_model_param_range_map", ("param",), "master shards"),
    Hook(
        f"{_SHARDED}._build_optimizer_group_ranges",
        ("param_groups",),
        "master shards (model_param_group_index_map)",
    ),
    Hook(f"{_SHARDED}.buffers", (), "master shards"),
    Hook(f"{_SHARDED}.data_parallel_group", (), "master shards"),
    Hook(
        "megatron.core.process_groups_config:ProcessGroupCollection.setup_process_groups_for_optimizer",
        ("pg_collection", "model_chunks", "use_gloo_process_groups"),
        "process groups",
    ),
    Hook(f"{_STATE}:get_tensor_model_parallel_group", (), "process groups"),
    Hook(f"{_STATE}:get_expert_tensor_parallel_group", ("check_initialized",), "process groups"),
    Hook(f"{_STATE}:get_model_parallel_group", (), "logging"),
    Hook(
        "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer.param_index_map",
        (),
        "master shards",
    ),
    Hook("megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucket.offset", (), "master shards"),
    Hook(
        "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucket.grad_data", (), "master shards"
    ),
    Hook("megatron.core.transformer.attention:Attention.core_attention", (), "attention logits"),
    Hook("megatron.core.transformer.attention:SelfAttention.linear_qkv", (), "QK-Clip"),
    Hook(
        "megatron.core.transformer.multi_latent_attention:MLASelfAttention.linear_kv_up_proj", (), "QK-Clip"
    ),
    Hook(
        "megatron.core.transformer.dot_product_attention:DotProductAttention.forward",
        ("query", "key"),
        "attention logits",
    ),
    Hook(
        "megatron.core.transformer.dot_product_attention:DotProductAttention.softmax_scale",
        (),
        "attention logits",
    ),
)
# Imported from one of several packages, so only an import tells.
LIVE_HOOKS: tuple[Hook, ...] = (Hook(f"{_OPTIMIZER}:Adam", (), "the inner optimizer"),)
TRAINING_HOOKS: tuple[Hook, ...] = (
    Hook("megatron.training.arguments:add_megatron_arguments", ("parser",), "the flags"),
    Hook("megatron.training.arguments:validate_args", ("args",), "checking the flags"),
    Hook("megatron.training.training:get_megatron_optimizer", ("config", "model_chunks"), "the optimizer"),
    Hook("megatron.training.training:get_args", (), "the flags"),
    Hook("megatron.training.global_vars:get_tensorboard_writer", (), "logging"),
    Hook("megatron.training.global_vars:get_wandb_writer", (), "logging"),
)


def root() -> Path | None:
    """The folder whose ``megatron/core`` this Python would import; a checkout may shadow the wheel."""
    spec = importlib.util.find_spec("megatron.core") if importlib.util.find_spec("megatron") else None
    return None if spec is None or spec.origin is None else Path(spec.origin).parents[2]


def version() -> str | None:
    """The version of that megatron.core, read from its files; None if there is none."""
    folder = root()
    if folder is None:
        return None
    text = (folder / "megatron" / "core" / "package_info.py").read_text(encoding="utf-8")
    parts = [re.search(rf"^{name}\s*=\s*(\d+)", text, re.M) for name in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(m.group(1) for m in parts if m)


def tested(release: str) -> bool:
    """The tests train with this series."""
    return ".".join(release.split(".")[:2]) in TESTED


def problems(source: Source | None = None) -> list[str]:
    """What the Megatron here lacks, one line each; parsed from its files if no source is given."""
    folder = root()
    if source is None:
        if folder is None:
            return ["megatron.core is not installed"]
        source = TreeSource(folder)
    hooks = [*CORE_HOOKS]
    if folder is not None and (folder / "megatron" / "training" / "training.py").is_file():
        hooks += TRAINING_HOOKS
    return missing(hooks, source)


@lru_cache(maxsize=1)
def require() -> None:
    """Check the core that is imported.

    Raises:
        RuntimeError: names what is missing.
    """
    import megatron.core

    lacking = missing(CORE_HOOKS + LIVE_HOOKS, LiveSource())
    if lacking:
        raise RuntimeError(
            f"MuonClip cannot work with megatron.core {megatron.core.__version__} "
            f"(it is tested with {' and '.join(f'{s}.x' for s in TESTED)}): " + "; ".join(lacking)
        )


def main() -> int:
    release, found = version(), problems()
    if not found:
        print(f"megatron.core {release}: all symbols are there")
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
