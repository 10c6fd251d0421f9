"""A real server: `vllm serve` on the committed checkpoint, asked as a client would ask it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

CHECKPOINTS = Path(__file__).parents[2] / "models" / "checkpoints"
START_SECONDS = 240  # 20 to 40 on a quiet machine with two cores; up to 120 seen under load

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module", params=["tiny-linear", "tiny-attnres"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """Address and model name of a running `vllm serve`; stopped with the signal a user would send."""
    port, name = free_port(), request.param
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", str(CHECKPOINTS / name),
        "--served-model-name", name, "--port", str(port), "--max-model-len", "1024",
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{log.read_text()[-4000:]}")
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield address, name
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (0, -signal.SIGINT, 130), log.read_text()[-4000:]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def client(server: tuple[str, str]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=120)


def test_lists_the_model(client: openai.OpenAI, server: tuple[str, str]) -> None:
    assert [model.id for model in client.models.list()] == [server[1]]


def test_completion_continues_python(client: openai.OpenAI, server: tuple[str, str]) -> None:
    """The checkpoint is trained on Python sources: after `import` it writes a module of the library."""
    answer = client.completions.create(
        model=server[1],
        prompt="from __future__ import annotations\n\nimport os\nimport",
        max_tokens=24,
        temperature=0,
    )
    text = answer.choices[0].text
    first_word = text.split()[0].split(".")[0].rstrip(",")
    assert first_word in sys.stdlib_module_names, text
    assert answer.usage is not None and answer.usage.completion_tokens == 24


def test_chat_and_stream_agree(client: openai.OpenAI, server: tuple[str, str]) -> None:
    messages = [{"role": "user", "content": "def main():"}]
    whole = client.chat.completions.create(model=server[1], messages=messages, max_tokens=16, temperature=0)  # type: ignore[arg-type]
    pieces = client.chat.completions.create(  # type: ignore[call-overload]
        model=server[1], messages=messages, max_tokens=16, temperature=0, stream=True
    )
    chunks = [chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices]
    assert len([c for c in chunks if c]) > 1, "a stream comes in pieces"
    assert "".join(chunks) == whole.choices[0].message.content


def test_concurrent_requests_equal_single_ones(client: openai.OpenAI, server: tuple[str, str]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    prompts = [f"import os\n\n\nclass Number{i}:\n    def __init__(self" for i in range(8)]

    def complete(prompt: str) -> str:
        return (
            client.completions.create(model=server[1], prompt=prompt, max_tokens=16, temperature=0)
            .choices[0]
            .text
        )

    alone = [complete(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(complete, prompts)) == alone


def test_prompt_longer_than_the_context_is_refused(client: openai.OpenAI, server: tuple[str, str]) -> None:
    with pytest.raises(openai.BadRequestError, match="1024"):
        client.completions.create(model=server[1], prompt="x = 1\n" * 2000, max_tokens=8)
