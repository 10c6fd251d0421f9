"""verl's LLM client with divided generation: one response is several chunks, each placed by Seer's router.

This module imports verl: only verl's processes load it (`rollout` names it).
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from verl.utils import normalize_token_ids
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from verl_seer.chunks import Parts, chunk_params, divisible, ended, request_seed, token_budget
from verl_seer.drafting.names import chunk_name, response_name
from verl_seer.router import Grant

logger = logging.getLogger("verl.seer")


@dataclass(frozen=True)
class Origin:
    """Where a generation belongs: verl's uid of the prompt, and the sample's index in its group."""

    group_id: str
    session_id: int


# verl's agent loops do not pass these on to the client; a task's context carries them there.
origin: contextvars.ContextVar[Origin | None] = contextvars.ContextVar("verl_seer_origin", default=None)


class SeerClient(LLMServerClient):
    """Generates in chunks; to an agent loop it is verl's own client.

    Args:
        config: verl's whole config.
        load_balancer_handle: actor of `verl_seer.router.SeerRouter`.
        stop_ids: the model's stop tokens.
        max_model_len: the model's context, where ``rollout.max_model_len`` leaves it to the model.
        priorities: whether the engines are told the order of the buffer; they must schedule by priority.
    """

    def __init__(
        self,
        config: Any,
        load_balancer_handle: Any,
        stop_ids: frozenset[int] = frozenset(),
        max_model_len: int | None = None,
        priorities: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config, load_balancer_handle=load_balancer_handle, **kwargs)
        self._stop_ids = stop_ids
        self._max_model_len = config.actor_rollout_ref.rollout.max_model_len or max_model_len
        self._priorities = priorities
        self._granted: dict[str, Grant] = {}
        self._turns = itertools.count()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_granted": {}, "_turns": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _turns=itertools.count())

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any
    ) -> TokenOutput:
        """One response, as `LLMServerClient.generate`; chunks of a server that dies are run again elsewhere."""
        prompt = list(normalize_token_ids(prompt_ids))
        rollout = self.config.actor_rollout_ref.rollout
        budget = token_budget(
            sampling_params,
            len(prompt),
            prompt_length=rollout.prompt_length,
            response_length=rollout.response_length,
            max_model_len=self._max_model_len,
        )
        if not divisible(sampling_params):
            return await super().generate(
                request_id, prompt_ids=prompt, sampling_params=sampling_params, **kwargs
            )
        params = {"ignore_eos": bool(rollout.get("ignore_eos", False)), **sampling_params}  # as verl's server
        where = origin.get()
        group = where.group_id if where else request_id
        own = response_name(group, where.session_id if where else 0, request_id, next(self._turns))
        seed = sampling_params.get("seed")
        if seed is None and rollout.get("full_determinism", False):
            stable = f"{where.session_id if where else 0}:{','.join(map(str, prompt))}"
            seed = request_seed(int(rollout.seed), stable)
        try:
            await self._load_balancer.open_request.remote(own, group, len(prompt), budget)
            parts = await self._chunks(own, prompt, params, budget, seed, kwargs)
        except BaseException:
            self._load_balancer.close_request.remote(own)
            raise
        return TokenOutput(
            token_ids=parts.tokens,
            log_probs=parts.log_probs,
            routed_experts=parts.routed_experts,
            stop_reason=parts.stop_reason,
            num_preempted=parts.num_preempted,
            extra_fields=parts.extra,
        )

    async def _chunks(
        self,
        own: str,
        prompt: list[int],
        sampling_params: dict[str, Any],
        budget: int,
        seed: int | None,
        kwargs: dict[str, Any],
    ) -> Parts:
        parts, lives, lost = Parts(), 0, False
        for attempt in itertools.count():
            grant: Grant = await self._load_balancer.next_chunk.remote(own)
            chunk_id = chunk_name(own, lives, len(parts.tokens), attempt, grant.probe)
            self._granted[chunk_id] = grant
            if self._priorities:
                kwargs = {**kwargs, "priority": grant.priority}
            try:
                output = await super().generate(
                    chunk_id,
                    prompt_ids=prompt + parts.tokens,
                    sampling_params=chunk_params(sampling_params, grant.max_tokens, len(parts.tokens), seed),
                    **kwargs,
                )
            except (RayActorError, RayTaskError) as error:
                if not is_dead(error):
                    raise
                logger.warning("Seer: chunk %s was lost with its server: %s", chunk_id, type(error).__name__)
                await self._load_balancer.server_lost.remote(grant.server_id)
                lives, lost = lives + 1, True
                continue
            finally:
                self._granted.pop(chunk_id, None)
            aborted = output.stop_reason == "aborted"
            done = (
                aborted
                or ended(output.token_ids, grant.max_tokens, self._stop_ids, sampling_params)
                or len(parts.tokens) + len(output.token_ids) >= budget
            )
            new = len(output.token_ids)
            cached = output.extra_fields.get("num_cached_tokens")
            again = len(prompt) + len(parts.tokens) - cached if parts.tokens and cached is not None else 0
            if not await self._load_balancer.chunk_done.remote(own, grant.server_id, new, done, again):
                lives += 1
                continue  # the server was removed meanwhile and the chunk is granted anew
            parts.add(output)
            if done:
                if lost:
                    await self._load_balancer.restarts.remote()
                return parts
        raise AssertionError("unreachable")

    async def _acquire_server(self, request_id: str, **extra: Any) -> tuple[str, Any]:
        grant = self._granted.get(request_id)
        if grant is None:
            return await super()._acquire_server(request_id, **extra)
        return grant.server_id, grant.server

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        if request_id not in self._granted:
            super()._release_server(server_id, request_id)

    def _vllm_request_id(self, request_id: str) -> str:
        """Chunks keep their name in the engine: the drafter there reads it (`drafting.names`)."""
        return request_id if request_id in self._granted else super()._vllm_request_id(request_id)


def is_dead(error: Exception) -> bool:
    """Whether a server's actor, or the engine inside it, has died; other errors are the request's own."""
    if isinstance(error, RayTaskError):
        return type(error.cause).__name__ == "EngineDeadError"
    return isinstance(error, RayActorError)


def kv_capacity(server: Any) -> int:
    """KV tokens that a vLLM server's engine holds.

    Raises:
        RuntimeError: the server does not tell; the option ``seer.kv_tokens`` says it then.
    """
    try:
        tokens = int(ray.get(server.__ray_call__.remote(_engine_kv_tokens)))
    except (AttributeError, ray.exceptions.RayError) as error:
        raise RuntimeError(f"a server does not tell its KV memory ({error}): set seer.kv_tokens") from error
    if tokens < 1:
        raise RuntimeError("a server reports no KV memory: set seer.kv_tokens")
    return tokens


def weights_step(server: Any) -> int | None:
    """The step whose weights a server got last; None if it got none since it was started (again)."""
    return ray.get(server.__ray_call__.remote(_global_steps))


def same_weights(servers: Mapping[str, Any]) -> None:
    """Refuses servers, id -> handle, whose weights are of different steps.

    Raises:
        ValueError: names the step of each.
    """
    asked = {server: handle.__ray_call__.remote(_global_steps) for server, handle in servers.items()}
    steps = {}
    for server, answer in asked.items():
        with contextlib.suppress(RayActorError):  # it has died: its first chunk will tell
            steps[server] = ray.get(answer)
    if len(set(steps.values())) > 1:
        raise ValueError(
            "the servers disagree on their weights, so their samples would be of several policies: "
            + ", ".join(f"{server} has those of step {step}" for server, step in steps.items())
        )


def _global_steps(actor: Any) -> int | None:
    return actor.global_steps


def _engine_kv_tokens(actor: Any) -> int:
    cache = actor.engine.vllm_config.cache_config
    return int(cache.num_gpu_blocks or 0) * int(cache.block_size)
