"""A pool of KV blocks in host memory that several vLLM engines share, so that a chunk that moves brings its KV along:

    vllm serve ... --kv-transfer-config '{"kv_connector": "SeerKVPool", "kv_role": "kv_both",
        "kv_connector_module_path": "verl_seer.kv_pool", "kv_connector_extra_config": {"folder": "/dev/shm/kv"}}'

A request that comes to the end of its budget leaves its full blocks behind as files, named by the tokens up to the end
of the block; a request that begins with those tokens takes them. Copies are made within the engine's step.

This module imports vLLM: only vLLM loads it.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.kv_cache_interface import FullAttentionSpec

from verl_seer.kv_files import MAX_BYTES, BlockFiles, block_keys


@dataclass
class PoolMetadata(KVConnectorMetadata):
    """What the workers do in a step: (key, pin, block) to load before it, and (key, block) to save after it."""

    load: list[tuple[str, str, int]] = field(default_factory=list)
    save: list[tuple[str, int]] = field(default_factory=list)


def _named_by_tokens(request: Any) -> bool:
    """Whether a request's KV follows from its token ids; not with images, adapters, embeddings or a salt."""
    other = (request.mm_features, request.lora_request, request.cache_salt)
    return not any(other) and request.prompt_embeds is None


@dataclass
class _Found:
    """A request's blocks by name; those that the pool has from `first` on are pinned under `tag`."""

    tag: str
    keys: list[str]
    first: int = 0


class SeerKVPool(KVConnectorBase_V1, SupportsHMA):
    """vLLM's connector, of which there is one in the scheduler and one in each worker.

    ``kv_connector_extra_config``: ``folder``, and ``max_bytes`` (default `MAX_BYTES`).

    Raises:
        ValueError: bad options, or a model with layers other than full attention, whose state is no row of blocks.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
            kinds = ", ".join(sorted({type(group.kv_cache_spec).__name__ for group in groups}))
            raise ValueError(
                f"SeerKVPool goes with models whose layers all have full attention, this one has {kinds}: "
                "set seer.kv_pool=null, or remove kv_transfer_config"
            )
        parallel = vllm_config.parallel_config
        if parallel.pipeline_parallel_size > 1:
            raise ValueError(
                f"SeerKVPool needs pipeline_parallel_size 1, got {parallel.pipeline_parallel_size}"
            )
        extra = dict(vllm_config.kv_transfer_config.kv_connector_extra_config)
        unknown = sorted(set(extra) - {"folder", "max_bytes"})
        if unknown or "folder" not in extra:
            raise ValueError(
                f"kv_connector_extra_config must have folder and may have max_bytes, got {sorted(extra)}"
            )
        self._files = BlockFiles(extra["folder"], extra.get("max_bytes", MAX_BYTES))
        self._block_size = groups[0].kv_cache_spec.block_size
        self._num_blocks = kv_cache_config.num_blocks
        self._ranks = parallel.tensor_parallel_size
        model = vllm_config.model_config
        self._start = repr((model.model, model.dtype, self._block_size, self._ranks)).encode()
        # Scheduler: what runs, what `get_num_new_matched_tokens` found, and what the next step loads.
        self._requests: dict[str, Any] = {}
        self._manager: Any = None
        self._found: dict[str, _Found] = {}
        self._tags = itertools.count()
        self._next = PoolMetadata()
        # Worker
        self._caches: list[torch.Tensor] = []
        if role == KVConnectorRole.SCHEDULER:
            self._files.clear()  # of other weights: of an earlier run

    # -- scheduler -----------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens behind the computed ones that the pool has; the last token is always computed."""
        if not _named_by_tokens(request):
            return 0, False
        tokens = request.all_token_ids[: request.num_tokens - 1]
        found = self._found.get(request.request_id)
        if found is None or len(found.keys) != len(tokens) // self._block_size:
            self._release(request.request_id)
            found = _Found(
                f"{os.getpid()}.{next(self._tags)}", block_keys(tokens, self._block_size, self._start)
            )
            self._found[request.request_id] = found
        found.first = last = num_computed_tokens // self._block_size
        while last < len(found.keys) and self._files.pin(found.keys[last], self._ranks, found.tag):
            last += 1
        return (last - found.first) * self._block_size, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The request will run: its blocks of the pool are loaded before the step."""
        found = self._found.get(request.request_id)
        if found is None or not num_external_tokens:
            return
        loaded = slice(found.first, found.first + num_external_tokens // self._block_size)
        for key, block in zip(found.keys[loaded], blocks.get_block_ids()[0][loaded]):
            self._next.load.append((key, found.tag, block))

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """What the workers do in this step.

        A request that this step may bring to the end of its budget may go on elsewhere: its full blocks are saved
        within the step, so that they are there before anybody hears of its end.
        """
        meta, self._next = self._next, PoolMetadata()
        for request_id, scheduled in scheduler_output.num_scheduled_tokens.items():
            request = self._requests[request_id]
            drafts = len(scheduler_output.scheduled_spec_decode_tokens.get(request_id, ()))
            left = request.num_prompt_tokens + request.max_tokens - request.num_tokens
            if left - request.num_output_placeholders > 1 + drafts or not _named_by_tokens(request):
                continue
            computed = min(request.num_tokens, request.num_computed_tokens + scheduled)  # drafts may be wrong
            keys = block_keys(request.all_token_ids[:computed], self._block_size, self._start)
            blocks = self._manager.get_block_ids(request_id)[0]
            meta.save += [row for row in zip(keys, blocks) if not self._files.has(row[0], self._ranks)]
        return meta

    def on_new_request(self, request: Any) -> None:
        """Notes the request until it ends."""
        self._requests[request.request_id] = request

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Notes who knows the requests' blocks."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self._manager = kv_cache_manager

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forgets the request; its blocks may be given away at once."""
        self._requests.pop(request.request_id, None)
        self._release(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """The weights have changed: the pool is emptied."""
        self._files.clear()
        for request_id in list(self._found):
            self._release(request_id)
        return True

    def _release(self, request_id: str) -> None:
        found = self._found.pop(request_id, None)
        if found is not None:
            self._files.unpin(found.keys, self._ranks, found.tag)

    # -- worker --------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The layers' caches, with the blocks along their first dimension."""
        caches = [kv_caches[name] for name in sorted(kv_caches)]
        for name, cache in kv_caches.items():
            if not isinstance(cache, torch.Tensor) or cache.shape[0] % self._num_blocks:
                shape = list(cache.shape) if isinstance(cache, torch.Tensor) else type(cache).__name__
                raise ValueError(
                    f"SeerKVPool needs {self._num_blocks} blocks in the first dimension of {name}'s cache, got {shape}"
                )
        self._caches = caches

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Copies the step's blocks out of the pool.

        A block that is not there as it was written is an error: to report it to vLLM 0.32 (`kv_load_failure_policy`)
        would sample wrong tokens in an engine that drafts.
        """
        rank = get_tp_group().rank_in_group
        for key, tag, block in self._meta().load:
            data, parts, at = self._files.take(key, rank, tag), self._parts(block), 0
            if len(data) != sum(part.nbytes for part in parts):
                raise RuntimeError(
                    f"block {key} has {len(data)} bytes: leave the folder of a KV pool to its engines"
                )
            for part in parts:
                raw = torch.frombuffer(data, dtype=torch.uint8, count=part.nbytes, offset=at)
                part.copy_(raw.view(part.dtype).view(part.shape))
                at += part.nbytes

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are complete when the step begins."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are saved whole, after the step."""

    def wait_for_save(self) -> None:
        """Copies the step's blocks into the pool."""
        rank = get_tp_group().rank_in_group
        for key, block in self._meta().save:
            raw = [part.contiguous().cpu().view(torch.uint8).numpy().tobytes() for part in self._parts(block)]
            self._files.write(key, rank, b"".join(raw))

    def _meta(self) -> PoolMetadata:
        meta = self._get_connector_metadata()
        assert isinstance(meta, PoolMetadata)
        return meta

    def _parts(self, block: int) -> list[torch.Tensor]:
        out = []
        for cache in self._caches:
            rows = cache.shape[0] // self._num_blocks  # the kernel's blocks may be smaller than the manager's
            out.append(cache[block * rows : (block + 1) * rows])
        return out
