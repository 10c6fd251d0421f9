"""A process of `benchmarks.tent_weights`: trainer, rollout worker or server, driven by lines of JSON.

The pieces are verl's and ours: the registered checkpoint engine, and verl's own way into a vLLM worker (buckets in
shared memory). The server copies what arrives into its parameters.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import pickle
import sys
import time
import zlib
from typing import Any

os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
os.environ["VERL_PLATFORM"] = "cpu"
import torch
from torch import Tensor
from verl.checkpoint_engine.base import CheckpointEngineRegistry
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import (
    BucketedWeightReceiver,
    BucketedWeightSender,
)

import nixl_tent.checkpoint.verl  # noqa: F401  registers the engine

LAYERS = 16


def parameters(mebibytes: int) -> dict[str, Tensor]:
    """bfloat16 tensors of a transformer's proportions, `mebibytes` of them together."""
    rows = mebibytes * (1 << 20) // 2 // LAYERS // 12 // 1024
    made = {}
    for layer in range(LAYERS):
        for name, share in (("qkv", 3), ("o", 1), ("up", 4), ("down", 4)):
            made[f"layers.{layer}.{name}.weight"] = torch.zeros(rows * share, 1024, dtype=torch.bfloat16)
        made[f"layers.{layer}.norm.weight"] = torch.zeros(1024, dtype=torch.bfloat16)
    return made


class Host:
    def __init__(self, mebibytes: int, bucket: int) -> None:
        self.parameters = parameters(mebibytes)
        self.bucket = bucket  # MiB
        self.engines: dict[str, Any] = {}

    def open(self, backend: str, options: dict[str, str]) -> None:
        self.engines[backend] = CheckpointEngineRegistry.new(
            "tent", bucket_size=self.bucket << 20, nixl_backend=backend, options=options, timeout_s=60.0
        )

    def prepare(self, backend: str) -> str:
        return base64.b64encode(pickle.dumps(self.engines[backend].prepare())).decode()

    def join(self, backend: str, places: list[str], index: int) -> None:
        engine = self.engines[backend]
        both = engine.build_topology(1, 1, [pickle.loads(base64.b64decode(place)) for place in places])
        engine.init_process_group(**{name: values[0] for name, values in both[index].items()})

    def leave(self, backend: str) -> None:
        self.engines[backend].finalize()

    def step(self, seed: int) -> None:
        """What training does to weights: all of them become others."""
        made = torch.Generator().manual_seed(seed)
        for tensor in self.parameters.values():
            tensor.view(torch.int16).random_(0, 1 << 14, generator=made)

    def crc(self) -> int:
        value = 0
        for tensor in self.parameters.values():
            value = zlib.crc32(tensor.view(-1).view(torch.uint8).numpy(), value)
        return value

    def send(self, backend: str) -> None:
        """The trainer's side of an update."""
        asyncio.run(self.engines[backend].send_weights(iter(self.parameters.items())))

    def relay(self, backend: str, channel: str) -> None:
        """The rollout worker's side, as verl's `CheckpointEngineWorker.update_weights` does it."""
        asyncio.run(self._sender(channel).async_send_weights(self.engines[backend].receive_weights()))

    def send_directly(self, channel: str) -> None:
        """verl's default engine, `naive`: trainer and rollout worker are one process."""
        asyncio.run(self._sender(channel).async_send_weights(iter(self.parameters.items())))

    def serve(self, channel: str) -> float:
        """The server's side; the moment at which all weights are in place (CLOCK_MONOTONIC)."""
        receiver = BucketedWeightReceiver(channel, torch.device("cpu"), use_shm=True)
        receiver.receive_weights(self._load)
        return time.monotonic()

    def _load(self, weights: list[tuple[str, Tensor]], is_last: bool) -> None:
        for name, tensor in weights:
            self.parameters[name].copy_(tensor)

    def _sender(self, channel: str) -> BucketedWeightSender:
        return BucketedWeightSender(channel, self.bucket, use_shm=True)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    torch.set_num_threads(1)
    host = Host(**json.loads(sys.argv[1]))
    print(json.dumps({"ok": "ready"}), file=answers)
    for line in sys.stdin:
        call = json.loads(line)
        try:
            answer = {"ok": getattr(host, call["do"])(**call.get("with", {}))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
