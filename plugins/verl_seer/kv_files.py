"""Blocks of KV memory as files that several processes share, named by the tokens that they belong to."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

MAX_BYTES = 8 << 30
_SUFFIX = ".kv"


class BlockFiles:
    """Blocks as files of one folder.

    Args:
        folder: where; belongs to one run of one model. Made if it is not there.
        max_bytes: most bytes; beyond it the files used longest ago go.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        if not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(f"max_bytes must be an integer of at least 1, got {max_bytes!r}")
        self.folder, self.max_bytes = Path(folder), max_bytes
        if not self.folder.is_absolute():
            raise ValueError(f"folder must be an absolute path, got {str(folder)!r}")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._unswept = 0

    def path(self, key: str, rank: int) -> Path:
        """The file of a block's part on a tensor-parallel rank."""
        return self.folder / f"{key}-{rank}{_SUFFIX}"

    def has(self, key: str, ranks: int) -> bool:
        """Whether all ranks' parts are there."""
        return all(self.path(key, rank).exists() for rank in range(ranks))

    def write(self, key: str, rank: int, data: bytes) -> None:
        """Whole or not at all, whoever reads meanwhile. What is there already is left."""
        path = self.path(key, rank)
        if path.exists():
            return
        handle, name = tempfile.mkstemp(dir=self.folder)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
        self._unswept += len(data)
        if self._unswept * 16 >= self.max_bytes:
            self.sweep()

    def pin(self, key: str, ranks: int, tag: str) -> bool:
        """Keeps a block for a reader, whatever happens to it in the pool; False if it is not there."""
        try:
            for rank in range(ranks):
                path = self.path(key, rank)
                with suppress(FileExistsError):
                    os.link(path, self._pinned(key, rank, tag))
                os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def take(self, key: str, rank: int, tag: str) -> bytearray:
        """The data of a pinned block; its pin is gone then.

        Raises:
            RuntimeError: there is no such pin: somebody removed files from the folder.
        """
        path = self._pinned(key, rank, tag)
        try:
            data = bytearray(path.read_bytes())
            path.unlink()
        except FileNotFoundError:
            raise RuntimeError(f"{path} is gone: leave the folder of a KV pool to its engines") from None
        return data

    def unpin(self, keys: Iterable[str], ranks: int, tag: str) -> None:
        """Gives up what `pin` kept and nobody took."""
        for key in keys:
            for rank in range(ranks):
                self._pinned(key, rank, tag).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes what is beyond the limit, the files used longest ago first."""
        self._unswept = 0
        files = sorted(self._files(), key=lambda entry: entry[1].st_mtime_ns)
        excess = sum(stat.st_size for _, stat in files) - self.max_bytes
        for path, stat in files:
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= stat.st_size

    def clear(self) -> None:
        """Removes all blocks; pins stay."""
        for path, _ in self._files():
            path.unlink(missing_ok=True)

    def _pinned(self, key: str, rank: int, tag: str) -> Path:
        return self.folder / f"{tag}-{key}-{rank}.pin"

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with suppress(FileNotFoundError):
                yield path, path.stat()


def block_keys(tokens: Sequence[int], block_size: int, start: bytes) -> list[str]:
    """A name for each full block of `tokens`: of everything up to its end, and of `start`."""
    digest, keys = start, []
    row = np.asarray(tokens, np.int64)
    for at in range(0, len(row) - block_size + 1, block_size):
        digest = hashlib.blake2b(digest + row[at : at + block_size].tobytes(), digest_size=16).digest()
        keys.append(digest.hex())
    return keys
