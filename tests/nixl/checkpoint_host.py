"""A process with one place in a `Chain`, or with a `P2PStore`, driven by lines of JSON as agent_host.py is.

python checkpoint_host.py chain|store '{"argument": "value"}'
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
import torch
from torch import Tensor

from nixl_tent.checkpoint.chain import Chain

DTYPES = (torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64, torch.bool)


def crc(tensor: Tensor) -> int:
    return zlib.crc32(bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()))


def weights(seed: int, mebibytes: float) -> dict[str, Tensor]:
    """Tensors of all kinds, random bytes; the largest is a third of the whole."""
    made = torch.Generator().manual_seed(seed)

    def tensor(dtype: torch.dtype, *shape: int) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        high = 2 if dtype is torch.bool else 256
        return torch.randint(0, high, (size,), dtype=torch.uint8, generator=made).view(dtype).view(shape)

    found = {f"kind.{dtype}": tensor(dtype, 3, 5) for dtype in DTYPES}
    found["scalar"] = tensor(torch.float32)
    found["empty"] = tensor(torch.bfloat16, 0, 7)
    found["transposed"] = tensor(torch.float32, 33, 65).T
    words = int(mebibytes * (1 << 20)) // 2
    found["large"] = tensor(torch.bfloat16, max(1, words // 3 // 64), 64)
    for index in range(20):
        found[f"layers.{index}.weight"] = tensor(torch.bfloat16, max(1, words // 30 // 64), 64)
    found["last"] = tensor(torch.bfloat16, 17)
    return found


def told(tensors: dict[str, Tensor]) -> dict[str, list[Any]]:
    return {name: [str(t.dtype), list(t.shape), crc(t)] for name, t in tensors.items()}


class ChainHost:
    def __init__(self, **arguments: Any) -> None:
        self.chain = Chain(**arguments)
        self.weights: dict[str, Tensor] = {}

    def place(self) -> str:
        return base64.b64encode(pickle.dumps(self.chain.place())).decode()

    def join(self, before: str | None, after: str | None) -> None:
        self.chain.join(*(pickle.loads(base64.b64decode(p)) if p else None for p in (before, after)))

    def leave(self) -> None:
        self.chain.leave()

    def make(self, seed: int, mebibytes: float) -> dict[str, list[Any]]:
        self.weights = weights(seed, mebibytes)
        return told(self.weights)

    def send(self, fail_after: int = -1) -> float:
        """Seconds; with `fail_after`, the source of weights fails after that many."""

        def source() -> Any:
            for index, item in enumerate(self.weights.items()):
                if index == fail_after:
                    raise RuntimeError("the trainer failed")
                yield item

        begin = time.perf_counter()
        asyncio.run(self._send(source()))
        return time.perf_counter() - begin

    async def _send(self, source: Any) -> None:
        await self.chain.send(source)

    def receive(self, pause: float = 0.0) -> dict[str, list[Any]]:
        return asyncio.run(self._receive(pause))

    async def _receive(self, pause: float) -> dict[str, list[Any]]:
        found = {}
        async for name, tensor in self.chain.receive():
            found |= told({name: tensor})
            await asyncio.sleep(pause)
        return found


class StoreHost:
    def __init__(self, rank: int, **arguments: Any) -> None:
        os.environ["RANK"] = str(rank)
        from nixl_tent.checkpoint.p2p_store import P2PStore

        self.store = P2PStore(None, **arguments)
        self.tensors: dict[str, Tensor] = {}

    def addr(self) -> str:
        return self.store.addr

    def register(self, seed: int, mebibytes: float, only: list[str] | None = None) -> dict[str, list[Any]]:
        """Address, bytes and checksum of each."""
        self.tensors = {
            n: t.contiguous() for n, t in weights(seed, mebibytes).items() if only is None or n in only
        }
        self.store.register_named_tensors(self.tensors)
        return {name: [t.data_ptr(), t.nbytes, crc(t)] for name, t in self.tensors.items()}

    def unregister(self, names: list[str]) -> int:
        return self.store.unregister_named_tensors(names)

    def read(self, target: str, rows: list[list[int]]) -> list[int]:
        """Read (address, bytes) pairs one after the other into one registered buffer; checksums of each."""
        buffer = torch.zeros(max(1, sum(size for _, size in rows)), dtype=torch.uint8)
        self.store.register_named_tensors({"buffer": buffer})
        try:
            begins = [sum(size for _, size in rows[:index]) for index in range(len(rows))]
            ours = [buffer.data_ptr() + begin for begin in begins]
            self.store.batch_transfer_sync_read(
                target, ours, [row[0] for row in rows], [row[1] for row in rows]
            )
            return [crc(buffer[begin : begin + size]) for begin, (_, size) in zip(begins, rows)]
        finally:
            self.store.unregister_named_tensors(["buffer"])

    def read_elsewhere(self, target: str, address: int, size: int) -> None:
        buffer = torch.zeros(size, dtype=torch.uint8)
        self.store.batch_transfer_sync_read(target, [buffer.data_ptr()], [address], [size])

    def close_store(self) -> None:
        self.store.close()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    torch.set_num_threads(1)
    try:
        host = {"chain": ChainHost, "store": StoreHost}[sys.argv[1]](**json.loads(sys.argv[2]))
        print(json.dumps({"ok": "ready"}), file=answers)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)
        return
    for line in sys.stdin:
        call = json.loads(line)
        try:
            answer = {"ok": getattr(host, call["do"])(**call.get("with", {}))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
