"""A process with one vLLM engine: `python draft_host.py IN_FD OUT_FD`, one JSON command a line, one answer each.

Requests have the names that the command gives them, which vLLM's own `LLM.generate` does not allow.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

llm: Any = None


def start(engine: dict[str, Any]) -> dict[str, Any]:
    global llm
    from vllm import LLM

    defaults = {
        "dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 512, "max_num_seqs": 16,
        "enforce_eager": True, "disable_log_stats": True,
    }  # fmt: skip
    llm = LLM(**{**defaults, **engine})
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    original = scheduler._preempt_request

    def counted(*args: Any, **kwargs: Any) -> Any:
        llm.preemptions += 1
        return original(*args, **kwargs)

    llm.preemptions, scheduler._preempt_request = 0, counted
    return {}


def run(requests: list[tuple[str, list[int], dict[str, Any]]]) -> dict[str, Any]:
    """All requests at once. Tokens by name, prompt tokens that need not be computed, steps of the engine."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    for name, prompt, options in requests:
        params = SamplingParams(**{"temperature": 0, "ignore_eos": True, "detokenize": False, **options})
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    tokens, cached, steps = {}, {}, 0
    while engine.has_unfinished_requests():
        steps += 1
        for output in engine.step():
            if output.finished:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
                cached[output.request_id] = output.num_cached_tokens
    return {"tokens": tokens, "cached": cached, "steps": steps, "preemptions": llm.preemptions}


def rpc(method: str, args: list[Any]) -> dict[str, Any]:
    return {"value": llm.collective_rpc(method, args=tuple(args))}


def reload() -> dict[str, Any]:
    """The same weights again, the way that new ones come."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    name, weight = next(iter(model.named_parameters()))
    model.load_weights([(name, weight.detach().clone())])
    return {}


def reset() -> dict[str, Any]:
    """As verl does before new weights are used."""
    llm.llm_engine.reset_prefix_cache(reset_connector=True)
    return {}


def main() -> None:
    with (
        os.fdopen(int(sys.argv[1]), "r") as commands,
        os.fdopen(int(sys.argv[2]), "w", buffering=1) as answers,
    ):
        for line in commands:
            command = json.loads(line)
            try:
                answer = globals()[command.pop("do")](**command)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
