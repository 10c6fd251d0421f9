"""Engines for the tests of the vLLM plugin, in processes of their own, and random checkpoints for them."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kimi_models import KimiLinearConfig
from kimi_models.tiny import tiny_config, write_tiny

HOST = Path(__file__).with_name("engine_host.py")
ANSWER_SECONDS = 400  # an engine starts in 4 s on a quiet machine, the process in 15; much longer under load


class EngineHost:
    """Starts `engine_host.py` on first use and talks to it; `environment` is added to this process's."""

    def __init__(self, log: Path, **environment: str) -> None:
        self.log = log
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, model: Path | str, *rounds: list[list[int]], tokens: int = 64, **engine: Any) -> dict[str, Any]:
        """Run an engine on rounds of prompts. The answer has "rounds", or "error" where it did not come to that."""
        if self.process is None:
            self._start()
        request = {"model": str(model), "rounds": rounds, "tokens": tokens, "engine": engine}
        self.requests.write(json.dumps(request).encode() + b"\n")
        self.requests.flush()
        return json.loads(self._answer())

    def _start(self) -> None:
        request_read, request_write = os.pipe()
        answer_read, answer_write = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, str(HOST), str(request_read), str(answer_write)],
            pass_fds=(request_read, answer_write),
            stdin=subprocess.DEVNULL,
            stdout=self.log.open("ab"),
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_LOGGING_LEVEL": "WARNING",
                "HF_HUB_OFFLINE": "1",
                **self.environment,
            },
        )
        os.close(request_read)
        os.close(answer_write)
        self.requests, self.answers = os.fdopen(request_write, "wb"), answer_read

    def _answer(self) -> str:
        assert self.process is not None
        deadline, data = time.monotonic() + ANSWER_SECONDS, b""
        while not data.endswith(b"\n"):
            if not select.select([self.answers], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"no answer within {ANSWER_SECONDS} s; the log ends:\n{self._tail()}")
            piece = os.read(self.answers, 1 << 20)
            if not piece:
                raise AssertionError(f"the engine process ended; its log ends:\n{self._tail()}")
            data += piece
        return data.decode()

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def close(self) -> None:
        if self.process is not None:
            self.requests.close()
            os.close(self.answers)
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None


@pytest.fixture(scope="session")
def new_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., EngineHost]]:
    """Makes engine processes; all of them end with the session."""
    hosts: list[EngineHost] = []

    def make(**environment: str) -> EngineHost:
        hosts.append(EngineHost(tmp_path_factory.mktemp("engine") / "log", **environment))
        return hosts[-1]

    yield make
    for host in hosts:
        host.close()


@pytest.fixture(scope="session")
def engine(new_host: Callable[..., EngineHost]) -> EngineHost:
    """The engine process that the tests share."""
    return new_host()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes random float32 checkpoints of a tiny config with the given changes; each once."""
    made: dict[str, Path] = {}

    def make(layers: int = 4, **changes: Any) -> Path:
        key = json.dumps([layers, changes], sort_keys=True)
        if key not in made:
            config = tiny_config(layers, **{"dtype": "float32", **changes})
            made[key] = write_tiny(tmp_path_factory.mktemp("checkpoint"), config)
            if config.use_attn_res:
                soften(made[key])
        return made[key]

    return make


def soften(folder: Path) -> None:
    """Scale the AttnRes queries to score spreads near 2, as trained ones have: at `write_tiny`'s spread of 11 the
    softmax over depth turns the rounding of one layer into ten times as much in the next."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith("res_proj.weight"):
            weights[name] *= 0.2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def random_prompts(lengths: list[int], seed: int = 0, vocab: int = 512) -> list[list[int]]:
    """Prompts of these lengths of random tokens, special ones left out."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=rng).tolist() for n in lengths]


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """32 prompts of 1 to 150 tokens: shorter than a conv window, around a chunk, over a cache block."""
    lengths = [1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 20, 24, 31, 32, 33, 40, 47, 48, 63, 64, 65, 80, 97]
    return random_prompts([*lengths, 128, 129, 150])


@pytest.fixture(scope="session")
def reference() -> Callable[[Path], Any]:
    """`kimi_models`' plain-torch model of a checkpoint, in float64: what differs is the served model's rounding."""
    from kimi_models.reference import KimiLinearForCausalLM
    from kimi_models.weights import load_weights

    def load(folder: Path) -> Any:
        config = KimiLinearConfig.from_pretrained(folder)
        model = KimiLinearForCausalLM(config, dtype=torch.float64)
        load_weights(model, folder, config)
        model.eval()
        return lambda ids: model(ids)

    return load
