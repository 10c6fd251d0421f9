"""Seer's agent-loop manager for verl: ``actor_rollout_ref.rollout.agent.agent_loop_manager_class`` names it.

This module imports verl: only verl's processes load it.
"""

from __future__ import annotations

import logging
from typing import Any

import ray
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.rollout.llm_server import LLMServerClient

from verl_seer import compat
from verl_seer.chunks import stop_token_ids
from verl_seer.client import Origin, SeerClient, kv_capacity, origin
from verl_seer.options import SeerOptions
from verl_seer.router import SeerRouter

logger = logging.getLogger("verl.seer")

# The class behind Ray's decorator, which cannot be derived from.
_Worker: Any = AgentLoopWorkerTQ.__ray_metadata__.modified_class

# Every waiting request is one pending call, and Ray's default would be full at 1000.
RouterActor = ray.remote(max_concurrency=100_000)(SeerRouter)


class SeerAgentLoopWorker(_Worker):
    """verl's worker; every agent loop knows the group that it belongs to."""

    async def _run_agent_loop(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("uid") is not None:
            origin.set(Origin(str(kwargs["uid"]), int(kwargs.get("session_id", 0))))
        return await super()._run_agent_loop(*args, **kwargs)


class SeerAgentLoopManager(AgentLoopManagerTQ):
    """verl's manager with Seer's client and worker, after the router has been told what the servers can hold.

    Raises:
        RuntimeError: this verl lacks something that Seer uses; all of it is named.
        ValueError: options under ``seer``, or the router, are not as they must be.
    """

    def __init__(self, config: Any, llm_client: Any, *args: Any, **kwargs: Any) -> None:
        compat.require()
        options = SeerOptions.of(config)
        _check(config, llm_client)
        _configure(config, llm_client._load_balancer, options)
        model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
        stops = stop_token_ids(
            getattr(model.tokenizer, "eos_token_id", None),
            getattr(model.generation_config, "eos_token_id", None),
        )
        client = SeerClient(
            config=config,
            load_balancer_handle=llm_client._load_balancer,
            stop_ids=stops,
            max_model_len=getattr(model.hf_config, "max_position_embeddings", None),
        )
        super().__init__(config, client, *args, **kwargs)
        self.agent_loop_workers_class = ray.remote(SeerAgentLoopWorker)


def _check(config: Any, llm_client: Any) -> None:
    name = config.actor_rollout_ref.rollout.name
    if name != "vllm":
        raise ValueError(f"actor_rollout_ref.rollout.name must be vllm for Seer, got {name!r}")
    if type(llm_client) is not LLMServerClient:
        raise ValueError(
            f"Seer goes with verl's synchronous trainer, whose client is LLMServerClient, got "
            f"{type(llm_client).__name__}: set trainer.v1.trainer_mode=sync"
        )
    if not hasattr(llm_client._load_balancer, "configure"):
        raise ValueError(
            "actor_rollout_ref.rollout.router_config_path does not name Seer's router: "
            "compose verl's config with +seer=rollout"
        )


def _configure(config: Any, router: Any, options: SeerOptions) -> None:
    """Tells the router its options and each server's capacity."""
    rollout = config.actor_rollout_ref.rollout
    running = options.max_running or int(rollout.max_num_seqs)
    capacity = {}
    for server_id, handle in ray.get(router.handles.remote()).items():
        capacity[server_id] = (options.kv_tokens or kv_capacity(handle), running)
    ray.get(router.configure.remote(options.scheduler(), capacity))
    logger.warning("Seer is on: chunks of %d tokens, capacity %s", options.chunk_size, capacity)
