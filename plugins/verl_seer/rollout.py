"""Seer's agent-loop manager for verl: ``actor_rollout_ref.rollout.agent.agent_loop_manager_class`` names it.

This module imports verl: only verl's processes load it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import ray
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.rollout.llm_server import LLMServerClient

from verl_seer import compat
from verl_seer.chunks import stop_token_ids
from verl_seer.client import Origin, SeerClient, kv_capacity, origin, same_weights, weights_step
from verl_seer.drafter import CONTROL
from verl_seer.drafting.engine import DraftCounts
from verl_seer.drafting.link import DraftService
from verl_seer.drafting.store import DraftServer
from verl_seer.options import DRAFTER, KV_CONNECTOR, SeerOptions
from verl_seer.router import SeerRouter

logger = logging.getLogger("verl.seer")

# The class behind Ray's decorator, which cannot be derived from.
_Worker: Any = AgentLoopWorkerTQ.__ray_metadata__.modified_class

# Every waiting request is one pending call, and Ray's default would be full at 1000.
RouterActor = ray.remote(max_concurrency=100_000)(SeerRouter)


class DraftServerProcess:
    """The draft server: everything that the responses of the rollout have said so far.

    The engines reach it over a socket, because a worker of vLLM is not a process of Ray's.
    """

    def __init__(self) -> None:
        alone = sum(node["Alive"] for node in ray.nodes()) == 1
        host = "127.0.0.1" if alone else ray.util.get_node_ip_address()
        self._service = DraftService(DraftServer(), f"tcp://{host}:0")

    def address(self) -> str:
        """Where the engines find it."""
        return self._service.address

    def new_weights(self) -> None:
        """Forgets everything."""
        self._service.new_weights()

    def stats(self) -> dict[str, Any]:
        """See `DraftService.stats`."""
        return self._service.stats()


DraftActor = ray.remote(DraftServerProcess)


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
        _check(config, llm_client, options)
        _configure(config, llm_client._load_balancer, options)
        self._router = llm_client._load_balancer
        self._drafts = _start_drafting(config, self._router) if options.drafting else None
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
            priorities=options.use_priorities(config.actor_rollout_ref.rollout.get("scheduling_policy")),
        )
        super().__init__(config, client, *args, **kwargs)
        self.agent_loop_workers_class = ray.remote(SeerAgentLoopWorker)

    def generate_sequences(self, prompts: Any) -> None:
        """As verl's. A rollout starts with empty drafts: the weights have changed since the last one.

        Servers that were lost and run again take part from here on, if they have got weights meanwhile.

        Raises:
            ValueError: the servers have not all got the same weights.
        """
        for server_id, server in ray.get(self._router.restarted.remote()).items():
            if weights_step(server) is not None:
                if self._drafts is not None:
                    _connect(server, self._drafts)
                ray.get(self._router.add_servers.remote({server_id: server}))
        same_weights(ray.get(self._router.handles.remote()))
        if self._drafts is not None:
            try:
                print(_said(ray.get(self._drafts.stats.remote())), flush=True)
                ray.get(self._drafts.new_weights.remote())
            except ray.exceptions.RayActorError as error:
                logger.warning("Seer: the draft server is lost, every engine drafts for itself: %s", error)
                self._drafts = None
        super().generate_sequences(prompts)


def _engine_option(rollout: Any, name: str) -> Mapping[str, Any]:
    """An option of vLLM that is a mapping; our YAML gives them as JSON."""
    value = (rollout.engine_kwargs.get("vllm") or {}).get(name) or {}
    return json.loads(value) if isinstance(value, str) else value


def _said(stats: dict[str, Any]) -> str:
    """One line on what the engines have drafted up to their last exchange with the server."""
    total = {name: sum(counts[name] for counts in stats["engines"].values()) for name in vars(DraftCounts())}
    share = total["own_seconds"] / total["step_seconds"] if total["step_seconds"] else 0.0
    return (
        f"Seer drafts: {total['accepted']} of {total['drafted']} tokens accepted in {total['drafts']} drafts, "
        f"{total['received']} tokens from other servers, {share:.2%} of step time"
    )


def _start_drafting(config: Any, router: Any) -> Any:
    """The draft server, which every engine has been told of."""
    rollout = config.actor_rollout_ref.rollout
    mtp = rollout.get("mtp") or {}
    if _engine_option(rollout, "speculative_config").get("model") != DRAFTER or (
        mtp.get("enable") and mtp.get("enable_rollout")
    ):
        raise ValueError(
            "seer.drafting needs vLLM's speculative decoding, which engine_kwargs.vllm.speculative_config or "
            "rollout.mtp use for something else: drop those, or set seer.drafting=false"
        )
    drafts = DraftActor.options(num_cpus=0).remote()
    for server in ray.get(router.handles.remote()).values():
        _connect(server, drafts)
    logger.warning("Seer drafts: server at %s", ray.get(drafts.address.remote()))
    return drafts


def _connect(server: Any, drafts: Any) -> None:
    """Tells an engine where the draft server is."""
    address = ray.get(drafts.address.remote())
    ray.get(server.collective_rpc.remote(CONTROL, args=("connect", address)))


def _check(config: Any, llm_client: Any, options: SeerOptions) -> None:
    rollout = config.actor_rollout_ref.rollout
    name = rollout.name
    if name != "vllm":
        raise ValueError(f"actor_rollout_ref.rollout.name must be vllm for Seer, got {name!r}")
    if type(llm_client) is not LLMServerClient:
        raise ValueError(
            f"Seer goes with verl's synchronous trainer, whose client is LLMServerClient, got "
            f"{type(llm_client).__name__}: set trainer.v1.trainer_mode=sync"
        )
    connector = _engine_option(rollout, "kv_transfer_config").get("kv_connector")
    if options.kv_pool is not None and connector != KV_CONNECTOR:
        raise ValueError(
            f"seer.kv_pool needs vLLM's KV connector, and engine_kwargs.vllm.kv_transfer_config names {connector}: "
            "drop that, or set seer.kv_pool=null"
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
