"""verl's checkpoint engine over TENT: weights from the trainer to rollout servers, on GPUs or without.

    actor_rollout_ref.rollout.checkpoint_engine.backend=tent
    actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=nixl_tent.checkpoint.verl
    +actor_rollout_ref.rollout.checkpoint_engine.engine_kwargs.tent.options.links='eth0,eth1'

verl's own engine for NIXL takes NIXL's default backend, needs cupy, and moves memory of GPUs. This one moves host
memory: a trainer's GPU copies each tensor to it, a rollout worker hands verl views into it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from torch import Tensor
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from nixl_tent.checkpoint.chain import Chain, Place


@CheckpointEngineRegistry.register("tent")
class TentCheckpointEngine(CheckpointEngine):
    """The first rank of the trainer sends, the rollout workers stand in a line behind it.

    Args:
        bucket_size: bytes; verl takes it from ``update_weights_bucket_megabytes``.
        is_master: given by verl, of no use here.
        nixl_backend: NIXL's name of the backend; another one than TENT is for comparisons.
        options: the backend's parameters.
        timeout_s: seconds after which a silent process is an error. The first bucket waits for the trainer's gather.
    """

    def __init__(
        self,
        bucket_size: int,
        is_master: bool = False,
        nixl_backend: str = "TENT",
        options: Mapping[str, Any] | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self.chain = Chain(bucket_size, nixl_backend, options, timeout_s)
        self.rank: int | None = None

    def prepare(self) -> Place:
        return self.chain.place()

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Place]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """`metadata` is the trainer's places, then the rollout workers'."""
        idle = actor_wg_world_size - 1
        line = [metadata[0], *metadata[actor_wg_world_size:]]
        actors: dict[str, list[Any]] = {
            "rank": [0] + [-1] * idle,
            "before": [None] * actor_wg_world_size,
            "after": [line[1], *[None] * idle],
        }
        rollouts: dict[str, list[Any]] = {
            "rank": list(range(1, rollout_world_size + 1)),
            "before": line[:-1],
            "after": [*line[2:], None],
        }
        return actors, rollouts

    def init_process_group(self, rank: int, before: Place | None, after: Place | None) -> None:
        self.rank = rank
        self.chain.join(before, after)

    def finalize(self) -> None:
        self.chain.leave()
        self.rank = None

    async def send_weights(
        self, weights: Iterable[tuple[str, Tensor]], global_steps: int | None = None
    ) -> dict[str, float]:
        """What verl logs with the step: bytes to the first rollout worker, and seconds until all workers had them."""
        if self.rank != 0:
            for _ in weights:  # the other ranks take part in gathering each tensor, and have nothing to send
                pass
            return {}
        begin = time.perf_counter()
        sent = await self.chain.send(weights)
        return {"checkpoint_engine/bytes": sent, "checkpoint_engine/seconds": time.perf_counter() - begin}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, Tensor]]:
        async for name, tensor in self.chain.receive():
            yield name, tensor
