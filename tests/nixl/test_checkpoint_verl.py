"""verl's trainer and its rollout server in processes of their own, weights between them over TENT. Real training."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl.workers.rollout.router", reason="needs verl, Ray and their dependencies")
sys.path.insert(0, str(Path(__file__).parents[1] / "verl"))
from test_training import PROMPTS, make_inputs, train

PARAMETERS = 100_000  # of the model of make_inputs, at least
ENGINE = "actor_rollout_ref.rollout.checkpoint_engine"
# One logical device trains, another one serves; every step ends with new weights for the server.
SEPARATE = (
    "trainer.v1.trainer_mode=separate_async", "trainer.v1.separate_async.parameter_sync_step=1",
    "trainer.v1.separate_async.num_warmup_batches=0", "actor_rollout_ref.hybrid_engine=False",
    "trainer.n_gpus_per_node=1", "actor_rollout_ref.rollout.nnodes=1", "actor_rollout_ref.rollout.n_gpus_per_node=1",
)  # fmt: skip
TENT = (f"{ENGINE}.backend=tent", f"{ENGINE}.custom_backend_module=nixl_tent.checkpoint.verl")
# verl 0.9.1 stops a server by an argument that vLLM 0.32 has renamed; verl imports this module in all its processes.
RENAMED = """
import importlib.machinery, sys

class Finder:
    @staticmethod
    def find_spec(name, path, target=None):
        if name != "vllm.v1.engine.async_llm":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module
        def and_rename(module):
            execute(module)
            pause = module.AsyncLLM.pause_generation
            def pause_generation(self, *, wait_for_inflight_requests=False, **more):
                return pause(self, mode="wait" if wait_for_inflight_requests else "abort", **more)
            module.AsyncLLM.pause_generation = pause_generation
        spec.loader.exec_module = and_rename
        return spec

sys.meta_path.insert(0, Finder)
"""


@pytest.mark.slow
def test_a_rollout_server_gets_the_trainers_weights(
    bare_nixl: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server begins with weights of its own (`load_format: dummy`): it can only agree with the trainer about the
    probability of its tokens where it has got the trainer's. A step changes them much."""
    # At INFO, verl 0.9.1's line about `hybrid_engine=False` raises TypeError (`flush` is not an argument of a logger).
    monkeypatch.setenv("VERL_LOGGING_LEVEL", "WARNING")
    (tmp_path / "renamed_argument.py").write_text(RENAMED)
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "renamed_argument")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    make_inputs(tmp_path)
    steps = 2
    samples, log = train(
        tmp_path,
        "tent",
        *SEPARATE,
        *TENT,
        f"+{ENGINE}.engine_kwargs.tent.options.metrics=true",
        "actor_rollout_ref.rollout.calculate_log_probs=True",
        "actor_rollout_ref.rollout.top_k=-1",  # of the only token that may be sampled the probability is 1
        "actor_rollout_ref.actor.optim.lr=5e-2",
        steps=steps,
    )
    assert len(samples) == steps and all(len(step) >= PROMPTS for step in samples)
    sent = [float(x) for x in re.findall(r"checkpoint_engine/bytes:([0-9.e+]+)", log)]
    assert sent and min(sent) > 4 * PARAMETERS, log[-3000:]  # float32, and the tables of the buckets
    # The trainer computes in bfloat16. Other weights would give these tokens probabilities with little in common.
    alike = [float(x) for x in re.findall(r"rollout_actor_probs_pearson_corr:([0-9.e-]+)", log)]
    assert len(alike) == steps and min(alike) > 0.99, alike
