"""vLLM servers for CPUs, each on one side of a lab, and a proxy that lets one prefill what the other decodes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

START_SECONDS = 900  # 25 on a quiet machine with two cores, some minutes on one that is busy


class VllmServer:
    """`vllm serve` on a Unix socket, which namespaces of the network do not separate."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        arguments: Sequence[str] = (),
        prefix: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.socket, self.log = folder / "http", folder / "log"
        self.socket.unlink(missing_ok=True)
        command = [
            *prefix, sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
            "--served-model-name", "model", "--uds", str(self.socket), *arguments,
        ]  # fmt: skip
        settings = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            **(environment or {}),
        }
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **settings}, start_new_session=True
            )  # fmt: skip

    def wait(self) -> None:
        """Until it answers; AssertionError with the end of its log if it does not."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the server did not start:\n{self.tail()}")
            try:
                self.ask("GET", "/health")
                return
            except OSError:
                time.sleep(0.2)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("localhost", timeout=300)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(300)
        connection.sock.connect(str(self.socket))
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read().decode()
            if answer.status != 200:
                raise AssertionError(f"{path}: {answer.status} {content}\n{self.tail()}")
            return json.loads(content) if content.startswith("{") else content
        finally:
            connection.close()

    def complete(self, prompt: list[int], tokens: int, **more: Any) -> dict[str, Any]:
        """Greedy tokens of one request, under ``choices``."""
        return self.ask(
            "POST",
            "/v1/completions",
            {
                "model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True, **more,
            },
        )  # fmt: skip

    def metric(self, name: str) -> float:
        """Sum of a Prometheus counter over its labels."""
        lines = self.ask("GET", "/metrics").splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def close(self) -> None:
        """End the server, and its engine with it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def tokens_of(answer: dict[str, Any]) -> list[int]:
    return answer["choices"][0]["token_ids"]


def through_both(prefill: VllmServer, decode: VllmServer, prompt: list[int], tokens: int) -> list[int]:
    """One request as a router of prefill and decode servers sends it."""
    first = prefill.complete(
        prompt,
        1,
        kv_transfer_params={
            "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None,
            "remote_block_ids": None, "remote_host": None, "remote_port": None,
        },
    )  # fmt: skip
    return tokens_of(decode.complete(prompt, tokens, kv_transfer_params=first["kv_transfer_params"]))


def kv_transfer(role: str, **extra: Any) -> list[str]:
    """The argument that a user gives vLLM for TENT; `role` is ``kv_producer`` or ``kv_consumer``."""
    config = {
        "kv_connector": "NixlConnector",
        "kv_role": role,
        "kv_buffer_device": "cpu",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"backends": ["TENT"], **extra},
    }
    return ["--kv-transfer-config", json.dumps(config)]


def random_llama(folder: Path) -> Path:
    """A Llama of random float32 weights with 16 KiB of cache a token; no tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=8, head_dim=64, max_position_embeddings=4096,
        initializer_range=0.2, dtype="float32", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
