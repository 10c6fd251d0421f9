"""The only place that lists what the plugin uses of verl, and in which version it is known to be there.

`python -m verl_seer.compat` checks the verl that this Python would import.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path

from kimi_stack.compat import Hook, LiveSource, Source, TreeSource, missing

TESTED = "0.9.1"
TESTED_VLLM = "0.32.0"

_SERVER = "verl.workers.rollout.llm_server:LLMServerClient"
_TQ = "verl.trainer.ppo.v1.agent_loop_tq"

HOOKS: tuple[Hook, ...] = (
    Hook(_SERVER, ("config", "load_balancer_handle"), "divided generation"),
    Hook(f"{_SERVER}._load_balancer", (), "the router"),
    Hook(f"{_SERVER}.generate", ("request_id", "prompt_ids", "sampling_params"), "divided generation"),
    Hook(f"{_SERVER}._acquire_server", ("request_id",), "placing chunks"),
    Hook(f"{_SERVER}._release_server", ("server_id", "request_id"), "placing chunks"),
    Hook(f"{_SERVER}._vllm_request_id", ("request_id",), "the group's name in the engine"),
    Hook("verl.workers.rollout.replica:TokenOutput.token_ids", (), "joining chunks"),
    Hook("verl.workers.rollout.replica:TokenOutput.log_probs", (), "joining chunks"),
    Hook("verl.workers.rollout.replica:TokenOutput.routed_experts", (), "joining chunks"),
    Hook("verl.workers.rollout.replica:TokenOutput.stop_reason", (), "joining chunks"),
    Hook("verl.workers.rollout.replica:TokenOutput.num_preempted", (), "joining chunks"),
    Hook("verl.workers.rollout.replica:TokenOutput.extra_fields", (), "joining chunks"),
    Hook("verl.utils:normalize_token_ids", (), "divided generation"),
    Hook("verl.workers.rollout.router:get_router_handle", ("servers", "router_config_path"), "the router"),
    Hook("verl.workers.rollout.router:GlobalRequestLoadBalancer.acquire_server", (), "the simulator's stock"),
    Hook(f"{_TQ}:AgentLoopWorkerTQ", (), "the group's id"),
    Hook("verl.experimental.agent_loop.agent_loop:AgentLoopWorker._run_agent_loop", (), "the group's id"),
    Hook(f"{_TQ}:AgentLoopManagerTQ.create", (), "the manager"),
    Hook("verl.workers.config.rollout:AgentLoopConfig.agent_loop_manager_class", (), "the manager"),
    Hook("verl.workers.config.rollout:RolloutConfig.router_config_path", (), "the router"),
    Hook("verl.workers.config.rollout:RolloutConfig.max_num_seqs", (), "capacities"),
    Hook("verl.workers.config.model:HFModelConfig.generation_config", (), "stop tokens"),
    Hook("verl.workers.config.model:HFModelConfig.tokenizer", (), "stop tokens"),
    Hook("verl.workers.config.model:HFModelConfig.hf_config", (), "the model's context"),
    Hook("verl.utils.config:omega_conf_to_dataclass", (), "stop tokens"),
)
CPU_HOOKS: tuple[Hook, ...] = (
    Hook("verl.plugin.platform.platform_manager:PlatformRegistry.register", ("platform",), "the platform"),
    Hook("verl.plugin.platform.platform_manager:PlatformRegistry.get", ("name",), "the platform"),
    Hook("verl.plugin.platform.platform_base:PlatformBase", (), "the platform"),
    Hook("verl.workers.engine.base:EngineRegistry.get_engine_cls", (), "VERL_ENGINE_DEVICE"),
)
_VLLM_SERVER = "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer"
SERVER_HOOKS: tuple[Hook, ...] = (  # not looked at in a running trainer: the module imports vLLM
    Hook(f"{_VLLM_SERVER}.launch_server", (), "starting a lost server again"),
    Hook(f"{_VLLM_SERVER}.set_global_steps", ("global_steps",), "starting a lost server again"),
)
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
VLLM_HOOKS: tuple[Hook, ...] = (
    Hook("vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer", (), "drafting"),
    Hook(f"{_RUNNER}.propose_draft_token_ids", ("scheduler_output", "sampled_token_ids"), "drafting"),
    Hook(f"{_RUNNER}._input_fits_in_drafter", (), "drafts near the model's context"),
    Hook("vllm.v1.sample.rejection_sampler:apply_sampling_constraints", ("logits",), "steps without drafts"),
    Hook(
        "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",
        ("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"),
        "temperatures of drafts",
    ),
    Hook("vllm.v1.core.sched.output:SchedulerOutput.scheduled_spec_decode_tokens", (), "accepted tokens"),
    Hook("vllm.v1.core.sched.output:SchedulerOutput.total_num_scheduled_tokens", (), "step times"),
    Hook("vllm.v1.worker.gpu_input_batch:InputBatch.req_ids", (), "the group of a request"),
    Hook("vllm.v1.worker.gpu_input_batch:CachedRequestState.sampling_params", (), "limits of drafts"),
    Hook("vllm.v1.worker.worker_base:WorkerBase", (), "the draft server's address"),
    Hook("vllm.distributed.parallel_state:get_tp_group", (), "drafting once per engine"),
    Hook("vllm.config:VllmConfig.additional_config", (), "options of the drafter"),
    Hook("vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1", (), "the KV pool"),
    Hook("vllm.distributed.kv_transfer.kv_connector.v1.base:SupportsHMA", (), "the KV pool"),
    Hook("vllm.v1.kv_cache_interface:FullAttentionSpec", (), "the KV pool"),
)


def root(package: str = "verl") -> Path | None:
    """The folder whose `package` this Python would import."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parents[1]


def version() -> str | None:
    """The version of the installed distribution; None if there is none."""
    try:
        return importlib.metadata.version("verl")
    except importlib.metadata.PackageNotFoundError:
        return None


def problems(source: Source | None = None) -> list[str]:
    """What the verl here lacks, one line each; parsed from its files if no source is given."""
    if source is None:
        folder = root()
        if folder is None:
            return ["verl is not installed"]
        source = TreeSource(folder)
    return missing(HOOKS + CPU_HOOKS + SERVER_HOOKS, source)


def vllm_problems(source: Source | None = None) -> list[str]:
    """What the vLLM here lacks for drafting, one line each; parsed from its files if no source is given."""
    if source is None:
        folder = root("vllm")
        if folder is None:
            return ["vllm is not installed"]
        source = TreeSource(folder)
    return missing(VLLM_HOOKS, source)


@lru_cache(maxsize=1)
def require() -> None:
    """Check the verl that is imported.

    Raises:
        RuntimeError: names what is missing.
    """
    lacking = missing(HOOKS, LiveSource())
    if lacking:
        raise RuntimeError(
            f"Seer cannot work with verl {version()} (it is tested with {TESTED}): " + "; ".join(lacking)
        )


@lru_cache(maxsize=1)
def require_vllm() -> None:
    """Check the vLLM that is imported.

    Raises:
        RuntimeError: names what is missing.
    """
    lacking = missing(VLLM_HOOKS, LiveSource())
    if lacking:
        raise RuntimeError(
            f"Seer cannot draft in this vLLM (it is tested with {TESTED_VLLM}): " + "; ".join(lacking)
        )


def main() -> int:
    found = problems() + vllm_problems()
    print("\n".join(found) if found else f"verl {version()} and its vLLM: all symbols are there")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
