"""What the plugin settles before vLLM builds an engine for a Kimi Linear checkpoint.

vLLM calls `KimiLinearSettings.verify_and_update_config` with the configuration of an engine about to start;
it decides whose class serves, refuses what ours cannot do, and hands vLLM the facts that depend on the class.
"""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from typing import Any

from kimi_models import KimiLinearConfig
from vllm_kimi.choice import ENVIRONMENT, Choice, choose_model, read_option

logger = logging.getLogger("vllm.kimi_stack")

ARCHITECTURE = "KimiLinearForCausalLM"
OUR_CLASS = "vllm_kimi.model:KimiLinearForCausalLM"
# Drafts that need nothing of the model but its tokens; the others read hidden states we do not hand out.
DRAFTERS = ("ngram", "suffix", "custom_class")

# vLLM's own registry entry, kept so that a choice of "upstream" can put it back.
_upstream: dict[str, Any] = {}


def kimi_config(model_config: Any) -> KimiLinearConfig:
    """The checked config of the checkpoint behind a vLLM ModelConfig. Raises ConfigError.

    It is read from config.json itself: the classes of vLLM and transformers each fill absent fields with
    defaults of their own.
    """
    overrides = model_config.hf_overrides
    if callable(overrides) or not isinstance(overrides, dict):
        return KimiLinearConfig.from_dict(model_config.hf_config.to_dict())
    raw = _raw_config(model_config.hf_config_path or model_config.model, model_config.revision)
    if raw is None:
        return KimiLinearConfig.from_dict(model_config.hf_config.to_dict())
    return KimiLinearConfig.from_dict({**raw, **overrides})


@lru_cache(maxsize=8)
def _raw_config(model: str, revision: str | None) -> dict[str, Any] | None:
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    return get_hf_file_to_dict("config.json", model, revision)


def register_class(choice: Choice) -> None:
    """Make vLLM's registry serve the chosen class; calling it again, or with the other choice, is fine."""
    from vllm.model_executor.models.registry import ModelRegistry

    current = ModelRegistry.models.get(ARCHITECTURE)
    if current is not None and getattr(current, "module_name", None) != OUR_CLASS.partition(":")[0]:
        _upstream[ARCHITECTURE] = current
    if choice == "ours":
        ModelRegistry.register_model(ARCHITECTURE, OUR_CLASS)
    elif ARCHITECTURE in _upstream:
        ModelRegistry.models[ARCHITECTURE] = _upstream[ARCHITECTURE]


def install() -> None:
    """Put our hook into vLLM's table, in front of one that is there; calling it again is fine."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    before: Any = MODELS_CONFIG_MAP.get(ARCHITECTURE, VerifyAndUpdateConfig)
    if before.__module__ == __name__:
        return

    class KimiLinearSettings(before):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            if apply(vllm_config) == "upstream":
                before.verify_and_update_config(vllm_config)

    MODELS_CONFIG_MAP[ARCHITECTURE] = KimiLinearSettings


def apply(vllm_config: Any) -> Choice:
    """Settle one engine's configuration, in place, and return whose class serves it.

    Raises:
        ValueError: what was asked for cannot run; the message names it and the fix.
    """
    from vllm.platforms import current_platform

    option = read_option(vllm_config.additional_config)
    device = current_platform.device_type
    choice = choose_model(device, os.environ.get(ENVIRONMENT), option)
    if option is not None:
        # Worker processes register from the environment before they see any configuration.
        os.environ[ENVIRONMENT] = choice
        register_class(choice)
    if choice == "upstream":
        return choice
    config = kimi_config(vllm_config.model_config)
    refuse(vllm_config, config)
    _run_eager(vllm_config, device)
    _own_attention(vllm_config, config)
    if vllm_config.speculative_config is not None and vllm_config.cache_config.enable_prefix_caching:
        _speculate_without_prefix_cache(vllm_config)
    return choice


def refuse(vllm_config: Any, config: KimiLinearConfig) -> None:
    """Raise ValueError for what our class does not do."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    tp = parallel.tensor_parallel_size
    la = config.linear_attn_config
    widths = {
        "num_attention_heads": config.num_attention_heads,
        "linear_attn_config.num_heads": la.num_heads,
        "intermediate_size": config.intermediate_size,
    }
    if config.num_experts:
        widths["moe_intermediate_size"] = config.moe_intermediate_size
    for name, value in widths.items():
        if value % tp:
            raise ValueError(
                f"tensor_parallel_size is {tp}, which does not divide {name} ({value}): choose one that does"
            )
    for name, value in (
        ("decode_context_parallel_size", getattr(parallel, "decode_context_parallel_size", 1)),
        ("prefill_context_parallel_size", getattr(parallel, "prefill_context_parallel_size", 1)),
    ):
        if value > 1:
            raise ValueError(f"{name} is {value}: our class keeps each sequence on one rank; leave it at 1")
    if parallel.enable_expert_parallel:
        raise ValueError("enable_expert_parallel is set: our class splits every expert instead; remove it")
    if model.quantization is not None:
        raise ValueError(
            f"quantization is {model.quantization!r}: our class reads float weights; use the bfloat16 checkpoint, "
            f"or {ENVIRONMENT}=upstream on a GPU"
        )
    if vllm_config.cache_config.cache_dtype != "auto":
        raise ValueError(
            f"kv_cache_dtype is {vllm_config.cache_config.cache_dtype!r}: the latent cache has the model's dtype; "
            "leave it at auto"
        )
    drafter = getattr(vllm_config.speculative_config, "method", None)
    if vllm_config.speculative_config is not None and drafter not in DRAFTERS:
        raise ValueError(
            f"speculative method is {drafter!r}: with Kimi Linear our class takes {', '.join(DRAFTERS)}; "
            "use one of them, or remove --speculative-config"
        )


def _run_eager(vllm_config: Any, device: str) -> None:
    """One kernel call does a layer's work already, and compiling costs a minute at every start."""
    from vllm.config import CompilationMode, CUDAGraphMode

    compilation = vllm_config.compilation_config
    compilation.cudagraph_mode = CUDAGraphMode.NONE
    compilation.mode = CompilationMode.NONE
    if device == "cpu" and vllm_config.parallel_config.pipeline_parallel_size > 1:
        # vLLM's CPU worker makes the buffers between stages in its warm-up, which it skips in eager mode when the
        # cache size is given (v1/worker/cpu_worker.py:190). Nothing of ours is compiled in this mode either. vLLM
        # goes back to eager mode for this architecture unless its CUDA graphs are declined.
        os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] = "0"
        compilation.mode = CompilationMode.DYNAMO_TRACE_ONCE
        compilation.backend = "eager"
        compilation.custom_ops = ["all"]


def _own_attention(vllm_config: Any, config: KimiLinearConfig) -> None:
    """Describe the cache as our attention layer keeps it: one head of the latent's width, no MLA of vLLM's."""
    arch = vllm_config.model_config.model_arch_config
    arch.is_deepseek_mla = False
    arch.total_num_kv_heads = 1
    arch.head_size = config.latent_dim
    if not config.linear_attn_config.kda_layers:
        # A hybrid class whose layers all keep a plain cache: vLLM goes by this list (ModelConfig.is_hybrid).
        vllm_config.model_config.hf_config.layer_types = ["full_attention"] * config.num_hidden_layers


def _speculate_without_prefix_cache(vllm_config: Any) -> None:
    """With drafts, vLLM moves cached states by a Triton kernel only (its postprocess of "align" mode)."""
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        logger.warning("prefix caching is off: with speculative decoding it needs Triton, which is absent here")
        vllm_config.cache_config.enable_prefix_caching = False
