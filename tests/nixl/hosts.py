"""Processes with a NIXL agent (agent_host.py), as objects whose methods are calls into them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("agent_host.py")


class HostError(RuntimeError):
    """The call failed in the other process."""


class AgentHost:
    def __init__(
        self,
        name: str,
        backend: str = "TENT",
        options: dict[str, str] | None = None,
        prefix: list[str] | None = None,
        environment: dict[str, str] | None = None,
        stderr: Any = None,
        script: Path = SCRIPT,
    ) -> None:
        self.name = name
        command = [*(prefix or []), sys.executable, str(script), name, backend, json.dumps(options or {})]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, bufsize=1,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise HostError(f"agent {self.name} ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise HostError(answer["error"])
        return answer["ok"]

    def begin(self, call: str, **arguments: Any) -> None:
        """Start a call without waiting for its answer; `end` fetches it."""
        assert self.process.stdin is not None
        print(json.dumps({"do": call, "with": arguments}), file=self.process.stdin, flush=True)

    def end(self) -> Any:
        return self._answer()

    def __getattr__(self, call: str) -> Any:
        def run(**arguments: Any) -> Any:
            self.begin(call, **arguments)
            return self.end()

        return run

    def close(self) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(timeout=30)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> AgentHost:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def introduce(a: AgentHost, b: AgentHost) -> None:
    """Exchange metadata both ways; again after either has registered more memory."""
    metadata = a.metadata(), b.metadata()
    a.load(metadata=metadata[1])
    b.load(metadata=metadata[0])
