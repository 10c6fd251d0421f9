"""A process with one NIXL agent, driven by lines of JSON on standard input; answers with lines of JSON.

    python agent_host.py NAME BACKEND '{"option": "value"}'

Run by the tests and the benchmark, in network namespaces or not. Which NIXL: the module named by NIXL_MODULE.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import sys
import threading
import time
import types
import zlib
from typing import Any

os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
import numpy as np

TIMEOUT = 120.0


def load_api() -> Any:
    module = os.environ.get("NIXL_MODULE", "nixl_cu13")
    try:
        return importlib.import_module(f"{module}._api")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        # NIXL up to 1.3 imports torch for type checks only; the tests pass plain addresses.
        torch = types.ModuleType("torch")
        torch.Tensor = type("Tensor", (), {})  # type: ignore[attr-defined]
        sys.modules["torch"] = torch
        return importlib.import_module(f"{module}._api")


class Host:
    def __init__(self, name: str, backend: str, options: dict[str, str]) -> None:
        api = load_api()
        self.agent = api.nixl_agent(name, api.nixl_agent_config(backends=[]))
        self.backend = backend
        self.agent.create_backend(backend, options)
        self.buffers: dict[str, np.ndarray] = {}
        self.registered: dict[str, Any] = {}
        self.files: dict[str, Any] = {}
        self.handles: dict[int, Any] = {}
        self.next_handle = 1

    def plugins(self) -> list[str]:
        return self.agent.get_plugin_list()

    def buffer(self, name: str, size: int, fill: str = "zero", seed: int = 0) -> int:
        """Allocate and register; returns the address."""
        if fill == "random":
            data = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
        else:
            data = np.full(size, 0, np.uint8)
        self.buffers[name] = data
        if size:
            self.registered[name] = self.agent.register_memory([(data.ctypes.data, size, 0, "")], "DRAM")
        return data.ctypes.data

    def deregister(self, name: str) -> None:
        self.agent.deregister_memory(self.registered.pop(name))

    def memory_kinds(self) -> list[str]:
        return self.agent.get_backend_mem_types(self.backend)

    def open_file(self, path: str, flags: int) -> int:
        return os.open(path, flags, 0o644)

    def close_file(self, descriptor: int) -> None:
        os.close(descriptor)

    def file(self, name: str, descriptor: int, size: int, offset: int = 0, text: str = "") -> None:
        """Register a file: one that is open here, or one that `text` names ("rw,create:/path")."""
        rows = [(offset, size, descriptor, text)]
        self.files[name] = self.agent.register_memory(rows, "FILE", backends=[self.backend])

    def drop_file(self, name: str) -> None:
        self.agent.deregister_memory(self.files.pop(name), backends=[self.backend])

    def query_files(self, paths: list[str]) -> list[dict[str, str] | None]:
        return self.agent.query_memory([(0, 0, 0, path) for path in paths], self.backend, "FILE")

    def prepare_file(
        self, op: str, local: list[list[int]], file: list[list[int]], agent: str, notify: str | None = None
    ) -> int:
        """Memory as [address, bytes], pieces of files as [offset, bytes, descriptor]."""
        memory = self.agent.get_xfer_descs([(a, n, 0) for a, n in local], "DRAM")
        pieces = self.agent.get_xfer_descs([tuple(piece) for piece in file], "FILE")
        text = notify.encode() if notify is not None else b""
        handle = self.agent.initialize_xfer(op, memory, pieces, agent, text, backends=[self.backend])
        self.handles[self.next_handle] = handle
        self.next_handle += 1
        return self.next_handle - 1

    def fill(self, name: str, seed: int) -> None:
        data = self.buffers[name]
        data[:] = 0 if seed < 0 else np.random.default_rng(seed).integers(0, 256, data.size, dtype=np.uint8)

    def crc(self, name: str) -> int:
        return zlib.crc32(self.buffers[name])

    def metadata(self) -> str:
        return base64.b64encode(self.agent.get_agent_metadata()).decode()

    def load(self, metadata: str) -> str:
        name = self.agent.add_remote_agent(base64.b64decode(metadata))
        return name.decode() if isinstance(name, bytes) else name

    def forget(self, agent: str) -> None:
        self.agent.remove_remote_agent(agent)

    def prepare(
        self, op: str, local: list[list[int]], remote: list[list[int]], agent: str, notify: str | None = None
    ) -> int:
        lists = [self.agent.get_xfer_descs([(a, n, 0) for a, n in side], "DRAM") for side in (local, remote)]
        text = notify.encode() if notify is not None else b""
        handle = self.agent.initialize_xfer(op, *lists, agent, text, backends=[self.backend])
        self.handles[self.next_handle] = handle
        self.next_handle += 1
        return self.next_handle - 1

    def prepare_split(self, op: str, local: int, remote: int, size: int, count: int, agent: str) -> int:
        """`count` descriptors of `size` bytes through NIXL's prepared lists, back to front so that none merge."""
        sides = []
        for name, base in (("", local), (agent, remote)):
            rows = [(base + i * size, size, 0) for i in range(count)]
            descs = self.agent.get_xfer_descs(rows, "DRAM")
            sides.append(
                self.agent.prep_xfer_dlist(name or "NIXL_INIT_AGENT", descs, backends=[self.backend])
            )
        order = list(range(count))[::-1]
        handle = self.agent.make_prepped_xfer(op, sides[0], order, sides[1], order, backends=[self.backend])
        self.handles[self.next_handle] = handle
        self.next_handle += 1
        return self.next_handle - 1

    def post(self, handle: int) -> str:
        return self.agent.transfer(self.handles[handle])

    def state(self, handle: int) -> str:
        return self.agent.check_xfer_state(self.handles[handle])

    def run(self, handle: int, timeout: float = TIMEOUT) -> dict[str, Any]:
        """Post and wait; the state and the seconds it took."""
        begin = time.perf_counter()
        state = self.agent.transfer(self.handles[handle])
        while state == "PROC" and time.perf_counter() - begin < timeout:
            state = self.agent.check_xfer_state(self.handles[handle])
            if time.perf_counter() - begin > 2e-3:
                time.sleep(2e-4)  # leave the core to the engines
        return {"state": state, "seconds": time.perf_counter() - begin}

    def wait(self, handle: int, timeout: float = TIMEOUT) -> dict[str, Any]:
        begin = time.perf_counter()
        state = "PROC"
        while state == "PROC" and time.perf_counter() - begin < timeout:
            state = self.agent.check_xfer_state(self.handles[handle])
            time.sleep(1e-3)
        return {"state": state, "seconds": time.perf_counter() - begin}

    def latencies(self, handle: int, count: int) -> list[float]:
        return [self.run(handle)["seconds"] for _ in range(count)]

    def call_costs(self, handle: int, count: int) -> list[float]:
        """Seconds that the caller spends in posting and in one look right after it; waiting is not counted."""
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            self.agent.transfer(self.handles[handle])
            self.agent.check_xfer_state(self.handles[handle])
            seconds.append(time.perf_counter() - begin)
            self.wait(handle)
        return seconds

    def latencies_among(self, handle: int, background: int, count: int) -> list[float]:
        """The same while `background` is posted again whenever it is done: mice among elephants."""
        self.agent.transfer(self.handles[background])
        seconds = []
        for _ in range(count):
            if self.state(background) != "PROC":
                self.agent.transfer(self.handles[background])
            seconds.append(self.run(handle)["seconds"])
        self.wait(background)
        return seconds

    def copy_seconds(self, name: str, count: int) -> float:
        """The fastest of `count` copies of a buffer inside this process."""
        data = self.buffers[name]
        other = np.zeros_like(data)
        best = float("inf")
        for _ in range(count):
            begin = time.perf_counter()
            np.copyto(other, data)
            best = min(best, time.perf_counter() - begin)
        return best

    def release(self, handle: int) -> None:
        self.agent.release_xfer_handle(self.handles.pop(handle))

    def notify(self, agent: str, message: str) -> None:
        self.agent.send_notif(agent, message.encode())

    def notifications(self, count: int, timeout: float = 30.0) -> list[list[str]]:
        """Wait for `count` notifications as (agent, text); fewer when the time is over."""
        found: list[list[str]] = []
        end = time.monotonic() + timeout
        while True:
            for agent, messages in self.agent.get_new_notifs().items():
                name = agent.decode() if isinstance(agent, bytes) else agent
                found += [[name, message.decode()] for message in messages]
            if len(found) >= count or time.monotonic() > end:
                return found
            time.sleep(1e-3)

    def hammer(
        self, op: str, local: int, remote: int, size: int, agent: str, threads: int, each: int
    ) -> list[str]:
        """Transfers from several threads at once, each in its own part of the buffers; their final states."""
        states: list[str] = []

        def work(index: int) -> None:
            for _ in range(each):
                at = index * size
                handle = self.prepare_one(op, local + at, remote + at, size, agent)
                state = self.agent.transfer(handle)
                while state == "PROC":
                    time.sleep(1e-4)
                    state = self.agent.check_xfer_state(handle)
                self.agent.release_xfer_handle(handle)
                states.append(state)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return states

    def prepare_one(self, op: str, local: int, remote: int, size: int, agent: str) -> Any:
        lists = [self.agent.get_xfer_descs([(at, size, 0)], "DRAM") for at in (local, remote)]
        return self.agent.initialize_xfer(op, *lists, agent, b"", backends=[self.backend])


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    host = Host(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
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
