"""A round trip through the installed NIXL: `python -m nixl_tent.check [module]`.

Two agents in this process write, read and notify each other over TENT. Exit status 0, or a message and 1. Run as a
process of its own, because a NIXL that the plugin does not fit may crash.
"""

from __future__ import annotations

import importlib
import sys
import time

import numpy as np

SIZE = 3 << 20


def run(module: str) -> str:
    """What worked, in one line.

    Raises:
        RuntimeError: what did not.
    """
    api = importlib.import_module(f"{module}._api")
    names = ("tent-check-a", "tent-check-b")
    agents = [api.nixl_agent(name, api.nixl_agent_config(backends=[])) for name in names]
    random = np.random.default_rng(0)
    buffers = [random.integers(0, 256, SIZE, dtype=np.uint8), np.zeros(SIZE, np.uint8)]
    for agent, buffer in zip(agents, buffers, strict=True):
        agent.create_backend("TENT", {"metrics": "false"})
        agent.register_memory([(buffer.ctypes.data, SIZE, 0, "")], "DRAM")
    for here, there in (agents, agents[::-1]):
        here.add_remote_agent(there.get_agent_metadata())
    for operation in ("WRITE", "READ"):
        expected = buffers[0].copy()
        (buffers[1] if operation == "WRITE" else buffers[0])[:] = 0
        lists = [
            agent.get_xfer_descs([(buffer.ctypes.data, SIZE, 0)], "DRAM")
            for agent, buffer in zip(agents, buffers, strict=True)
        ]
        handle = agents[0].initialize_xfer(operation, *lists, names[1], b"done")
        status = agents[0].transfer(handle)
        deadline = time.monotonic() + 30
        while status == "PROC" and time.monotonic() < deadline:
            status = agents[0].check_xfer_state(handle)
        agents[0].release_xfer_handle(handle)
        if status != "DONE":
            raise RuntimeError(f"{operation} ended as {status}")
        if not all(np.array_equal(buffer, expected) for buffer in buffers):
            raise RuntimeError(f"{operation} moved wrong bytes")
        if agents[1].get_new_notifs() != {names[0]: [b"done"]}:
            raise RuntimeError(f"{operation} lost its notification")
    return "write, read and notifications work"


def main() -> int:
    try:
        print(run(sys.argv[1] if len(sys.argv) > 1 else "nixl_cu13"))
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
