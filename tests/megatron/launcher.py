"""Starts Megatron's processes: `run_jobs` for worker.py, `torchrun` for any script."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
Job = tuple[str, dict[str, Any]]
# A start takes 10 s on an idle machine; this is for one that is frozen or busy meanwhile.
LIMIT = 900


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def torchrun(
    processes: int, command: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node processes COMMAND`, standard output and error together in stdout."""
    line = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    line += ["--master-addr=127.0.0.1", f"--master-port={free_port()}", *command]
    quiet = {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "TORCHDYNAMO_DISABLE": "1",  # Megatron compiles small functions, which takes a minute and tests nothing here
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    process = subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **quiet, **(environment or {})},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun's children are in its session
        process.wait()
        raise
    return subprocess.CompletedProcess(line, process.returncode, output)


def run_jobs(processes: int, jobs: Mapping[str, Job], folder: Path) -> dict[str, Any]:
    """Results of `jobs` (see worker.py), all run in one start of `processes` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun(processes, [str(HERE / "worker.py"), str(folder)])
    assert done.returncode == 0, done.stdout[-6000:]
    results: dict[str, Any] = torch.load(folder / "results.pt", weights_only=False)
    return results
