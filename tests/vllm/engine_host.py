"""A process that builds vLLM engines on request: `python engine_host.py IN_FD OUT_FD`, one JSON object a line.

vLLM binds threads and replaces functions of torch, so engines must not live in the test process; several engines
one after the other in one process spare the import of vLLM for each.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def options(request: dict[str, Any]) -> dict[str, Any]:
    return {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "max_num_seqs": 32,
        "disable_log_stats": True,
        **request.get("engine", {}),
    }


def generate(request: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens, their log-probabilities and cached prompt tokens for each prompt, for each round."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=request["model"], **options(request))
    core: Any = llm.llm_engine.engine_core
    config = llm.llm_engine.vllm_config
    preemptions = 0
    try:
        if hasattr(core, "engine_core"):  # in this process: count what the scheduler takes back
            scheduler = core.engine_core.scheduler
            original = scheduler._preempt_request

            def counted(*args: Any, **kwargs: Any) -> Any:
                nonlocal preemptions
                preemptions += 1
                return original(*args, **kwargs)

            scheduler._preempt_request = counted
        sampling = SamplingParams(
            temperature=0, max_tokens=request.get("tokens", 64), ignore_eos=True, logprobs=1, detokenize=False
        )
        rounds = []
        for prompts in request["rounds"]:
            outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
            rounds.append(
                {
                    "tokens": [[int(t) for t in o.outputs[0].token_ids] for o in outputs],
                    "logprobs": [
                        [float(d[t].logprob) for d, t in zip(o.outputs[0].logprobs, o.outputs[0].token_ids)]
                        for o in outputs
                    ],
                    "cached": [o.num_cached_tokens or 0 for o in outputs],
                }
            )
        return {
            "rounds": rounds,
            "preemptions": preemptions,
            "block_size": config.cache_config.block_size,
            "prefix_caching": config.cache_config.enable_prefix_caching,
            "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
        }
    finally:
        core.shutdown()
        del llm
        gc.collect()


def main() -> None:
    with os.fdopen(int(sys.argv[1]), "r") as requests, os.fdopen(int(sys.argv[2]), "w", buffering=1) as answers:
        for line in requests:
            request = json.loads(line)
            try:
                answer = generate(request)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
