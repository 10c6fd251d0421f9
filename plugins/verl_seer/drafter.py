"""Seer's drafter inside vLLM, on a CPU or a GPU:

    vllm serve ... --speculative-config '{"method": "custom_class", "model": "verl_seer.drafter.SeerDrafter",
                                          "num_speculative_tokens": 8}'

Requests named by Seer's client draft for their group; all others for those with the same prompt. Options go into
``--additional-config '{"seer_drafting": {...}}'``, see `EngineOptions`. vLLM imports this module in its workers.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from verl_seer import compat
from verl_seer.drafting.engine import EngineDrafter, EngineOptions
from verl_seer.drafting.link import DraftLink
from verl_seer.drafting.native import NativeIndex, draft_batch, unavailable
from verl_seer.drafting.store import GroupDrafter
from verl_seer.options import DRAFTER, DRAFTER_OPTIONS

logger = logging.getLogger("verl.seer")

CONTROL = "seer_drafting"  # method of a worker, for collective_rpc


class SeerDrafter:
    """What vLLM's ``custom_class`` speculation asks for; one in each worker of an engine.

    Args:
        vllm_config: vLLM's; ``num_speculative_tokens`` is the longest draft.

    Raises:
        RuntimeError: this vLLM lacks something that the drafter uses; all of it is named. Or the library of the index
            cannot be loaded.
        ValueError: bad options.
    """

    def __init__(self, vllm_config: Any) -> None:
        compat.require_vllm()
        if problem := unavailable():  # now, and not in the first step
            raise RuntimeError(problem)
        _install()
        given = dict((vllm_config.additional_config or {}).get(DRAFTER_OPTIONS) or {})
        self._options = EngineOptions.of(
            {"max_draft": vllm_config.speculative_config.num_speculative_tokens, **given}
        )
        if self._options.max_draft > vllm_config.speculative_config.num_speculative_tokens:
            raise ValueError(
                f"max_draft must be at most num_speculative_tokens "
                f"({vllm_config.speculative_config.num_speculative_tokens}), got {self._options.max_draft}"
            )
        vocabulary = vllm_config.model_config.get_vocab_size()
        groups = GroupDrafter(lambda: NativeIndex(vocabulary), draft_batch=draft_batch)
        self.engine = EngineDrafter(groups, self._options)
        self._runner: Any = None
        self._step: Any = None
        self._used = _drafts_are_used()
        if self._options.server and self._used:
            self.connect(self._options.server)

    def load_model(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """There is no draft model. From now on new weights of the model clear what the old ones said."""
        load_weights = model.load_weights

        @functools.wraps(load_weights)
        def loading(*args: Any, **kwargs: Any) -> Any:
            self.engine.new_weights()
            return load_weights(*args, **kwargs)

        model.load_weights = loading

    def connect(self, server: str | None) -> None:
        """Share drafts through the draft server at this address; None ends it."""
        if not self._used:
            return
        if self.engine.link is not None:
            self.engine.link.close()
        self.engine.link = (
            None if server is None else DraftLink(server, f"{socket.gethostname()}:{os.getpid()}")
        )

    def attend(self, runner: Any, scheduler_output: Any) -> None:
        """What `propose` is not told: which requests the rows are, and what the step ran."""
        if self._runner is None:
            # vLLM drafts zeros for the whole batch once a request is within a draft of the model's context; our
            # drafts end at each request's own limit.
            runner.effective_drafter_max_model_len = runner.max_model_len + runner.num_spec_tokens
        self._runner, self._step = runner, scheduler_output

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """A draft for each row, of at most ``num_speculative_tokens``."""
        count = len(sampled_token_ids)
        if not self._used:
            return [[] for _ in range(count)]
        batch = self._runner.input_batch
        return self.engine.step(
            batch.req_ids,
            sampled_token_ids,
            num_tokens_no_spec[:count].tolist(),
            batch.num_prompt_tokens[:count].tolist(),
            token_ids_cpu,
            self._step.scheduled_spec_decode_tokens,
            self._step.total_num_scheduled_tokens,
            self._limit,
        )

    def _limit(self, request_id: str) -> int:
        state = self._runner.requests[request_id]
        most = state.sampling_params.max_tokens
        length = self._runner.max_model_len
        return length if most is None else min(length, state.num_prompt_tokens + most)


def control(worker: Any, command: str, *args: Any) -> Any:
    """A worker's method `CONTROL`, so that ``collective_rpc`` reaches the drafter: ``connect``, ``counts``."""
    drafter = getattr(worker.model_runner, "drafter", None)
    if not isinstance(drafter, SeerDrafter):
        raise RuntimeError(
            f"the engine's drafter is {type(drafter).__name__}, not Seer's: set speculative_config to "
            f"method custom_class with model {DRAFTER}"
        )
    commands: Mapping[str, Callable[..., Any]] = {
        "connect": drafter.connect,
        "counts": lambda: vars(drafter.engine.counts),
    }
    if command not in commands:
        raise ValueError(f"command must be one of {', '.join(commands)}, got {command!r}")
    return commands[command](*args)


def _drafts_are_used() -> bool:
    """vLLM takes the drafts of the first tensor-parallel rank; the others need not make any."""
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group().rank_in_group == 0


@functools.cache
def _install() -> None:
    """Lets the drafter see the step before vLLM's runner asks it, and `collective_rpc` reach it."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

    propose = GPUModelRunner.propose_draft_token_ids

    @functools.wraps(propose)
    def attended(runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        drafter = getattr(runner, "drafter", None)
        if isinstance(drafter, SeerDrafter):
            drafter.attend(runner, scheduler_output)
        return propose(runner, scheduler_output, *args, **kwargs)

    GPUModelRunner.propose_draft_token_ids = attended
    setattr(WorkerBase, CONTROL, control)
    _mend_sampler()


def _mend_sampler() -> None:
    """Two defects of vLLM 0.32's sampler of drafts, with any drafter.

    A step without a draft fails where requests have a top-k, by a maximum over no rows. And on a CPU the temperature
    and the top-k of a request do not reach its drafts: the kernel that repeats them writes into a copy.
    """
    from vllm.v1.sample import rejection_sampler

    constrain, expand = rejection_sampler.apply_sampling_constraints, rejection_sampler.expand_batch_to_tokens

    @functools.wraps(constrain)
    def constrained(logits: Any, *args: Any, **kwargs: Any) -> Any:
        return constrain(logits, *args, **kwargs) if logits.shape[0] else logits

    @functools.wraps(expand)
    def expanded(
        x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Any:
        if x.device.type != "cpu":
            return expand(x, cu_num_tokens, num_tokens, replace_from, replace_to)
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts)

    rejection_sampler.apply_sampling_constraints = constrained
    rejection_sampler.expand_batch_to_tokens = expanded
