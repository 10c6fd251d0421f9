"""Named tensors from one process to the next in a line: the first sends, every other one receives and passes on.

Each process but the first has SLOTS pieces of registered memory. Its predecessor writes a bucket into a slot; the
notice that comes with it says how much. When the tensors have been used and passed on, the slot is given back. Nothing
else is exchanged: no other connection, no pickled objects.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nixl_tent.checkpoint.agent import PAUSE, Agent, Transfer, TransferError
from nixl_tent.checkpoint.buckets import Assembler, Bucket

SLOTS = 3  # one being filled, one on the way, one being used
SLOT_BYTES = 32 << 20  # tensors are cut, so larger slots gain nothing and delay the first bucket

Weights = Iterable[tuple[str, Tensor]] | AsyncIterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class Place:
    """How a predecessor reaches a process: exchanged once per update, by whatever the stack has for that."""

    metadata: bytes
    address: int
    slot_bytes: int
    key: str  # of this update: a late message of an earlier one is not for us


class Chain:
    """One process's place in the line, kept over many updates.

    Args:
        bucket_bytes: upper bound of a slot; SLOTS of them are allocated.
        backend, options: as for `Agent`.
        timeout: seconds after which a silent neighbour is an error.
    """

    def __init__(
        self,
        bucket_bytes: int,
        backend: str = "TENT",
        options: Mapping[str, Any] | None = None,
        timeout: float = 600.0,
    ) -> None:
        if bucket_bytes < 1 << 10:
            raise ValueError(f"bucket_bytes must be at least 1024, got {bucket_bytes}")
        if not timeout > 0:
            raise ValueError(f"timeout must be positive, got {timeout}")
        self.slot_bytes = min(bucket_bytes, SLOT_BYTES)
        self.timeout = timeout
        self.agent = Agent(backend, options)
        self.memory = torch.empty(
            SLOTS, self.slot_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available()
        )
        self._registered = self.agent.register([(self.memory.data_ptr(), self.memory.numel())])
        self._key = ""
        self._before: str | None = None
        self._after: str | None = None
        self._source: Place | None = None
        self._target: Place | None = None
        self._met: dict[bytes, str] = {}  # metadata -> name
        self._filled: dict[int, dict[str, Any]] = {}  # by slot: notices of several writes come in any order
        self._free: set[int] = set()
        self._writes: dict[int, Transfer] = {}

    def place(self) -> Place:
        """Begin an update: what the predecessor must know."""
        self._key = secrets.token_hex(8)
        self._filled.clear()
        return Place(self.agent.metadata(), self.memory.data_ptr(), self.slot_bytes, self._key)

    def join(self, before: Place | None, after: Place | None) -> None:
        """Meet the neighbours; None where there is none."""
        if after is not None and after.slot_bytes != self.slot_bytes:
            raise ValueError(
                f"slots of {self.slot_bytes} bytes do not fit the next process's of {after.slot_bytes}: "
                "give all processes the same bucket size"
            )
        places = [place for place in (before, after) if place is not None]
        # Neighbours of the last update are usually those of this one: their connections stay.
        for metadata in [known for known in self._met if known not in {place.metadata for place in places}]:
            self.agent.forget(self._met.pop(metadata))
        for place in places:
            if place.metadata not in self._met:
                self._met[place.metadata] = self.agent.meet(place.metadata)
        self._before, self._after = (None if p is None else self._met[p.metadata] for p in (before, after))
        self._source, self._target = before, after
        self._free = set(range(SLOTS)) if after is not None else set()

    def leave(self) -> None:
        """End an update; memory and connections stay for the next one."""
        self._before = self._after = self._source = self._target = None
        for write in self._writes.values():  # of an update that failed
            write.release()
        self._writes.clear()

    def close(self) -> None:
        self.leave()
        for name in self._met.values():
            self.agent.forget(name)
        self._met.clear()
        self.agent.deregister(self._registered)

    async def send(self, weights: Weights) -> int:
        """Send all tensors to the process after this one; bytes sent.

        Raises:
            TransferError: it cannot be reached, or is silent for longer than `timeout`.
            ValueError: there is no next process, or a tensor's name does not fit into a bucket.
        """
        if self._after is None:
            raise ValueError("there is no process after this one: call join with its place")
        slot, sent = 0, 0
        bucket = Bucket(self.memory[slot])
        async for name, tensor in _each(weights):
            begin = 0
            while True:
                took = bucket.add(name, tensor, begin)
                if took < 0:
                    sent += await self._pass_on(slot, *bucket.close(), last=False)
                    slot = (slot + 1) % SLOTS
                    await self._written(slot)
                    bucket = Bucket(self.memory[slot])
                    continue
                begin += took
                if begin == tensor.nbytes:
                    break
        sent += await self._pass_on(slot, *bucket.close(), last=True)
        for index in range(SLOTS):
            await self._written(index)
        # Every slot comes back before the end, so that no message of this update is left for the next.
        await self._until(lambda: len(self._free) == SLOTS, f"{self._after} uses the last buckets")
        return sent

    async def receive(self) -> AsyncIterator[tuple[str, Tensor]]:
        """The tensors that the process before this one sends. Each is valid until the next is asked for.

        Raises:
            TransferError, ValueError: as `send`; also where what arrives is not a bucket.
        """
        if self._before is None or self._source is None:
            raise ValueError("there is no process before this one: call join with its place")
        assembler = Assembler()
        slot, last = 0, False
        while not last:
            await self._until(
                partial(self._filled.__contains__, slot), f"{self._before} sends the next bucket"
            )
            message = self._filled.pop(slot)
            payload, table, last = message["payload"], message["table"], message["last"]
            if not 0 <= payload <= payload + table <= self.slot_bytes:
                raise ValueError(f"{self._before} sent {message} for a slot of {self.slot_bytes} bytes")
            if self._after is not None:
                await self._pass_on(slot, payload, table, last)
            for name, tensor in assembler.take(self.memory[slot], payload, table):
                yield name, tensor
            await self._written(slot)
            self.agent.notify(self._before, _message(self._source.key, slot=slot))
            slot = (slot + 1) % SLOTS
        assembler.finish()
        if self._after is not None:
            await self._until(lambda: len(self._free) == SLOTS, f"{self._after} uses the last buckets")

    async def _pass_on(self, slot: int, payload: int, table: int, last: bool) -> int:
        """Write a slot into the same slot of the next process, when that is free; bytes."""
        assert self._after is not None and self._target is not None
        await self._until(lambda: slot in self._free, f"{self._after} gives slot {slot} back")
        self._free.remove(slot)
        size = payload + table
        notice = _message(self._target.key, slot=slot, payload=payload, table=table, last=last)
        rows = [
            (base + slot * self.slot_bytes, size) for base in (self.memory.data_ptr(), self._target.address)
        ]
        if size == 0:
            self.agent.notify(self._after, notice)
        else:
            self._writes[slot] = self.agent.start("WRITE", rows[:1], rows[1:], self._after, notice)
        return size

    async def _written(self, slot: int) -> None:
        write = self._writes.get(slot)
        if write is not None:
            await self._until(write.done, f"{self._after} takes slot {slot}")
            del self._writes[slot]

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.timeout
        while True:
            self._listen()
            if condition():
                return
            if time.monotonic() > deadline:
                raise TransferError(f"waited {self.timeout:g} s until {what}")
            await asyncio.sleep(PAUSE)

    def _listen(self) -> None:
        for peer, text in self.agent.notices():
            message = json.loads(text)
            if message["key"] != self._key:
                continue
            if peer == self._before:
                self._filled[message["slot"]] = message
            elif peer == self._after:
                self._free.add(message["slot"])


def _message(key: str, **fields: Any) -> bytes:
    return json.dumps({"key": key, **fields}).encode()


async def _each(weights: Weights) -> AsyncIterator[tuple[str, Tensor]]:
    if isinstance(weights, AsyncIterator):
        async for item in weights:
            yield item
    else:
        for item in weights:
            yield item
