"""Processes with one engine and no NIXL (csrc/tests/node.cpp), as objects; and what breaks their connections."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import struct
import subprocess
from pathlib import Path
from typing import Any

RUNNING, DONE, FAILED, DISCONNECTED, CANCELED = 1, 0, -3, -10, -11
PIDFD_GETFD = 438
TCP_REPAIR = 19


class NodeError(RuntimeError):
    """The call failed in the node, or the node is gone."""


class Node:
    """One engine. Its memory is reached by name; transfers by a number that the caller chooses."""

    def __init__(
        self, program: Path, name: str, options: dict[str, Any] | None = None, prefix: list[str] | None = None
    ) -> None:
        self.name = name
        words = [f"{key}={value}" for key, value in (options or {}).items()]
        self.process = subprocess.Popen(
            [*(prefix or []), str(program), name, *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().rstrip("\n")
        if line.startswith("ok"):
            return line[3:]
        if not line:
            assert self.process.stderr is not None
            raise NodeError(
                f"node {self.name} ended with {self.process.wait()}: {self.process.stderr.read()[-3000:]}"
            )
        raise NodeError(line)

    def call(self, *words: object) -> str:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is told by the answer that does not come
            print(*words, file=self.process.stdin, flush=True)
        return self._answer()

    def meet(self, other: Node) -> None:
        self.call("load", other.name, other.call("info"))

    def digest(self, name: str, offset: int, length: int) -> int:
        """Of a piece of memory, 64 bits: equal means the same bytes."""
        return int(self.call("digest", name, offset, length))

    def wait(self, number: int, seconds: float) -> tuple[int, float]:
        """(status, seconds since the post); status RUNNING when the time is over."""
        status, took = self.call("wait", number, int(seconds)).split()
        return int(status), float(took)

    def metrics(self) -> dict[str, Any]:
        return json.loads(self.call("metrics"))

    def links(self) -> list[dict[str, Any]]:
        """The links to the only peer."""
        return self.metrics()["peers"][0]["links"]

    def close(self) -> tuple[int, int, int]:
        """End the engine; descriptors, threads and heap bytes that it left behind."""
        left = self.call("close").split()
        assert self.process.stdin is not None
        self.process.stdin.close()
        status = self.process.wait(timeout=60)
        if status != 0:
            assert self.process.stderr is not None
            raise NodeError(f"node {self.name} ended with {status}: {self.process.stderr.read()[-3000:]}")
        self._forget()
        return int(left[0]), int(left[1]), int(left[2])

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._forget()

    def _forget(self) -> None:
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def lose_connections(self, network: str) -> int:
        """Make this process's kernel forget its TCP connections to `network` ("10.77.1.") without a word to the
        other side, which is what a machine that loses power looks like; returns how many."""
        libc = ctypes.CDLL(None, use_errno=True)
        nowhere = struct.pack("=H14x", socket.AF_UNSPEC)
        handle = os.pidfd_open(self.process.pid)
        lost = 0
        try:
            for name in os.listdir(f"/proc/{self.process.pid}/fd"):
                copy = libc.syscall(PIDFD_GETFD, handle, int(name), 0)
                if copy < 0:
                    continue
                try:
                    peer = socket.socket(fileno=copy)
                except OSError:
                    os.close(copy)
                    continue
                with peer:
                    try:
                        if not peer.getpeername()[0].startswith(network):
                            continue
                        peer.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
                    except (OSError, TypeError, IndexError, AttributeError):
                        continue
                    # In repair mode this drops the connection and sends nothing.
                    if libc.connect(peer.fileno(), nowhere, len(nowhere)) == 0:
                        lost += 1
        finally:
            os.close(handle)
        return lost
