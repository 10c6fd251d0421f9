"""Seer against stock verl in real processes: two vLLM engines on this machine's processors replay a long-tailed trace.

python -m benchmarks.seer_replay [--quick] [--repeats N] [--out FILE] [--plots FOLDER]

Real are verl's client, its load balancer and vLLM's engines (Ray actors), Seer's client, router and KV pool. Not a
rollout's are the lengths: the server ends a response where the trace says, which neither client knows before, and
the model (random, dense, 3.5 M parameters) runs on one thread an engine. Drafting is off: random weights
say nothing that could be drafted (see benchmarks.seer_engine).

* stock: single requests, each to the server with the fewest in flight, first come first served.
* divided: Seer's chunks in order of arrival, KV from the pool.
* seer: the same with Algorithm 2.
* seer without pool: a chunk that moves, or whose blocks were given away, is computed again.

Repeats are interleaved, those of two other configurations (other lengths, prompts, memory and batch) with them, as a
machine's speed may change within minutes. The simulator's instance models, of engines with the pool's connector and
without, are fitted to the steps of the first configuration alone, the time that handing over a chunk takes to its
divided makespans, and they have to predict the makespans of the others.
Needs verl 0.9.1, vLLM 0.32, Ray and the installed plugins (the session `verl` of the noxfile).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Ratio, command_line, paired_ratio, print_result, table
from verl_seer.scheduler import SchedulerConfig
from verl_seer.simulate.costs import StepModel
from verl_seer.simulate.fit import Step, fit_handover, fit_steps
from verl_seer.simulate.rollout import Divided, Whole, simulate
from verl_seer.simulate.workload import Cluster, Sample, Workload, synthesize

VOCABULARY = 512
STOP = VOCABULARY  # no token of the model's; the server puts it at the end of a response
BLOCK = 32  # the least of vLLM on a CPU
SERVERS = 2


@dataclass(frozen=True)
class Setup:
    """A trace and the engines for it. Sizes in tokens; `kv` and `running` are of one engine."""

    name: str
    requests: int
    group: int
    prompt: int
    mean: int
    longest: int
    chunk: int
    kv: int
    running: int
    seed: int

    def cluster(self, costs: StepModel, handover: float = 0.0) -> Cluster:
        return Cluster(SERVERS, self.kv, self.running, costs, kv_bytes=1, handover=handover)

    def samples(self) -> list[Sample]:
        nothing = StepModel(1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0)
        return synthesize(
            Workload(
                self.name, self.requests, self.group, self.prompt, self.mean, self.longest,
                sigma=0.9, correlation=0.8, cluster=self.cluster(nothing), paper="",
            ),
            self.seed,
        )  # fmt: skip


FITTED = Setup("fitted", 96, 8, 32, 160, 768, chunk=96, kv=3072, running=24, seed=0)
PREDICTED = (
    Setup("larger memory, smaller batch", 96, 8, 64, 160, 768, chunk=96, kv=6144, running=12, seed=1),
    Setup("longer responses, groups of 16", 96, 16, 32, 240, 960, chunk=128, kv=4096, running=32, seed=2),
)
QUICK = Setup("quick", 16, 4, 32, 40, 128, chunk=32, kv=768, running=8, seed=0)

POLICIES = ("stock", "divided", "seer", "seer without pool")
POOLED = ("divided", "seer")


def prompt_of(group: int, sibling: int, length: int) -> list[int]:
    """The prompt of a group: like no other's from its first block on.

    Its last token is the sibling's own. Else all of a group would be the same text, as nothing is sampled, and vLLM
    would keep their blocks only once: divided responses alone gain by that, since they come back as prompts.
    """
    prompt = [3 + (group * 7919 + i * i * 31 + i) % (VOCABULARY - 3) for i in range(length - 1)]
    return [*prompt, 3 + sibling]


class Server:
    """A vLLM engine behind the method that verl's client calls; ends responses where the trace says."""

    def __init__(self, model: str, setup: dict[str, Any], lengths: list[int], pool: str | None) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.loggers import StatLoggerBase

        server = self

        class Log(StatLoggerBase):
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

            def record(
                self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
            ) -> None:
                server._record(scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None: ...

        self._setup, self._lengths = Setup(**setup), lengths
        options: dict[str, Any] = {}
        if pool is not None:
            options["kv_transfer_config"] = {
                "kv_connector": "SeerKVPool", "kv_connector_module_path": "verl_seer.kv_pool",
                "kv_role": "kv_both", "kv_connector_extra_config": {"folder": pool},
            }  # fmt: skip
        arguments = AsyncEngineArgs(
            model=model, dtype="float32", skip_tokenizer_init=True, enforce_eager=True,
            max_model_len=self._setup.prompt + self._setup.longest,
            block_size=BLOCK, num_gpu_blocks_override=self._setup.kv // BLOCK + 1,  # vLLM keeps one for itself
            max_num_seqs=self._setup.running, enable_logging_iteration_details=True, **options,
        )  # fmt: skip
        self._engine = AsyncLLM.from_engine_args(arguments, stat_loggers=[Log])
        self._forget()

    def _forget(self) -> None:
        self._steps: list[list[float]] = []
        self._ended_at, self._busy = 0.0, False
        self._preempted = self._computed = 0

    async def start(self) -> None:
        """Returns once the engine runs."""
        await self.generate([3, 4, 5], {"max_tokens": 4}, "0:0:warm:0~0:0:0")
        await self.reset()

    async def reset(self) -> None:
        """Before a run: nothing cached, nothing counted."""
        await self._engine.reset_prefix_cache(reset_connector=True)
        self._forget()

    def counts(self) -> dict[str, Any]:
        """What the run was: preemptions, tokens computed, and the steps, see `steps_of`."""
        return {"preempted": self._preempted, "computed": self._computed, "steps": self._steps}

    def _record(self, scheduler: Any, iteration: Any) -> None:
        if iteration is not None:
            self._preempted += iteration.num_preempted_reqs
        details = scheduler.iteration_details if scheduler is not None else None
        if details is None or details.is_dummy:
            return
        now = time.monotonic()
        tokens = details.num_ctx_tokens + details.num_generation_tokens
        self._computed += tokens
        if self._busy and tokens:
            moved = iteration.prompt_token_stats.external_kv_transfer if iteration is not None else 0
            requests = details.num_generation_requests
            kv = scheduler.kv_cache_usage * self._setup.kv
            inside = details.elapsed_ms / 1e3
            self._steps.append([now - self._ended_at, inside, requests, tokens - requests, moved, kv])
        self._ended_at, self._busy = now, scheduler.num_running_reqs > 0

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: Any = None,
        video_data: Any = None,
    ) -> Any:
        """As verl's server; the name of a request begins with its group and its number in the trace."""
        from verl.workers.rollout.replica import TokenOutput
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        _, number, *_ = request_id.split(":")
        left = self._lengths[int(number)] - (len(prompt_ids) - self._setup.prompt)
        params = SamplingParams(
            temperature=0, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
            max_tokens=min(sampling_params["max_tokens"], max(left, 1)),
        )  # fmt: skip
        async for output in self._engine.generate({"prompt_token_ids": prompt_ids}, params, request_id):
            last = output
        tokens = list(last.outputs[0].token_ids)
        if len(tokens) == left:
            tokens[-1] = STOP
        fields = {"global_steps": 0, "num_cached_tokens": last.num_cached_tokens}
        return TokenOutput(token_ids=tokens, stop_reason="completed", extra_fields=fields)


def config(setup: Setup) -> Any:
    """What verl's client reads of its config. `full_determinism`: requests keep the names that they are given."""
    from omegaconf import OmegaConf

    rollout = {
        "name": "vllm", "prompt_length": setup.prompt, "response_length": setup.longest,
        "max_model_len": setup.prompt + setup.longest, "seed": 0, "full_determinism": True,
    }  # fmt: skip
    return OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}})


class Replay:
    """The engines of one setup, with a pool and without, and runs on them."""

    def __init__(self, setup: Setup, model: str, policies: Sequence[str], pool: str) -> None:
        import ray

        self.setup, self.samples = setup, setup.samples()
        lengths = [s.tokens for s in self.samples]
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        make = ray.remote(max_concurrency=4096)(Server)
        self.servers: dict[bool, dict[str, Any]] = {}
        for pooled in {policy in POOLED for policy in policies}:
            self.servers[pooled] = {
                f"s{i}": make.options(num_cpus=0, runtime_env={"env_vars": environment}).remote(
                    model, dataclasses.asdict(setup), lengths, pool if pooled else None
                )
                for i in range(SERVERS)
            }
        # An engine that starts empties the pool, so all start before any runs.
        ray.get([s.start.remote() for servers in self.servers.values() for s in servers.values()])

    def run(self, policy: str) -> dict[str, Any]:
        """One replay: finish times of the requests, and the servers' counts."""
        import ray
        from verl.workers.rollout.llm_server import LLMServerClient
        from verl.workers.rollout.router import GlobalRequestLoadBalancer

        from verl_seer.client import Origin, SeerClient, origin
        from verl_seer.rollout import RouterActor

        servers = self.servers[policy in POOLED]
        ray.get([s.reset.remote() for s in servers.values()])
        if policy == "stock":
            router = ray.remote(GlobalRequestLoadBalancer).options(num_cpus=0).remote(servers)
            client: Any = LLMServerClient(config=config(self.setup), load_balancer_handle=router)
        else:
            router = RouterActor.options(num_cpus=0).remote(
                servers, {"router_class": "verl_seer.rollout.RouterActor"}
            )
            order = "arrival" if policy == "divided" else "context"
            capacity = dict.fromkeys(servers, (self.setup.kv, self.setup.running))
            ray.get(router.configure.remote({"chunk_size": self.setup.chunk, "order": order}, capacity))
            client = SeerClient(
                config=config(self.setup), load_balancer_handle=router, stop_ids=frozenset({STOP})
            )
        ray.get(router.__ray_ready__.remote())  # an actor takes seconds to start: no part of the rollout
        finished: dict[int, float] = {}

        async def one(number: int, sample: Sample) -> None:
            group = int(sample.group[1:])
            origin.set(Origin(sample.group, number))
            output = await client.generate(
                f"{sample.group}:{number}:r" if policy == "stock" else "r",
                prompt_ids=prompt_of(group, number % self.setup.group, self.setup.prompt),
                sampling_params={"temperature": 0, "max_tokens": sample.max_tokens},
            )
            finished[number] = time.monotonic() - start
            if len(output.token_ids) != sample.tokens:
                raise RuntimeError(f"{policy}: {len(output.token_ids)} tokens instead of {sample.tokens}")

        async def rollout() -> None:
            await asyncio.gather(*(one(i, s) for i, s in enumerate(self.samples)))

        start = time.monotonic()
        asyncio.run(rollout())
        counts = ray.get([s.counts.remote() for s in servers.values()])
        times = sorted(finished.values())
        tail = times[-1] - times[-(len(times) // 10) - 1]
        # What any schedule computes: full blocks of a group's prompt once, and each token that is followed by another.
        shared = (self.setup.prompt - 1) // BLOCK * BLOCK
        groups = len({s.group for s in self.samples})
        least = sum(s.tokens - 1 + self.setup.prompt - shared for s in self.samples) + shared * groups
        told = {} if policy == "stock" else ray.get(router.last_rollout.remote())
        ray.kill(router)
        return {
            "makespan": times[-1],
            "tail": tail,
            "tail_share": tail / times[-1],
            "finish_times": [round(t, 3) for t in times],
            "place_of_longest": place_of_longest(sorted(finished, key=finished.__getitem__), self.samples),
            "preempted": sum(c["preempted"] for c in counts),
            "recomputed": sum(c["computed"] for c in counts) - least,
            "chunks": told.get("chunks", len(self.samples)),
            "moved": told.get("moved", 0),
            "steps": [row for c in counts for row in c["steps"]],
        }

    def close(self) -> None:
        import ray

        for servers in self.servers.values():
            for server in servers.values():
                ray.kill(server)


def make_model(folder: str) -> str:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    return folder


def steps_of(rows: Sequence[Sequence[float]]) -> list[Step]:
    """Rows of (seconds since the step before, seconds inside the engine's step, the other fields of `Step`).

    Steps are seen when their outputs arrive, some of them two at a time, so what lies between two steps is taken
    from all of them: the mean of what the engine's own time leaves of the whole.
    """
    between = max(0.0, statistics.mean(r[0] for r in rows) - statistics.mean(r[1] for r in rows))
    return [Step(between + r[1], int(r[2]), int(r[3]), int(r[4]), r[5]) for r in rows]


def policy_of(setup: Setup, name: str) -> Whole | Divided:
    """The simulator's policy of that name."""
    if name == "stock":
        return Whole()
    return Divided(SchedulerConfig(setup.chunk, order="arrival" if name == "divided" else "context"))


def place_of_longest(order: Sequence[int], samples: Sequence[Sample]) -> float:
    """Mean place (0 first, 1 last) in the order of completion of the longest tenth of the responses."""
    longest = sorted(range(len(samples)), key=lambda i: -samples[i].tokens)[: max(1, len(samples) // 10)]
    return statistics.mean(order.index(i) / (len(order) - 1) for i in longest)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="16 requests, one repeat, no other setups")
    parser.add_argument("--repeats", type=int, default=3, help="replays of each policy (default 3)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--plots", type=Path, help="folder for the plot (needs matplotlib)")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    import ray

    # Ray's workers cannot import the module that Python runs as the main one.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(
        num_cpus=8, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    repeats = 1 if options.quick else options.repeats
    first, others = (QUICK, ()) if options.quick else (FITTED, PREDICTED)
    policies = {first: POLICIES} | dict.fromkeys(others, ("stock", *POOLED))
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as pool:
        seen = measure(policies, make_model(folder), pool, repeats)
    ray.shutdown()
    runs = seen[first]
    costs = {
        name: fit_steps(steps_of([row for policy in names for run in runs[policy] for row in run["steps"]]))
        for name, names in {"stock": ("stock",), "pooled": POOLED}.items()
    }
    handover = fit_handover(
        first.samples(),
        first.cluster(costs["pooled"]),
        [
            (policy, statistics.median(run["makespan"] for run in runs[name]))
            for name in POOLED
            if isinstance(policy := policy_of(first, name), Divided)
        ],
    )

    def predicted(setup: Setup, policy: str) -> float:
        pooled = policy in POOLED
        cluster = setup.cluster(costs["pooled" if pooled else "stock"], handover if pooled else 0.0)
        return simulate(setup.samples(), cluster, policy_of(setup, policy)).makespan

    predictions = [
        {
            "setup": setup.name,
            "policy": policy,
            "predicted": predicted(setup, policy),
            "measured": [run["makespan"] for run in seen[setup][policy]],
        }
        for setup in others
        for policy in policies[setup]
    ]
    fitted = {name: dataclasses.asdict(model) for name, model in costs.items()} | {"handover": handover}
    report(first, runs, fitted, predictions, options)


def measure(
    policies: dict[Setup, tuple[str, ...]], model: str, pool: str, repeats: int
) -> dict[Setup, dict[str, list[dict[str, Any]]]]:
    """Replays of every policy of every setup, in turn."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    replays: dict[Setup, Replay] = {}
    try:
        for number, setup in enumerate(policies):
            folder = Path(pool, str(number))
            folder.mkdir()
            replays[setup] = Replay(setup, model, policies[setup], str(folder))
        turns = [(setup, policy) for setup in policies for policy in policies[setup]]
        runs: dict[Setup, dict[str, list[dict[str, Any]]]] = {
            setup: {policy: [] for policy in policies[setup]} for setup in policies
        }
        for setup, policy in track(turns, "first runs", console=console, transient=True):
            replays[setup].run(policy)  # imports and compiles
        for setup, policy in track(turns * repeats, "replays", console=console, transient=True):
            runs[setup][policy].append(replays[setup].run(policy))
            console.print(f"{setup.name}: {policy} took {runs[setup][policy][-1]['makespan']:.2f} s")
    finally:
        for replay in replays.values():
            replay.close()
    return runs


def report(
    setup: Setup,
    runs: dict[str, list[dict[str, Any]]],
    fitted: dict[str, Any],
    predictions: list[dict[str, Any]],
    options: argparse.Namespace,
) -> None:
    samples = setup.samples()

    def of(policy: str, name: str) -> list[float]:
        return [run[name] for run in runs[policy]]

    def cell(policy: str, name: str, form: str) -> str:
        values = of(policy, name)
        middle = f"{statistics.median(values):{form}}"
        return middle if min(values) == max(values) else f"{middle} ({min(values):{form}}..{max(values):{form}})"

    table(
        f"{setup.requests} responses of {setup.mean} tokens (longest {max(s.tokens for s in samples)}), "
        f"{SERVERS} servers of {setup.kv} KV tokens and {setup.running} requests",
        [
            "policy", "preemptions", "recomputed", "chunks", "moved", "place of longest", "tail share", "tail s",
            "makespan s",
        ],
        [
            [
                policy, cell(policy, "preempted", ".0f"), cell(policy, "recomputed", ",.0f"),
                cell(policy, "chunks", ".0f"), cell(policy, "moved", ".0f"), cell(policy, "place_of_longest", ".2f"),
                cell(policy, "tail_share", ".0%"), cell(policy, "tail", ".2f"), cell(policy, "makespan", ".2f"),
            ]
            for policy in runs
        ],
    )  # fmt: skip
    ratios = []
    for policy in list(runs)[1:]:
        for name in ("makespan", "tail"):
            title = f"{name} of {policy} over stock's"
            ratios.append(paired_ratio(title, of(policy, name), of("stock", name), 1.0, "lower"))
    for p in predictions:
        off = [p["predicted"] / seconds for seconds in p["measured"]]
        title = f"predicted over measured makespan: {p['setup']}, {p['policy']}"
        ratios.append(Ratio(title, statistics.median(off), min(off), max(off), 1.0))
    if options.plots:
        plot(options.plots / "seer_replay.png", runs, samples)
    for policy in runs:
        for run in runs[policy]:
            del run["steps"]
    extra = {
        "command": command_line("seer_replay"),
        "setup": dataclasses.asdict(setup), "runs": runs, "fitted": fitted,
        "predictions": predictions, "predicted_setups": [dataclasses.asdict(s) for s in PREDICTED],
    }  # fmt: skip
    print_result("seer_replay", ratios, save=options.out, **json.loads(json.dumps(extra)))


def plot(path: Path, runs: dict[str, list[dict[str, Any]]], samples: Sequence[Sample]) -> None:
    """Finished responses over time, of each policy's median run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    for policy, repeats in runs.items():
        run = sorted(repeats, key=lambda r: r["makespan"])[len(repeats) // 2]
        shares = [(i + 1) / len(samples) for i in range(len(samples))]
        axis.step(run["finish_times"], shares, where="post", label=policy)
    axis.axhline(0.9, color="grey", linewidth=0.8)
    axis.set_xlabel("seconds")
    axis.set_ylabel("responses finished")
    axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
