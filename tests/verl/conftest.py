"""vLLM engines in processes of their own, and small models for them."""

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

HOST = Path(__file__).with_name("draft_host.py")
ANSWER_SECONDS = 600


class Engine:
    """One engine in its own process (`draft_host.py`). Calls wait for the answer; errors there are errors here."""

    def __init__(self, log: Path, engine: dict[str, Any]) -> None:
        self.log = log
        command_read, command_write = os.pipe()
        answer_read, answer_write = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, str(HOST), str(command_read), str(answer_write)],
            pass_fds=(command_read, answer_write),
            stdin=subprocess.DEVNULL,
            stdout=log.open("ab"),
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
            },
        )  # fmt: skip
        os.close(command_read)
        os.close(answer_write)
        self._commands, self._answers = os.fdopen(command_write, "w", buffering=1), answer_read
        self._send("start", engine=engine)  # starts while the caller goes on
        self._starting = True

    def run(self, requests: list[tuple[str, list[int], dict[str, Any]]]) -> dict[str, Any]:
        return self._call("run", requests=requests)

    def counts(self) -> dict[str, float]:
        return self._call("rpc", method="seer_drafting", args=["counts"])["value"][0]

    def connect(self, server: str) -> None:
        self._call("rpc", method="seer_drafting", args=["connect", server])

    def reload(self) -> None:
        self._call("reload")

    def reset(self) -> None:
        self._call("reset")

    def ready(self) -> Engine:
        if self._starting:
            self._starting = False
            self._take()
        return self

    def _call(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.ready()
        self._send(do, **arguments)
        return self._take()

    def _send(self, do: str, **arguments: Any) -> None:
        print(json.dumps({"do": do, **arguments}), file=self._commands, flush=True)

    def _take(self) -> dict[str, Any]:
        deadline, data = time.monotonic() + ANSWER_SECONDS, b""
        while not data.endswith(b"\n"):
            if not select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"no answer within {ANSWER_SECONDS} s; the log ends:\n{self.said()}")
            piece = os.read(self._answers, 1 << 20)
            if not piece:
                raise AssertionError(f"the engine's process ended; its log ends:\n{self.said()}")
            data += piece
        answer = json.loads(data)
        if "error" in answer:
            raise RuntimeError(f"{answer['error']}\n{answer['traceback']}")
        return answer

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def close(self) -> None:
        """Kills the process: it holds nothing but memory."""
        self._commands.close()
        os.close(self._answers)
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def drafting() -> Callable[..., dict[str, Any]]:
    """Engine options that switch Seer's drafter on."""
    return _drafting


def _drafting(length: int = 8, **options: Any) -> dict[str, Any]:
    speculative = {"method": "custom_class", "model": "verl_seer.drafter.SeerDrafter"}
    return {
        "speculative_config": {**speculative, "num_speculative_tokens": length},
        "additional_config": {"seer_drafting": options},
    }


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    """Starts engines, which end with the module."""
    engines: list[Engine] = []

    def make(model: Path, **engine: Any) -> Engine:
        log = tmp_path_factory.mktemp("engine") / "log"
        engines.append(Engine(log, {"model": str(model), **engine}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of 100 thousand parameters in float32, so that no two logits are equal."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, head_dim=32, eos_token_id=1, bos_token_id=None,
        pad_token_id=None, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder
