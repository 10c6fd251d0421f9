"""Seer in a real vLLM on this machine's processor: what its drafter accepts and costs, what its KV pool saves.

python -m benchmarks.seer_engine [--quick] [--out FILE]

Drafting: the committed tiny-linear model (Kimi Linear, 2.7 M parameters) samples groups of 16 for the prompts of
`benchmarks/data/siblings.xz`, 16 requests at a time, in an engine without drafts and in one with Seer's drafter. Times
are processor time of the engine's one thread, so that other work on the machine does not count: a step's, and the
drafter's own share of it, which is all that it does from the end of sampling to its drafts. Algorithm 1 goes by these.

KV pool: responses in chunks whose every chunk runs on the other of two engines, a random dense model, blocks of 32:
prompt tokens that are computed, without the pool and with it.

Every engine is a process of its own. Needs vLLM 0.32 and the installed plugins (the session `verl` of the noxfile).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Ratio, print_result, table

MODEL = Path(__file__).parents[1] / "models" / "checkpoints" / "tiny-linear"
GROUP, RUNNING = 16, 16
BLOCK, CHUNK, TOKENS = 32, 64, 512
DRAFTER = {"method": "custom_class", "model": "verl_seer.drafter.SeerDrafter", "num_speculative_tokens": 8}


def engine(model: str, **options: Any) -> Any:
    from vllm import LLM

    common = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    return LLM(model=model, max_model_len=1024, max_num_seqs=RUNNING, **common, **options)


def finish(llm: Any, requests: list[tuple[str, list[int], dict[str, Any]]]) -> tuple[dict[str, Any], int]:
    """Outputs by name, and the steps that they took."""
    from vllm import SamplingParams

    for name, prompt, options in requests:
        params = SamplingParams(**{"temperature": 0, "ignore_eos": True, "detokenize": False, **options})
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
    done, steps = {}, 0
    while llm.llm_engine.has_unfinished_requests():
        steps += 1
        for output in llm.llm_engine.step():
            if output.finished:
                done[output.request_id] = output
    return done, steps


def draft(groups: int, tokens: int, temperature: float, drafting: dict[str, Any] | None) -> dict[str, Any]:
    """One engine's run over groups of siblings."""
    from benchmarks.sample_siblings import load

    _, prompts, _ = load()
    options: dict[str, Any] = {}
    if drafting is not None:
        options = {"speculative_config": DRAFTER, "additional_config": {"seer_drafting": drafting}}
    llm = engine(str(MODEL), **options)
    finish(llm, [("warm", prompts[0].tolist(), {"max_tokens": 8})])
    before = {}
    if drafting is not None:
        own = llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter.engine
        own._clock, own._flushed, own._ended = time.thread_time, time.thread_time(), time.thread_time()
        own.lengths = type(own.lengths)(own.lengths.config)
        before = dict(llm.collective_rpc("seer_drafting", args=("counts",))[0])
    sampling = {"temperature": temperature, "max_tokens": tokens}
    start = time.thread_time()
    done, steps = finish(
        llm,
        [
            (
                f"{g}:{s}:r:0~0:0:0{'p' if s == 0 else ''}",
                prompts[g].tolist(),
                {**sampling, "seed": 100 * g + s},
            )
            for g in range(groups)
            for s in range(GROUP)
        ],
    )
    out = {"steps": steps, "seconds": time.thread_time() - start, "tokens": len(done) * tokens}
    if drafting is not None:
        after = llm.collective_rpc("seer_drafting", args=("counts",))[0]
        out |= {name: after[name] - before[name] for name in after}
    return out


def pool(folder: str, shared: bool) -> dict[str, Any]:
    """Prompt tokens computed by two engines that run the chunks of 8 responses in turn."""
    import random

    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder + "/dense")
    options: dict[str, Any] = {"block_size": BLOCK}
    if shared:
        options["kv_transfer_config"] = {
            "kv_connector": "SeerKVPool",
            "kv_connector_module_path": "verl_seer.kv_pool",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"folder": folder + "/kv"},
        }
    engines = [engine(folder + "/dense", **options) for _ in range(2)]
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 320) for _ in range(100)] for _ in range(8)]
    responses: list[list[int]] = [[] for _ in prompts]
    computed, seconds = 0, 0.0
    for attempt in range(TOKENS // CHUNK):
        requests = [
            (f"{i}-{attempt}", prompt + responses[i], {"max_tokens": CHUNK})
            for i, prompt in enumerate(prompts)
        ]
        start = time.thread_time()
        done, _ = finish(engines[attempt % 2], requests)
        seconds += time.thread_time() - start
        for i, (name, prompt, _) in enumerate(requests):
            responses[i] += done[name].outputs[0].token_ids
            computed += len(prompt) - done[name].num_cached_tokens
    return {"computed": computed, "seconds": seconds, "tokens": sum(map(len, responses))}


def alone(function: str, **arguments: Any) -> dict[str, Any]:
    """Calls a function of this module in a new process."""
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.seer_engine", "--call", json.dumps([function, arguments])]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{function} failed:\n{run.stderr[-4000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer groups and tokens")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call:
        function, arguments = json.loads(options.call)
        print(json.dumps({"draft": draft, "pool": pool}[function](**arguments)), flush=True)
        return
    groups, tokens = (2, 64) if options.quick else (4, 240)
    rows, extra, ratios = [], {}, []
    for temperature in (0.6, 1.0):
        size = {"groups": groups, "tokens": tokens, "temperature": temperature}
        runs = {
            "no drafts": alone("draft", **size, drafting=None),
            "drafts of up to 8": alone("draft", **size, drafting={"adaptive": False}),
            "adaptive": alone("draft", **size, drafting={}),
        }
        extra[f"drafting {temperature}"] = runs
        plain = runs["no drafts"]
        for name, run in runs.items():
            share = run["own_seconds"] / run["step_seconds"] if run.get("step_seconds") else 0.0
            accepted = f"{run['accepted']} of {run['drafted']}" if "drafted" in run else "-"
            rows.append(
                [
                    f"{temperature}, {name}",
                    str(run["steps"]),
                    accepted,
                    f"{1 + run['accepted'] / run['drafts']:.2f}" if run.get("drafts") else "1.00",
                    f"{share:.1%}",
                    f"{run['own_seconds'] / run['timed_steps'] * 1e6:.0f}" if share else "-",
                    f"{run['seconds']:.1f}",
                ]
            )
            if "drafted" in run:
                label = f"temperature {temperature}, {name}"
                steps = plain["steps"] / run["steps"]
                ratios.append(
                    Ratio(f"steps without drafts over those with, {label}", steps, steps, steps, 1.0)
                )
                ratios.append(
                    Ratio(f"drafter's share of step time, {label}", share, share, share, 0.02, better="lower")
                )
    table(
        f"{groups} groups of {GROUP} responses of {tokens} tokens, {RUNNING} at a time",
        [
            "temperature, drafts",
            "steps",
            "accepted",
            "length of a drafted step",
            "own share",
            "us/step",
            "seconds",
        ],
        rows,
    )
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory(dir="/dev/shm") as b:
        pools = {
            "without": alone("pool", folder=a, shared=False),
            "with": alone("pool", folder=b, shared=True),
        }
    extra["kv pool"] = pools
    table(
        f"8 responses of {TOKENS} tokens in chunks of {CHUNK}, every chunk on the other engine",
        ["KV pool", "prompt tokens computed", "seconds"],
        [[name, str(run["computed"]), f"{run['seconds']:.2f}"] for name, run in pools.items()],
    )
    saved = pools["with"]["computed"] / pools["without"]["computed"]
    ratios.append(
        Ratio("prompt tokens computed with the pool over without", saved, saved, saved, 1.0, "lower")
    )
    print_result("seer_engine", ratios, save=options.out, **extra)


if __name__ == "__main__":
    main()
