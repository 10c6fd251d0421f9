"""The only place that knows where vLLM keeps what the plugin uses, and in which versions.

`python -m vllm_kimi.compat --snapshot FOLDER VERSION` writes the facts of a version that cannot run here, read
from an unpacked wheel without importing it; `python -m vllm_kimi.compat` checks the vLLM that is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path

from kimi_stack.compat import Hook, Source, TreeSource, missing, snapshot

# Series whose every row below has been checked: live, or against a snapshot of the wheel.
SUPPORTED = ("0.32", "0.33")

SNAPSHOTS = Path(__file__).with_name("snapshots")

_LAYERS = "vllm.model_executor.layers"

HOOKS: tuple[Hook, ...] = (
    # registration and settings
    Hook("vllm.plugins:load_general_plugins", (), "the entry point"),
    Hook("vllm.platforms:current_platform", (), "the choice of class"),
    Hook(
        "vllm.model_executor.models.registry:_ModelRegistry.register_model",
        ("model_arch", "model_cls"),
        "registering our class",
    ),
    Hook("vllm.model_executor.models.registry:ModelRegistry", (), "registering our class"),
    Hook("vllm.model_executor.models.registry:_LazyRegisteredModel.module_name", (), "knowing vLLM's own class"),
    Hook("vllm.model_executor.models.config:MODELS_CONFIG_MAP", (), "the settings hook"),
    Hook(
        "vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_config",
        ("vllm_config",),
        "the settings hook",
    ),
    Hook("vllm.transformers_utils.repo_utils:get_hf_file_to_dict", ("file_name", "model"), "reading config.json"),
    Hook("vllm.config:VllmConfig", (), "the settings hook"),
    Hook("vllm.config.vllm:VllmConfig.additional_config", (), "the model option"),
    Hook("vllm.config.vllm:VllmConfig.num_speculative_tokens", (), "state slots for drafts"),
    Hook("vllm.config:CompilationMode", (), "eager execution"),
    Hook("vllm.config:CUDAGraphMode", (), "eager execution"),
    Hook("vllm.config.cache:CacheConfig.enable_prefix_caching", (), "prefix caching"),
    Hook("vllm.config.cache:CacheConfig.cache_dtype", (), "the latent cache"),
    Hook("vllm.config.cache:CacheConfig.mamba_cache_dtype", (), "the KDA state"),
    Hook("vllm.config.cache:CacheConfig.mamba_cache_mode", (), "prefix caching"),
    Hook("vllm.config.model_arch:ModelArchitectureConfig.is_deepseek_mla", (), "our own attention"),
    Hook("vllm.config.model_arch:ModelArchitectureConfig.total_num_kv_heads", (), "our own attention"),
    Hook("vllm.config.model_arch:ModelArchitectureConfig.head_size", (), "our own attention"),
    Hook("vllm.config.model:ModelConfig.is_hybrid", (), "a model without KDA layers"),
    Hook("vllm.config.speculative:SpeculativeConfig.method", (), "speculative decoding"),
    Hook("vllm.config.parallel:ParallelConfig.enable_expert_parallel", (), "refusing expert parallelism"),
    # the short name
    Hook("vllm.transformers_utils.utils:maybe_model_redirect", ("model",), "the short model name"),
    Hook("vllm.envs:VLLM_MODEL_REDIRECT_PATH", (), "the short model name"),
    Hook("vllm.engine.arg_utils:maybe_override_with_speculators", ("model",), "the short model name"),
    Hook("vllm.engine.arg_utils:get_model_path", ("model",), "the short model name"),
    # the model
    Hook("vllm.distributed:get_pp_group", (), "pipeline parallelism"),
    Hook("vllm.distributed:get_tensor_model_parallel_rank", (), "tensor parallelism"),
    Hook("vllm.distributed:get_tensor_model_parallel_world_size", (), "tensor parallelism"),
    Hook("vllm.distributed:tensor_model_parallel_all_reduce", ("input_",), "tensor parallelism"),
    Hook("vllm.forward_context:get_forward_context", (), "batch metadata"),
    Hook("vllm.forward_context:ForwardContext.attn_metadata", (), "batch metadata"),
    Hook("vllm.sequence:IntermediateTensors", ("tensors",), "pipeline parallelism"),
    Hook(f"{_LAYERS}.layernorm:RMSNorm.variance_epsilon", (), "norms"),
    Hook("vllm.model_executor.custom_op:CustomOp.forward_cpu", (), "norms"),
    Hook("vllm._custom_ops:rms_norm", ("out", "input", "weight", "epsilon"), "norms"),
    Hook("vllm._custom_ops:fused_add_rms_norm", ("input", "residual", "weight", "epsilon"), "norms"),
    Hook("vllm.compilation.breakable_cudagraph:is_breakable_cudagraph_enabled", (), "pipeline parallelism on a CPU"),
    Hook(f"{_LAYERS}.layernorm:RMSNorm", ("hidden_size", "eps"), "norms"),
    Hook(f"{_LAYERS}.layernorm:RMSNorm.weight", (), "norms"),
    Hook(f"{_LAYERS}.logits_processor:LogitsProcessor", ("vocab_size",), "logits"),
    Hook(
        f"{_LAYERS}.vocab_parallel_embedding:VocabParallelEmbedding",
        ("num_embeddings", "embedding_dim", "prefix"),
        "the embedding",
    ),
    Hook(
        f"{_LAYERS}.vocab_parallel_embedding:VocabParallelEmbedding.weight_loader",
        ("param", "loaded_weight"),
        "loading",
    ),
    Hook(
        f"{_LAYERS}.vocab_parallel_embedding:ParallelLMHead",
        ("num_embeddings", "embedding_dim", "prefix"),
        "the output layer",
    ),
    Hook("vllm.model_executor.models.interfaces:HasInnerState", (), "the model's interfaces"),
    Hook("vllm.model_executor.models.interfaces:IsHybrid", (), "the model's interfaces"),
    Hook("vllm.model_executor.models.interfaces:SupportsPP", (), "the model's interfaces"),
    Hook("vllm.model_executor.models.utils:PPMissingLayer", (), "pipeline parallelism"),
    Hook(
        "vllm.model_executor.models.utils:make_layers",
        ("num_hidden_layers", "layer_fn", "prefix"),
        "pipeline parallelism",
    ),
    Hook("vllm.model_executor.models.utils:maybe_prefix", ("prefix", "name"), "layer names"),
    # the KDA layer and its state
    Hook(f"{_LAYERS}.mamba.abstract:MambaBase.bind_kv_cache", ("kv_cache",), "the KDA state"),
    Hook(f"{_LAYERS}.mamba.abstract:MambaBase.get_kv_cache_spec", ("vllm_config",), "the KDA state"),
    Hook(
        f"{_LAYERS}.mamba.mamba_utils:MambaStateShapeCalculator.kda_state_shape",
        ("tp_world_size", "num_heads", "head_dim", "conv_kernel_size", "num_spec"),
        "the KDA state",
    ),
    Hook(
        f"{_LAYERS}.mamba.mamba_utils:MambaStateDtypeCalculator.kda_state_dtype",
        ("model_dtype", "mamba_cache_dtype"),
        "the KDA state",
    ),
    Hook(
        f"{_LAYERS}.mamba.mamba_utils:MambaStateCopyFuncCalculator.kda_state_copy_func", (), "prefix caching"
    ),
    Hook(f"{_LAYERS}.mamba.mamba_utils:MambaStateCopyFunc", (), "prefix caching"),
    Hook(f"{_LAYERS}.mamba.mamba_utils:is_conv_state_dim_first", (), "the KDA state"),
    Hook("vllm.v1.worker.mamba_utils:batch_memcpy", ("src_ptrs", "dst_ptrs", "sizes"), "prefix caching on a CPU"),
    Hook("vllm.triton_utils:HAS_TRITON", (), "prefix caching on a CPU"),
    Hook("vllm.v1.attention.backends.registry:MambaAttentionBackendEnum.GDN_ATTN", (), "the KDA state"),
    Hook(
        "vllm.v1.attention.backends.gdn_attn:GDNAttentionMetadataBuilder.build",
        ("common_prefix_len", "common_attn_metadata", "num_accepted_tokens", "num_decode_draft_tokens_cpu"),
        "KDA batch metadata",
    ),
    Hook(
        "vllm.v1.attention.backend:AttentionMetadataBuilder.update_block_table",
        ("metadata", "blk_table", "slot_mapping"),
        "KDA batch metadata",
    ),
    Hook("vllm.v1.kv_cache_interface:MambaSpec", (), "the KDA state"),
    # the latent attention layer
    Hook(f"{_LAYERS}.attention_layer_base:AttentionLayerBase.get_attn_backend", (), "the attention layer"),
    Hook(
        f"{_LAYERS}.attention_layer_base:AttentionLayerBase.get_kv_cache_spec", ("vllm_config",), "the attention layer"
    ),
    Hook(f"{_LAYERS}.attention_layer_base:AttentionLayerBase.bind_kv_cache", ("kv_cache",), "the attention layer"),
    Hook("vllm.v1.attention.backend:AttentionBackend.customize_spec", ("spec",), "the latent cache"),
    Hook(
        "vllm.v1.attention.backend:AttentionBackend.get_supported_kernel_block_sizes",
        ("kv_cache_spec",),
        "the latent cache",
    ),
    Hook("vllm.v1.attention.backend:AttentionBackend.is_ssm", (), "the KDA state"),
    Hook(
        "vllm.v1.attention.backend:AttentionMetadataBuilder",
        ("kv_cache_spec", "layer_names", "vllm_config", "device"),
        "batch metadata",
    ),
    Hook(
        "vllm.v1.attention.backend:AttentionMetadataBuilder._init_reorder_batch_threshold",
        ("reorder_batch_threshold", "supports_spec_as_decode"),
        "decodes first",
    ),
    *(
        Hook(f"vllm.v1.attention.backend:CommonAttentionMetadata.{name}", (), "batch metadata")
        for name in (
            "query_start_loc",
            "query_start_loc_cpu",
            "seq_lens",
            "num_reqs",
            "num_actual_tokens",
            "max_query_len",
            "block_table_tensor",
            "slot_mapping",
        )
    ),
    Hook("vllm.v1.attention.backend:MultipleOf", ("base",), "the latent cache"),
    Hook(
        "vllm.v1.kv_cache_interface:FullAttentionSpec",
        ("block_size", "num_kv_heads", "head_size", "dtype"),
        "the latent cache",
    ),
    Hook("vllm.v1.kv_cache_interface:AttentionSpec.head_size_v", (), "the latent cache"),
)


def supported() -> str:
    """The supported versions, for messages: ``0.32.x or 0.33.x``."""
    return " or ".join(f"{series}.x" for series in SUPPORTED)


def version_problem(version: str) -> str | None:
    """None if this vLLM version is one we support, otherwise what is wrong with it."""
    match = re.match(r"(\d+\.\d+)", version)
    if match is not None and match.group(1) in SUPPORTED:
        return None
    return f"vLLM {version} is not supported: the plugin knows {supported()}"


def installed_version() -> str | None:
    """Version of the vLLM that this Python would import, without importing it; None if there is none."""
    file = _root() and _root() / "vllm" / "_version.py"  # type: ignore[operator]
    if not file or not file.is_file():
        return None
    match = re.search(r"^(?:__version__\s*=\s*)?(?:version\s*=\s*)?['\"]([^'\"]+)['\"]", file.read_text(), re.M)
    return match.group(1) if match else None


def problems(version: str | None = None, source: Source | None = None) -> list[str]:
    """What keeps the plugin from working, one line each; empty where all is well.

    Args:
        version: the vLLM version to judge; the installed one if None.
        source: where to look symbols up; the files of the installed vLLM if None (nothing is imported).
    """
    version = installed_version() if version is None else version
    if version is None:
        return ["vLLM is not installed"]
    wrong = version_problem(version)
    if source is None:
        root = _root()
        assert root is not None
        source = TreeSource(root)
    return [*filter(None, [wrong]), *missing(HOOKS, source)]


def _root() -> Path | None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent.parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vllm_kimi.compat", description=__doc__)
    parser.add_argument(
        "--snapshot",
        nargs=2,
        metavar=("FOLDER", "VERSION"),
        help="write the facts of an unpacked wheel of VERSION in FOLDER",
    )
    options = parser.parse_args(arguments)
    if options.snapshot is None:
        found = problems()
        print("\n".join(found) or f"vLLM {installed_version()}: all {len(HOOKS)} symbols are there")
        return 1 if found else 0
    folder, version = options.snapshot
    command = f"python -m vllm_kimi.compat --snapshot FOLDER {version}  (FOLDER: the unpacked wheel vllm=={version})"
    SNAPSHOTS.mkdir(exist_ok=True)
    target = SNAPSHOTS / f"vllm-{version}.json"
    target.write_text(snapshot(HOOKS, TreeSource(folder), version=version, command=command), encoding="utf-8")
    found = problems(version, TreeSource(folder))
    print("\n".join(found) or f"{target.name}: all {len(HOOKS)} symbols are there")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
