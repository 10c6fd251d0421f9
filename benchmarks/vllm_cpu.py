"""Serving on a CPU: our plugin in vLLM beside transformers, vLLM's own Llama, and an all-MLA model.

    python -m benchmarks.vllm_cpu [--quick] [--part throughput --part latency ...] [--out FOLDER]

Parts
    throughput  32 requests, prompts of 16 to 1024 tokens, 64 outputs: requests per second against transformers
                `generate` (the best of several batch sizes), on the committed checkpoint and on a random one
    latency     batch 1, a 16-token prompt: tokens per second against transformers
    llama       decode steps against upstream's Llama of the same parameter count in the same engine
    context     decode time of the 3:1 hybrid against an all-MLA model of the same size, by context and by batch

Each engine is a process of its own; the two sides of a ratio take turns within one run, and the ratio is
reported with the lowest and highest of its repeats. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import Ratio, paired_ratio, plot_ratios, print_result, table, take_turns
from benchmarks.engines import Engine
from benchmarks.serving_models import CHECKPOINT, hybrid_60m, llama_like, long_context_pair

PARTS = ("throughput", "latency", "llama", "context")
VLLM = {"dtype": "bfloat16", "max_num_seqs": 32, "max_model_len": 2048}


def workload(requests: int, shortest: int, longest: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens, lengths spread evenly in the logarithm between `shortest` and `longest`."""
    rng = random.Random(seed)
    lengths = [round(shortest * (longest / shortest) ** (i / max(1, requests - 1))) for i in range(requests)]
    rng.shuffle(lengths)
    return [[rng.randrange(10, vocabulary) for _ in range(length)] for length in lengths]


@contextlib.contextmanager
def both_engines(model: Path, work: Path, max_model_len: int = 2048) -> Iterator[tuple[Engine, Engine]]:
    options = {**VLLM, "max_model_len": max_model_len}
    with (
        Engine("vllm", model, work / f"vllm-{model.name}.log", options, threads_of_vllm()) as ours,
        Engine("transformers", model, work / f"hf-{model.name}.log", {"dtype": "bfloat16"}) as peer,
    ):
        yield ours, peer


def threads_of_vllm() -> dict[str, str]:
    """vLLM keeps a core for its server processes; this benchmark has none, and the peer takes every core."""
    return {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}


def throughput(
    model: Path, label: str, goal: float, work: Path, repeats: int, requests: int, sizes: tuple[int, ...]
) -> list[Ratio]:
    prompts = workload(requests, 16, 1024 if requests >= 32 else 128, vocabulary=1000)
    with both_engines(model, work) as (ours, peer):
        # The peer's best batch is found on a quarter of the outputs: it may take minutes a run.
        candidates = dict.fromkeys(size for size in sizes if size <= requests)
        if len(candidates) > 1:
            candidates = {
                size: peer.generate(prompts, 16, batch_size=size)["seconds"] for size in candidates
            }
        best = min(candidates, key=lambda size: candidates[size] or 0.0)
        ours.generate(prompts, 64)
        a, b = take_turns(
            lambda: ours.generate(prompts, 64)["seconds"],
            lambda: peer.generate(prompts, 64, batch_size=best)["seconds"],
            repeats,
        )
    ratio = paired_ratio(f"{label}: requests/s against transformers", b, a, goal)
    table(
        f"{label}: {requests} requests, 64 outputs each",
        ["engine", "seconds", "requests/s", "output tokens/s"],
        [
            [
                name,
                f"{statistics.median(t):.2f}",
                f"{requests / statistics.median(t):.2f}",
                f"{64 * requests / statistics.median(t):.0f}",
            ]
            for name, t in (
                ("vLLM + kimi-stack", a),
                (f"transformers, batch {best} (best of {list(candidates)})", b),
            )
        ],
    )
    return [ratio]


def latency(model: Path, label: str, work: Path, repeats: int) -> list[Ratio]:
    prompt = workload(1, 16, 16, vocabulary=1000)
    with both_engines(model, work) as (ours, peer):
        for engine in (ours, peer):
            engine.generate(prompt, 16, batch_size=1)
        a, b = take_turns(
            lambda: ours.generate(prompt, 128)["seconds"],
            lambda: peer.generate(prompt, 128, batch_size=1)["seconds"],
            repeats,
        )
    table(
        f"{label}: batch 1, 16-token prompt, 128 outputs",
        ["engine", "tokens/s"],
        [
            [n, f"{128 / statistics.median(t):.0f}"]
            for n, t in (("vLLM + kimi-stack", a), ("transformers", b))
        ],
    )
    return [paired_ratio(f"{label}: batch-1 tokens/s against transformers", b, a, 1.0)]


def against_llama(model: Path, label: str, work: Path, repeats: int) -> list[Ratio]:
    """Decode steps at short context; both models in the same engine, with the same settings."""
    llama = llama_like(model, work / f"llama-{label}")
    ratios, rows = [], []
    with (
        Engine("vllm", model, work / f"vllm-{label}.log", VLLM, threads_of_vllm()) as ours,
        Engine(
            "vllm", llama, work / f"llama-{label}.log", {**VLLM, "load_format": "dummy"}, threads_of_vllm()
        ) as peer,
    ):
        for batch in (1, 8, 32):
            a, b = decode_turns(ours, peer, workload(batch, 16, 16, vocabulary=1000), repeats, 32)
            ratios.append(paired_ratio(f"{label}: decode tokens/s against Llama, batch {batch}", b, a, 0.8))
            rows.append([str(batch), *(f"{batch / statistics.median(t):.0f}" for t in (a, b))])
    table(
        f"{label}: decode tokens/s, 16-token prompts",
        ["batch", "Kimi Linear (ours)", "Llama (upstream)"],
        rows,
    )
    return ratios


def decode_turns(
    ours: Engine, peer: Engine, prompts: list[list[int]], repeats: int, steps: int
) -> tuple[list[float], list[float]]:
    """Median seconds of a decode step in turns of `steps` steps; the prompts are processed once."""
    for engine in (ours, peer):
        engine.start(prompts, max_tokens=(repeats + 1) * steps + 8)
        engine.steps(steps)
    turns = take_turns(
        lambda: statistics.median(ours.steps(steps)), lambda: statistics.median(peer.steps(steps)), repeats
    )
    for engine in (ours, peer):
        engine.finish()
    return turns


def long_context(
    work: Path, repeats: int, contexts: list[int], batches: list[int], plot: Path
) -> list[Ratio]:
    """The paper's claim: what a token costs as the context, or the batch, grows."""
    hybrid, all_mla, cache_bytes = long_context_pair(work)
    options = {
        **VLLM,
        "max_model_len": max(contexts) + 64,
        "max_num_batched_tokens": max(contexts) + 64,
        "max_num_seqs": max(batches),
    }
    ratios, rows, curves = [], [], {}
    with (
        Engine("vllm", hybrid, work / "hybrid.log", options, threads_of_vllm()) as ours,
        Engine("vllm", all_mla, work / "all-mla.log", options, threads_of_vllm()) as peer,
    ):
        points = [(context, 1) for context in contexts] + [(contexts[1], b) for b in batches if b > 1]
        for context, batch in points:
            prompts = workload(batch, context, context, vocabulary=1000, seed=context)
            a, b = decode_turns(ours, peer, prompts, repeats, 8)
            ratio = paired_ratio(
                f"decode time of all-MLA over hybrid, context {context}, batch {batch}", b, a, 1.0
            )
            ratios.append(ratio)
            curves[(context, batch)] = ratio
            size = [cache_bytes(kind, context) * batch / 2**20 for kind in ("hybrid", "all-mla")]
            rows.append(
                [
                    str(context),
                    str(batch),
                    *(f"{1e3 * statistics.median(t):.2f}" for t in (a, b)),
                    f"{ratio.value:.2f}",
                    f"{size[0]:.1f}",
                    f"{size[1]:.1f}",
                ]
            )
    table(
        "decode step, milliseconds; cache, MiB",
        ["context", "batch", "hybrid 3:1", "all MLA", "ratio", "cache hybrid", "cache all MLA"],
        rows,
    )
    plot_context(curves, contexts, batches, plot)
    return ratios


def plot_context(
    curves: dict[tuple[int, int], Ratio], contexts: list[int], batches: list[int], path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for axis, points, label in (
        (left, [(c, 1) for c in contexts], "context (tokens), batch 1"),
        (right, [(contexts[1], b) for b in batches], f"batch, context {contexts[1]}"),
    ):
        xs = [c if axis is left else b for c, b in points]
        values = [curves[p] for p in points]
        axis.errorbar(
            xs,
            [r.value for r in values],
            yerr=[[r.value - r.low for r in values], [r.high - r.value for r in values]],
            marker="o",
            capsize=3,
        )
        axis.set_xscale("log", base=2)
        axis.set_xlabel(label)
        axis.axhline(1.0, color="grey", linewidth=0.8)
    left.set_ylabel("decode time, all MLA / hybrid")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the committed checkpoint only, under 50 s")
    parser.add_argument("--part", action="append", choices=PARTS, help="measure only this; may be repeated")
    parser.add_argument("--model", choices=("committed", "60M"), help="measure only this one (default: both)")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[4, 8, 16, 32], help="batches of transformers to try, the best counts"
    )
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side (default 3)")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="folder of the plots and the figures"
    )
    parser.add_argument(
        "--keep-logs", type=Path, help="folder for models and engine logs (default: temporary)"
    )
    args = parser.parse_args(arguments)
    try:
        import vllm_kimi.plugin  # noqa: F401
    except ImportError as error:
        sys.exit(f"benchmarks.vllm_cpu needs the vllm environment ({error}): run it as `make bench`")
    parts = args.part or (["throughput"] if args.quick else list(PARTS))
    ratios: list[Ratio] = []
    with contextlib.ExitStack() as stack:
        work = args.keep_logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        models: list[tuple[Path, str]] = [] if args.model == "60M" else [(CHECKPOINT, "committed")]
        if not args.quick and args.model != "committed" and {"throughput", "latency", "llama"} & set(parts):
            models.append((hybrid_60m(work), "60M"))
        for part in parts:
            if part == "context":
                contexts, batches = (
                    ([1024, 2048], [1, 4]) if args.quick else ([1024, 8192, 32768], [1, 4, 16])
                )
                ratios += long_context(
                    work, min(args.repeats, 3), contexts, batches, args.out / "vllm_cpu_context.png"
                )
                continue
            for model, label in models:
                if part == "throughput":
                    ratios += throughput(
                        model, label, 4.0, work, 2 if args.quick else args.repeats, 8 if args.quick else 32,
                        tuple(args.batch),
                    )  # fmt: skip
                elif part == "latency":
                    ratios += latency(model, label, work, args.repeats)
                else:
                    ratios += against_llama(model, label, work, args.repeats)
    name = "_".join(("vllm_cpu", *(args.part or []), *filter(None, [args.model]), *(["quick"] if args.quick else [])))
    plot = args.out / f"{name}_ratios.png"
    plot_ratios(plot, "vLLM on a CPU with the Kimi Linear plugin", ratios)
    print(f"plot: {plot}")
    print_result("vllm_cpu", ratios, args.out / f"{name}.json", plot=plot.name)


if __name__ == "__main__":
    main()
