"""A process with one Mooncake transfer engine over TCP, driven like tests/nixl/agent_host.py; for benchmarks/tent.py.

    python mooncake_host.py NAME mooncake '{"address": "10.77.0.1"}'

Mooncake's handshake without a metadata server; one address, because its TCP transport has no second link. Needs the
wheel `mooncake-transfer-engine-non-cuda`, importable or in the folder named by MOONCAKE_PATH.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from typing import Any

import numpy as np

TIMEOUT = 120.0
PENDING, DONE = 0, 1  # what Mooncake says of a transfer; below 0: it failed


def load_engine() -> Any:
    """Mooncake's class.

    Raises:
        ImportError: it, or a library that it needs, is not there.
    """
    if folder := os.environ.get("MOONCAKE_PATH"):
        sys.path.insert(0, folder)
    from mooncake.engine import TransferEngine

    return TransferEngine


class Host:
    def __init__(self, address: str) -> None:
        self.engine = load_engine()()
        if self.engine.initialize(address, "P2PHANDSHAKE", "tcp", "") != 0:
            raise RuntimeError(f"Mooncake does not start on {address}")
        self.address = f"{address}:{self.engine.get_rpc_port()}"
        self.peer = ""
        self.buffers: dict[str, np.ndarray] = {}
        self.handles: list[list[tuple[int, int, int]]] = []  # rows of (here, there, bytes)

    def buffer(self, name: str, size: int, fill: str = "zero", seed: int = 0) -> int:
        """Allocate and register; returns the address."""
        if fill == "random":
            data = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
        else:
            data = np.full(size, 0, np.uint8)
        self.buffers[name] = data
        if self.engine.register_memory(data.ctypes.data, size) != 0:
            raise RuntimeError(f"Mooncake does not register {size} bytes")
        return data.ctypes.data

    def crc(self, name: str) -> int:
        return zlib.crc32(self.buffers[name])

    def metadata(self) -> str:
        return self.address

    def load(self, metadata: str) -> None:
        self.peer = metadata

    def prepare(self, op: str, local: list[list[int]], remote: list[list[int]], agent: str) -> int:
        if op != "WRITE":
            raise ValueError(f"op must be WRITE here, got {op!r}")
        self.handles.append(
            [(here, there, size) for (here, size), (there, _) in zip(local, remote, strict=True)]
        )
        return len(self.handles) - 1

    def prepare_split(self, op: str, local: int, remote: int, size: int, count: int, agent: str) -> int:
        places = [i * size for i in range(count)][::-1]
        return self.prepare(
            op, [[local + at, size] for at in places], [[remote + at, size] for at in places], agent
        )

    def _begin(self, handle: int) -> int:
        ((here, there, size),) = self.handles[handle]
        posted = self.engine.transfer_submit_write(self.peer, here, there, size)
        if posted <= 0:
            raise RuntimeError("Mooncake did not take a transfer")
        return posted

    def run(self, handle: int, timeout: float = TIMEOUT) -> dict[str, Any]:
        """Post and wait; the state as NIXL names it, and the seconds it took."""
        begin = time.perf_counter()
        rows = self.handles[handle]
        if len(rows) == 1:
            code = self.engine.transfer_sync_write(self.peer, *rows[0])
        else:
            code = self.engine.batch_transfer_sync_write(
                self.peer, *(list(column) for column in zip(*rows, strict=True))
            )
        return {"state": "DONE" if code == 0 else "ERR", "seconds": time.perf_counter() - begin}

    def latencies(self, handle: int, count: int) -> list[float]:
        return [self.run(handle)["seconds"] for _ in range(count)]

    def latencies_among(self, handle: int, background: int, count: int) -> list[float]:
        """The same while `background` is posted again whenever it is done: mice among elephants."""
        posted = self._begin(background)
        seconds = []
        for _ in range(count):
            if self.engine.transfer_check_status(posted) != PENDING:
                posted = self._begin(background)
            seconds.append(self.run(handle)["seconds"])
        end = time.monotonic() + TIMEOUT
        while self.engine.transfer_check_status(posted) == PENDING and time.monotonic() < end:
            time.sleep(1e-3)
        return seconds


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    try:
        host = Host(json.loads(sys.argv[3])["address"])
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)
        return
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
