"""Cost of a MuonClip step: time and memory against AdamW and torch.optim.Muon, bytes sent, start-up of Python.

python -m benchmarks.muonclip [--quick] [--device cuda]

Step: the optimizer that runs inside Megatron's wrappers, on the matrices of one layer, against torch's AdamW, torch's
Muon (one matrix after another) and, where emerging-optimizers is installed, the Muon of Megatron's own `--optimizer
muon`, on the same matrices, in turn. Processor or GPU time of one process.
Bytes: processes over gloo hold the matrices of several layers as Megatron's distributed optimizer cuts them, and send
what a step sends: gradients reduce-scattered in float32, the exchange of cut matrices in bfloat16, weights gathered.
Calls of torch.distributed are counted; nothing is computed, so the matrices are 4 times smaller in each dimension.
Shares: two processes with whole gradients, each matrix orthogonalised once and sent, against by both.
Start-up: the line that every Python start runs where kimi-stack is installed, without the flag.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import statistics
import tempfile
import time
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from benchmarks.common import Ratio, paired_ratio, print_result, table, take_turns
from megatron_kimi.attention import Slice
from megatron_kimi.distributed import ALONE, Exchange, Group, Matrix, Piece
from megatron_kimi.inner import MuonClipInner
from megatron_kimi.optimizer import MuonClipConfig

Shape = tuple[int, int]
# Weights as torch has them, [out, in].
LAYERS: dict[str, list[Shape]] = {
    # Moonlight-16B-A3B: up or down projections of experts, 2048 wide and 1408 deep
    "8 experts 2048x1408": [(1408, 2048)] * 8,
    # a dense projection of that size in Kimi K2: 2048 of an expert, 7168 wide
    "2 matrices 7168x2048": [(2048, 7168)] * 2,
    # Moonlight's attention: query, latent down, key-value up, output
    "attention of Moonlight": [(3072, 2048), (512, 2048), (64, 2048), (4096, 512), (2048, 2048)],
}
QUICK: dict[str, list[Shape]] = {
    "2 experts 1024x704": [(704, 1024)] * 2,
    "1 matrix 1792x512": [(512, 1792)],
}
# A layer of Moonlight with 8 of its experts, and how often it repeats: enough matrices for every rank.
SENT_LAYER: list[Shape] = [*LAYERS["attention of Moonlight"], *[(1408, 2048), (1408, 2048), (2048, 1408)] * 8]
SENT_LAYERS, SHRINK = 3, 4  # an odd number, so that some matrix is cut for two ranks, too
GOAL_BYTES = 1.25  # Moonlight, section 2.3: between 1 and 1.25 of AdamW's
GOAL_START = 1e-3  # seconds


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds(run: Callable[[], object], device: str) -> float:
    start = clock(device)
    run()
    return clock(device) - start


def parameters(shapes: list[Shape], device: str) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def ours(shapes: list[Shape], device: str) -> MuonClipInner:
    """The optimizer that Megatron's wrappers run, on one rank that has every matrix whole."""
    weights = parameters(shapes, device)
    inner = MuonClipInner(weights, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    matrices = {
        Matrix(f"matrix {n}", (p.shape[0], p.shape[1]), (Piece(0, 0, p.numel()),)): p
        for n, p in enumerate(weights)
    }
    slices: dict[nn.Parameter, Slice] = {p: Slice(p, 0) for p in weights}
    inner.bind(MuonClipConfig(), [Exchange(list(matrices), ALONE, ALONE)], slices, matrices, None)
    return inner


def upstream_muon(shapes: list[Shape], device: str) -> torch.optim.Optimizer | None:
    """Megatron's own Muon with our options, or None where emerging-optimizers is not installed."""
    if not hasattr(typing, "override"):
        typing.override = lambda function: function  # type: ignore[attr-defined]  # its one need of Python 3.12
    try:
        from emerging_optimizers.orthogonalized_optimizers.muon import Muon
    except ImportError:
        return None
    weights = parameters(shapes, device)
    return Muon(weights, 1e-3, 0.95, 0.1, nesterov=True, coefficient_type="simple", extra_scale_factor=0.2)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)
    )


def measure_steps(
    layers: dict[str, list[Shape]], device: str, repeats: int
) -> tuple[list[dict], list[Ratio]]:
    rows, ratios = [], []
    for name, shapes in layers.items():
        inner = ours(shapes, device)
        adamw = torch.optim.AdamW(parameters(shapes, device), lr=1e-3, weight_decay=0.1)
        muon = torch.optim.Muon(
            parameters(shapes, device),
            lr=1e-3,
            weight_decay=0.1,
            momentum=0.95,
            nesterov=True,
            adjust_lr_fn="match_rms_adamw",
        )
        upstream = upstream_muon(shapes, device)
        optimizers = {"ours": inner, "adamw": adamw, "muon": muon} | (
            {"upstream": upstream} if upstream else {}
        )
        steps = {
            who: functools.partial(seconds, optimizer.step, device) for who, optimizer in optimizers.items()
        }
        for step in steps.values():  # makes the state
            step()
        took: dict[str, list[float]] = {who: [] for who in steps}
        for _ in range(repeats):
            for who, step in steps.items():
                took[who].append(step())
        mine, theirs, plain = took["ours"], took["muon"], took["adamw"]
        ratios.append(paired_ratio(f"{name}: step time against torch.optim.Muon", mine, theirs, 1.0, "lower"))
        if upstream:
            ratios.append(
                paired_ratio(
                    f"{name}: step time against Megatron's Muon", mine, took["upstream"], 1.0, "lower"
                )
            )
        memory = state_bytes(inner) / state_bytes(adamw)
        ratios.append(Ratio(f"{name}: optimizer state against AdamW", memory, memory, memory, 0.51, "lower"))
        rows.append(
            {
                "case": name,
                "ours_ms": statistics.median(mine) * 1e3,
                "torch_muon_ms": statistics.median(theirs) * 1e3,
                "megatron_muon_ms": statistics.median(took["upstream"]) * 1e3 if upstream else None,
                "adamw_ms": statistics.median(plain) * 1e3,
                "state_mb": state_bytes(inner) / 2**20,
                "adamw_state_mb": state_bytes(adamw) / 2**20,
            }
        )
    return rows, ratios


def cut(shapes: list[Shape], ranks: int) -> list[Matrix]:
    """Matrices behind one another in one buffer that `ranks` ranks hold equal ranges of, as in ZeRO-1."""
    total = sum(n * m for n, m in shapes)
    share = -(-total // ranks)
    matrices, start = [], 0
    for index, (n, m) in enumerate(shapes):
        stop = start + n * m
        held = [(r, max(start, r * share), min(stop, (r + 1) * share)) for r in range(ranks)]
        pieces = tuple(Piece(r, low - start, high - start) for r, low, high in held if low < high)
        matrices.append(Matrix(f"matrix {index}", (n, m), pieces))
        start = stop
    return matrices


class Counter:
    """Bytes that this rank sends, counted where torch.distributed is called (a ring's share for collectives)."""

    def __init__(self) -> None:
        self.bytes = 0
        self._real = {name: getattr(dist, name) for name in self._sent()}

    @staticmethod
    def _sent() -> dict[str, Callable[..., float]]:
        def part(group: Any) -> float:
            size = dist.get_world_size(group)
            return (size - 1) / size

        return {
            "reduce_scatter_tensor": lambda out, given, *a, group=None, **k: given.nbytes * part(group),
            "all_gather_into_tensor": lambda out, given, *a, group=None, **k: out.nbytes * part(group),
            "all_to_all_single": lambda out, given, *a, group=None, **k: given.nbytes,  # nothing to oneself
        }

    def __enter__(self) -> Counter:
        for name, sent in self._sent().items():

            def counted(
                *args: Any, _name: str = name, _sent: Callable[..., float] = sent, **kwargs: Any
            ) -> Any:
                self.bytes += int(_sent(*args, **kwargs))
                return self._real[_name](*args, **kwargs)

            setattr(dist, name, counted)
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in self._real.items():
            setattr(dist, name, real)


def join(rank: int, ranks: int, file: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    # The calls that Megatron makes; torch 2.13 has newer names for them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)


def send_a_step(rank: int, ranks: int, file: str, out: str) -> None:
    """One process: the communication of a step, weights gathered in bfloat16 (Megatron) and float32 (the paper)."""
    join(rank, ranks, file)
    shapes = [(n // SHRINK, m // SHRINK) for n, m in SENT_LAYER * SENT_LAYERS]
    matrices = cut(shapes, ranks)
    share = -(-sum(n * m for n, m in shapes) // ranks)
    sent: dict[str, float] = {}

    def count(name: str, work: Callable[[], object]) -> None:
        with Counter() as counter:
            work()
        total = torch.tensor([counter.bytes])
        dist.all_reduce(total)
        sent[name] = float(total)

    gradients, own = torch.ones(share * ranks), torch.ones(share)
    count("reduce-scatter", lambda: dist.reduce_scatter_tensor(own, gradients))
    for name, dtype in (("gather in bfloat16", torch.bfloat16), ("gather in float32", torch.float32)):
        gathered = torch.empty(share * ranks, dtype=dtype)
        count(name, lambda g=gathered, d=dtype: dist.all_gather_into_tensor(g, own.to(d)))
    for name, once in (("exchange", True), ("exchange, everywhere", False)):
        exchange = Exchange(matrices, Group.of(dist.group.WORLD), ALONE, once)

        def slices(matrix: Matrix) -> Tensor:
            piece = matrix.piece(rank)
            assert piece is not None
            return torch.ones(piece.stop - piece.start, dtype=torch.bfloat16)

        count(name, lambda e=exchange, s=slices: list(e.run(s, lambda _, whole: list(whole))))
    if rank == 0:
        torch.save(sent, out)
    dist.barrier()
    dist.destroy_process_group()


def share_work(rank: int, ranks: int, file: str, out: str, shapes: list[Shape], repeats: int) -> None:
    """One process: steps with whole gradients on every rank, each matrix orthogonalised once, or by all ranks."""
    join(rank, ranks, file)
    group = Group.of(dist.group.WORLD)
    steps = {}
    for name, once in (("once", True), ("everywhere", False)):
        torch.manual_seed(0)
        weights = parameters(shapes, "cpu")
        inner = MuonClipInner(weights, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
        matrices = {
            Matrix(
                f"matrix {n}", (p.shape[0], p.shape[1]), tuple(Piece(r, 0, p.numel()) for r in range(ranks))
            ): p
            for n, p in enumerate(weights)
        }
        slices: dict[nn.Parameter, Slice] = {p: Slice(p, 0) for p in weights}
        inner.bind(MuonClipConfig(), [Exchange(list(matrices), group, ALONE, once)], slices, matrices, None)
        inner.step()

        def step(inner: MuonClipInner = inner) -> float:
            dist.barrier()
            start = time.perf_counter()
            inner.step()
            dist.barrier()
            return time.perf_counter() - start

        steps[name] = step
    everywhere, once_times = take_turns(steps["everywhere"], steps["once"], repeats)
    if rank == 0:
        torch.save((everywhere, once_times), out)
    dist.barrier()
    dist.destroy_process_group()


def processes(worker: Callable[..., None], ranks: int, *arguments: Any) -> Any:
    """What rank 0 of `ranks` processes running `worker` saved."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (ranks, f"{folder}/store", f"{folder}/out", *arguments), nprocs=ranks)
        return torch.load(f"{folder}/out")


def measure_bytes(sizes: list[int]) -> tuple[list[dict], list[Ratio]]:
    rows, ratios = [], []
    for ranks in sizes:
        sent = processes(send_a_step, ranks)
        for weights in ("bfloat16", "float32"):
            plain = sent["reduce-scatter"] + sent[f"gather in {weights}"]
            value = (plain + sent["exchange"]) / plain
            name = f"bytes sent, {ranks} ranks, weights gathered in {weights}: against AdamW"
            ratios.append(Ratio(name, value, value, value, GOAL_BYTES, "lower"))
        rows.append({"ranks": ranks, **{name: value / 2**20 for name, value in sent.items()}})
    return rows, ratios


def measure_shares(shapes: list[Shape], repeats: int) -> Ratio:
    everywhere, once = processes(share_work, 2, shapes, repeats)
    return paired_ratio("orthogonalised once against on both ranks: speed", everywhere, once, 1.0)


def measure_start(repeats: int) -> tuple[float, Ratio]:
    """Seconds of the .pth line without the flag, and its share of the millisecond that it may take."""
    package = importlib.util.find_spec("megatron_kimi")
    assert package is not None and package.submodule_search_locations
    folder, name = Path(package.submodule_search_locations[0]), "kimi_stack_megatron.pth"
    file = next(f for f in (folder / name, folder.parent / name) if f.is_file())
    code, took = compile(file.read_text(), name, "exec"), []
    for _ in range(repeats):
        start = time.perf_counter()
        exec(code, {})
        took.append(time.perf_counter() - start)
    took.sort()
    middle, low, high = took[len(took) // 2], took[len(took) // 20], took[-len(took) // 20]
    ratio = Ratio(
        "start-up line against 1 ms", middle / GOAL_START, low / GOAL_START, high / GOAL_START, 1.0, "lower"
    )
    return middle, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="smaller matrices and fewer repeats: under 50 seconds"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the steps are timed")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch for the steps on a CPU")
    parser.add_argument("--out", type=Path, help="file for the results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    before = os.getloadavg()[0]  # what else runs here; times of ratios are taken in turn
    steps, ratios = measure_steps(
        QUICK if arguments.quick else LAYERS, arguments.device, 3 if arguments.quick else 7
    )
    sent, sent_ratios = measure_bytes([2] if arguments.quick else [2, 4, 8])
    shares = measure_shares(
        [(704, 1024)] * 2 if arguments.quick else [(1408, 2048)] * 4, 3 if arguments.quick else 5
    )
    start, start_ratio = measure_start(1000)
    ratios += [*sent_ratios, shares, start_ratio]

    table(
        f"One step, {arguments.device}, {arguments.threads} thread(s) on a CPU",
        [
            "matrices",
            "ours ms",
            "torch Muon ms",
            "Megatron's Muon ms",
            "AdamW ms",
            "state MiB",
            "AdamW's state MiB",
        ],
        [[r["case"], *("-" if r[k] is None else f"{r[k]:.3g}" for k in list(r)[1:])] for r in steps],
    )
    table(
        "MiB sent by all ranks in a step",
        ["ranks", *list(sent[0])[1:]],
        [[str(r["ranks"]), *(f"{r[k]:.4g}" for k in list(r)[1:])] for r in sent],
    )
    print(f"start-up line of every Python process, without the flag: {start * 1e6:.1f} us")
    print_result(
        "muonclip",
        ratios,
        arguments.out,
        device=arguments.device,
        threads=arguments.threads,
        load=[round(load, 1) for load in (before, os.getloadavg()[0])],
        steps=steps,
        sent=sent,
        start_us=start * 1e6,
    )


if __name__ == "__main__":
    main()
