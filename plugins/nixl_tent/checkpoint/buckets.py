"""Named tensors in pieces of memory of a fixed size, and out of them again. No transport, no stack."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor

ALIGN = 64  # bytes; every tensor begins at a multiple, so that it can be viewed in its own dtype
SMALLEST = 64 << 10  # bytes; a longer tensor is not cut to fill less room than this


@dataclass(frozen=True)
class Piece:
    """A part of a tensor and where it lies in its bucket; `begin`, `size` and `offset` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int
    offset: int

    @property
    def whole(self) -> bool:
        return self.size == self.tensor_bytes

    @property
    def tensor_bytes(self) -> int:
        return torch.Size(self.shape).numel() * _dtype(self.dtype).itemsize


class Bucket:
    """Memory being filled: tensors from the front, then a table of them.

    Args:
        memory: [bytes] uint8 in host memory.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.payload = 0
        self._rows: list[bytes] = []
        self._table = 0

    def add(self, name: str, tensor: Tensor, begin: int) -> int:
        """Take the bytes of `tensor` from `begin` on, as many as there is room for.

        Returns:
            How many it took, or -1 where the bucket is full and the next one must go on.

        Raises:
            ValueError: not even an empty bucket has room.
        """
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        offset = -(-self.payload // ALIGN) * ALIGN
        left = flat.numel() - begin
        dtype = str(tensor.dtype).removeprefix("torch.")
        # The row is no longer than one with the largest numbers.
        longest = _row(
            Piece(name, dtype, tuple(tensor.shape), flat.numel(), flat.numel(), self.memory.numel())
        )
        room = self.memory.numel() - offset - self._table - len(longest)
        size = min(left, room // ALIGN * ALIGN if room < left else left)
        if size < min(left, SMALLEST) or room < 0:
            if self._rows:
                return -1
            raise ValueError(
                f"a bucket of {self.memory.numel()} bytes has no room for a piece of {name!r}: raise the bucket size"
            )
        self.memory[offset : offset + size].copy_(flat[begin : begin + size])
        row = _row(Piece(name, dtype, tuple(tensor.shape), begin, size, offset))
        self._rows.append(row)
        self._table += len(row)
        self.payload = offset + size
        return size

    def close(self) -> tuple[int, int]:
        """Write the table behind the tensors; bytes of (tensors, table)."""
        table = b"".join(self._rows)
        end = self.payload + len(table)
        self.memory.numpy()[self.payload : end] = np.frombuffer(table, np.uint8)
        return self.payload, len(table)


class Assembler:
    """Tensors out of buckets, in the order in which they were put in."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._tensor: Tensor | None = None
        self._filled = 0

    def take(self, memory: Tensor, payload: int, table: int) -> Iterator[tuple[str, Tensor]]:
        """The tensors that are complete with this bucket.

        One that lies in a single bucket is a view into `memory`: it is valid until the next is asked for.

        Raises:
            ValueError: the bucket is not one that follows those before.
        """
        text = bytes(memory[payload : payload + table].numpy())
        for line in text.splitlines():
            piece = _piece(line, payload)
            part = memory[piece.offset : piece.offset + piece.size]
            if piece.whole and self._name is None:
                yield piece.name, part.view(_dtype(piece.dtype)).view(piece.shape)
                continue
            if piece.begin != self._filled or (piece.begin and piece.name != self._name):
                raise ValueError(
                    f"{piece.name!r} goes on at byte {piece.begin}, {self._filled} of {self._name!r} are here"
                )
            if piece.begin == 0:
                self._name = piece.name
                self._tensor = torch.empty(piece.shape, dtype=_dtype(piece.dtype))
            assert self._tensor is not None
            self._tensor.view(-1).view(torch.uint8)[piece.begin : piece.begin + piece.size].copy_(part)
            self._filled += piece.size
            if self._filled == piece.tensor_bytes:
                done = self._tensor
                self._name, self._tensor, self._filled = None, None, 0
                yield piece.name, done

    def finish(self) -> None:
        """Raises ValueError where a tensor is incomplete after the last bucket."""
        if self._name is not None:
            raise ValueError(f"the last bucket leaves {self._name!r} incomplete at byte {self._filled}")


def _row(piece: Piece) -> bytes:
    return json.dumps(astuple(piece), separators=(",", ":")).encode() + b"\n"


def _piece(line: bytes, payload: int) -> Piece:
    name, dtype, shape, begin, size, offset = json.loads(line)
    piece = Piece(name, dtype, tuple(shape), begin, size, offset)
    if min(begin, size, offset) < 0 or offset + size > payload or begin + size > piece.tensor_bytes:
        raise ValueError(f"{name!r} does not lie in its bucket: {piece}")
    return piece


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype is {name!r}, which this torch does not have")
    return dtype
