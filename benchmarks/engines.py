"""Inference engines as child processes, so that peers can be measured in turn within one run.

Each child holds one engine and answers one JSON line per request on a private pipe; what the engine prints
goes to a log file. `Engine` is the handle the benchmark uses; `python -m benchmarks.engines` is the child.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class EngineError(RuntimeError):
    """The child died or refused; the message ends with the tail of its log."""


class Engine:
    """A child process with one engine.

    Args:
        kind: ``"vllm"`` or ``"transformers"``.
        model: folder of the checkpoint.
        log: file that takes everything the engine prints.
        options: engine options, passed as JSON (see `serve_vllm`, `serve_transformers`).
        env: environment variables added for the child.
    """

    def __init__(
        self, kind: str, model: Path, log: Path, options: dict[str, Any], env: dict[str, str] | None = None
    ) -> None:
        self.log = log
        read_end, write_end = os.pipe()
        command = [
            sys.executable,
            "-m",
            "benchmarks.engines",
            kind,
            str(model),
            str(write_end),
            json.dumps(options),
        ]
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[write_end],
                env={**os.environ, **(env or {})},
                text=True,
            )
        os.close(write_end)
        self._answers = os.fdopen(read_end)
        self._info: dict[str, Any] | None = None

    def ready(self) -> dict[str, Any]:
        """Wait until the engine is loaded; facts about it. Until the first call, engines load side by side."""
        if self._info is None:
            self._info = self._receive()
        return self._info

    def _receive(self) -> Any:
        line = self._answers.readline()
        if not line:
            self._process.wait()
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
            raise EngineError(
                f"the engine ended with status {self._process.returncode}; {self.log} ends:\n{tail}"
            )
        return json.loads(line)

    def _ask(self, **request: Any) -> Any:
        self.ready()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def generate(self, prompts: list[list[int]], max_tokens: int, **options: Any) -> dict[str, Any]:
        """Greedy generation of exactly `max_tokens` tokens for each prompt: ``seconds`` and ``tokens``."""
        return self._ask(op="generate", prompts=prompts, max_tokens=max_tokens, **options)

    def start(self, prompts: list[list[int]], max_tokens: int) -> float:
        """vLLM only: add the requests and run until each has its first token; the seconds that took."""
        return self._ask(op="start", prompts=prompts, max_tokens=max_tokens)

    def steps(self, count: int) -> list[float]:
        """vLLM only: the seconds of each of `count` engine steps, one token for every request a step."""
        return self._ask(op="steps", count=count)

    def finish(self) -> None:
        """vLLM only: drop the running requests."""
        self._ask(op="finish")

    def close(self) -> None:
        """End the child; safe to call twice."""
        if self._process.stdin and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve_vllm(model: str, options: dict[str, Any], answers: Any) -> None:
    """vLLM in this process; `options` are those of `vllm.LLM`."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, skip_tokenizer_init=True, disable_log_stats=True, seed=0, **options)
    engine = llm.llm_engine
    cache = engine.vllm_config.cache_config
    answer(answers, {"threads": os.environ.get("OMP_NUM_THREADS"), "block_size": cache.block_size})
    serial = 0
    running: dict[str, int] = {}  # request id -> tokens so far
    finished: dict[int, list[int]] = {}

    def add(request: dict[str, Any]) -> None:
        nonlocal serial
        params = SamplingParams(
            temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False
        )
        for prompt in request["prompts"]:
            serial += 1
            running[str(serial)] = 0
            engine.add_request(str(serial), {"prompt_token_ids": prompt}, params)

    def step() -> None:
        for output in engine.step():
            running[output.request_id] = len(output.outputs[0].token_ids)
            if output.finished:
                del running[output.request_id]
                finished[int(output.request_id)] = list(output.outputs[0].token_ids)

    def generate(request: dict[str, Any]) -> dict[str, Any]:
        finished.clear()
        started = time.perf_counter()
        add(request)
        while running:
            step()
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": [finished[key] for key in sorted(finished)]}

    def start(request: dict[str, Any]) -> float:
        started = time.perf_counter()
        add(request)
        while min(running.values()) == 0:
            step()
        return time.perf_counter() - started

    def steps(request: dict[str, Any]) -> list[float]:
        seconds = []
        for _ in range(request["count"]):
            before, started = dict(running), time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
            if any(running.get(key) != count + 1 for key, count in before.items()):
                raise RuntimeError(
                    f"a step did not advance every request by one token: {before} -> {running}"
                )
        return seconds

    def finish(_: dict[str, Any]) -> None:
        engine.abort_request(list(running))
        running.clear()
        while engine.has_unfinished_requests():
            engine.step()

    operations = {"generate": generate, "start": start, "steps": steps, "finish": finish}
    for line in sys.stdin:
        request = json.loads(line)
        answer(answers, operations[request["op"]](request))


def serve_transformers(model: str, options: dict[str, Any], answers: Any) -> None:
    """transformers `generate` in this process; requests are batched by length, longest first."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, options["dtype"])).eval()
    answer(answers, {"threads": torch.get_num_threads()})
    pad = 0
    for line in sys.stdin:
        request = json.loads(line)
        prompts, batch_size = request["prompts"], request["batch_size"]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        tokens: dict[int, list[int]] = {}
        started = time.perf_counter()
        with torch.inference_mode():
            for first in range(0, len(order), batch_size):
                group = order[first : first + batch_size]
                width = max(len(prompts[i]) for i in group)
                ids = torch.full((len(group), width), pad)
                mask = torch.zeros((len(group), width), dtype=torch.long)
                for row, i in enumerate(group):
                    ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                    mask[row, width - len(prompts[i]) :] = 1
                out = network.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=request["max_tokens"],
                    min_new_tokens=request["max_tokens"],
                    do_sample=False,
                    pad_token_id=pad,
                )
                for row, i in enumerate(group):
                    tokens[i] = out[row, width:].tolist()
        seconds = time.perf_counter() - started
        answer(answers, {"seconds": seconds, "tokens": [tokens[i] for i in range(len(prompts))]})


def answer(answers: Any, value: Any) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["vllm", "transformers"])
    parser.add_argument("model")
    parser.add_argument("answers", type=int)
    parser.add_argument("options")
    args = parser.parse_args()
    serve = {"vllm": serve_vllm, "transformers": serve_transformers}[args.kind]
    with os.fdopen(args.answers, "w") as answers:
        serve(args.model, json.loads(args.options), answers)


if __name__ == "__main__":
    main()
