"""KDA on one CPU core: prefill against transformers' torch functions, decode against memory bandwidth.

python -m benchmarks.cpu_kda [--quick] [--out FOLDER]

Prefill: `chunk_kda`, K = V = 128, on tensors as the layer hands them over. The peer is the better of transformers' two
torch functions (chunk and recurrent; beyond 8192 token heads only recurrent: the chunk form then needs gigabytes and is
several times slower), measured in turn with ours. Times are processor time of the one thread. The floor is the time
that the matrix products of the recurrence would take at the speed of torch's own fp32 matrix product here.
Decode: `kda_decode`, 32 heads of 128, on a state pool as large as the batch. The floor is the time of a copy that moves
as many bytes as the state read and written once.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Ratio, paired_ratio, print_result, table, take_turns
from kimi_kernels import chunk_kda, kda_decode

WIDTH = 128
GOAL_PREFILL = 10.0  # times the better torch function, T=2048, H=4, fp32, one thread
GOAL_DECODE = 0.7  # of the bandwidth of a copy, where the state pool exceeds the caches
HEADLINE = (2048, 4, torch.float32)
# Token heads up to which the chunk peer is tried: its pairwise decays take 32 KiB each, several times over.
CHUNK_PEER_LIMIT = 8192
DECODE_HEADS = 32
# Per token and value head: k S, q S and the update of S (K x V each), two multiply-adds to a pair.
PREFILL_FLOP = 3 * 2 * WIDTH * WIDTH
STATE_BYTES = DECODE_HEADS * WIDTH * WIDTH * 4


class Case(NamedTuple):
    tokens: int
    heads: int
    dtype: torch.dtype
    repeats: int
    peer_repeats: int  # 0: too slow to be worth it; ours alone


FULL = [
    Case(t, h, dtype, repeats, peers)
    for dtype in (torch.float32, torch.bfloat16)
    for t, h, repeats, peers in [
        (128, 4, 15, 5), (512, 4, 15, 5), (2048, 4, 11, 5), (8192, 4, 5, 3), (2048, 16, 5, 3), (2048, 32, 3, 3),
    ]
]  # fmt: skip
QUICK = [
    Case(512, 4, torch.float32, 5, 3),
    Case(2048, 4, torch.float32, 5, 3),
    Case(2048, 4, torch.bfloat16, 3, 0),
    Case(8192, 4, torch.float32, 3, 0),
]


def seconds(run: Callable[[], object]) -> float:
    """Processor time of this thread, which does all the work here: other processes on the machine do not count."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def torch_peers() -> dict[str, Callable[..., object]]:
    """transformers' own functions, without the kernels that it may fetch from the hub."""
    from transformers.models.kimi_linear import modeling_kimi_linear as modeling

    names = {"chunk": "chunk_kimi_delta_attention", "recurrent": "recurrent_kimi_delta_attention"}
    functions = {key: getattr(modeling, name) for key, name in names.items()}
    return {key: getattr(function, "__wrapped__", function) for key, function in functions.items()}


def prefill_inputs(case: Case) -> list[Tensor]:
    shape = (1, case.tokens, case.heads, WIDTH)
    q, k = (F.normalize(torch.randn(shape), dim=-1) for _ in range(2))
    g = -torch.rand(shape)
    return [x.to(case.dtype) for x in (q, k, torch.randn(shape), g, torch.rand(shape[:3]))]


def call_peer(function: Callable[..., object], inputs: list[Tensor]) -> object:
    q, k, v, g, beta = inputs
    return function(q, k, v, g=g, beta=beta, initial_state=None, output_final_state=True)


def matmul_flops() -> float:
    """Floating-point operations per second of torch's fp32 matrix product: the best of a few."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / min(seconds(lambda: a @ b) for _ in range(7))


def measure_prefill(
    cases: list[Case], peers: dict[str, Callable[..., object]]
) -> tuple[list[dict], list[Ratio]]:
    rows, ratios = [], []
    for case in cases:
        inputs = prefill_inputs(case)
        ours = functools.partial(chunk_kda, *inputs, output_final_state=True)

        theirs: list[float] = []
        best = None
        if peers and case.peer_repeats:
            calls = {
                name: functools.partial(call_peer, function, inputs)
                for name, function in peers.items()
                if name != "chunk" or case.tokens * case.heads <= CHUNK_PEER_LIMIT
            }
            best = min(calls, key=lambda name, calls=calls: seconds(calls[name]))
        ours()
        if best is None:
            mine = [seconds(ours) for _ in range(case.repeats)]
        else:
            # A peer call takes as long as many of ours: the median of a few of ours stands beside each.
            mine, theirs = take_turns(
                lambda ours=ours: statistics.median(seconds(ours) for _ in range(3)),
                functools.partial(seconds, calls[best]),
                case.peer_repeats,
            )
        floor = case.tokens * case.heads * PREFILL_FLOP / matmul_flops()
        name = f"prefill T={case.tokens} H={case.heads} {str(case.dtype).removeprefix('torch.')}"
        goal = GOAL_PREFILL if (case.tokens, case.heads, case.dtype) == HEADLINE else 1.0
        ratio = None
        if best is not None:
            ratio = paired_ratio(f"{name}: speed against transformers' {best}", theirs, mine, goal)
            ratios.append(ratio)
        ms = statistics.median(mine) * 1e3
        rows.append(
            {
                "case": name,
                "tokens": case.tokens,
                "heads": case.heads,
                "dtype": str(case.dtype),
                "ms": ms,
                "gflops": case.tokens * case.heads * PREFILL_FLOP / ms / 1e6,
                "matmul_floor_ms": floor * 1e3,
                "peer": best,
                "peer_ms": statistics.median(theirs) * 1e3 if theirs else None,
                "ratio": ratio.value if ratio else None,
            }
        )
    return rows, ratios


def measure_decode(batches: list[int], repeats: int) -> tuple[list[dict], list[Ratio]]:
    rows, ratios = [], []
    channels = 3 * DECODE_HEADS * WIDTH
    weight, A_log = torch.randn(channels, 4), torch.zeros(DECODE_HEADS)
    dt_bias, norm_weight = torch.zeros(DECODE_HEADS * WIDTH), torch.ones(WIDTH)
    for batch in batches:
        state = 0.1 * torch.randn(batch, DECODE_HEADS, WIDTH, WIDTH)
        target = torch.empty_like(state)
        conv_state = torch.randn(batch, 3, channels)
        slots = torch.randperm(batch).to(torch.int32)
        qkv, beta = torch.randn(batch, channels), torch.randn(batch, DECODE_HEADS)
        g, gate = torch.randn(2, batch, DECODE_HEADS, WIDTH)
        out = torch.empty(batch, DECODE_HEADS * WIDTH)
        ours = functools.partial(
            kda_decode, qkv, g, beta, gate, weight, conv_state, state, slots, A_log, dt_bias, norm_weight,
            num_heads=DECODE_HEADS, head_dim=WIDTH, out=out,
        )  # fmt: skip
        copy = functools.partial(target.copy_, state)
        ours(), copy()
        mine, copies = take_turns(lambda ours=ours: seconds(ours), lambda copy=copy: seconds(copy), repeats)
        moved = 2 * batch * STATE_BYTES
        exceeds = batch * STATE_BYTES >= last_level_cache()
        name = f"decode N={batch} H={DECODE_HEADS}"
        ratio = paired_ratio(
            f"{name}: bandwidth against a copy's", copies, mine, GOAL_DECODE if exceeds else 0.0
        )
        if exceeds:
            ratios.append(ratio)
        rows.append(
            {
                "case": name,
                "batch": batch,
                "us": statistics.median(mine) * 1e6,
                "gb_per_s": moved / statistics.median(mine) / 1e9,
                "copy_gb_per_s": moved / statistics.median(copies) / 1e9,
                "ratio": ratio.value,
                "exceeds_cache": exceeds,
            }
        )
    return rows, ratios


def last_level_cache() -> int:
    """Bytes of the largest cache of core 0, or 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes, default=32 << 20)


def draw(prefill: list[dict], decode: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for dtype in sorted({row["dtype"] for row in prefill}):
        rows = [row for row in prefill if row["dtype"] == dtype and row["heads"] == 4]
        label = dtype.removeprefix("torch.")
        left.plot([r["tokens"] for r in rows], [r["ms"] for r in rows], "o-", label=f"chunk_kda {label}")
        with_peer = [r for r in rows if r["peer_ms"]]
        if with_peer:
            left.plot(
                [r["tokens"] for r in with_peer], [r["peer_ms"] for r in with_peer], "s--",
                label=f"transformers, better of two, {label}",
            )  # fmt: skip
    rows = [row for row in prefill if row["dtype"] == "torch.float32" and row["heads"] == 4]
    left.plot(
        [r["tokens"] for r in rows], [r["matmul_floor_ms"] for r in rows], "k:", label="fp32 matmul floor"
    )
    left.set(
        xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title="Prefill, 4 heads of 128, one thread"
    )
    left.legend(fontsize=8)
    batches = [row["batch"] for row in decode]
    right.plot(batches, [row["gb_per_s"] for row in decode], "o-", label="kda_decode")
    right.plot(batches, [row["copy_gb_per_s"] for row in decode], "k:", label="copy of the states")
    right.set(xscale="log", xlabel="sequences", ylabel="GB/s", title="Decode, 32 heads of 128, one thread")
    right.set_ylim(bottom=0)
    right.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats: under 50 seconds")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder of the plot and the figures"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    try:
        peers = torch_peers()
    except ImportError as error:
        print(f"peer absent: transformers with kimi_linear ({error}); install transformers>=5.16.1")
        peers = {}

    prefill, ratios = measure_prefill(QUICK if arguments.quick else FULL, peers)
    decode, decode_ratios = measure_decode([1, 32] if arguments.quick else [1, 2, 4, 8, 16, 32, 64], 31)
    ratios += decode_ratios
    table(
        "Prefill, K = V = 128, one thread",
        ["case", "ours ms", "GFLOP/s", "matmul floor ms", "peer", "peer ms", "times faster"],
        [
            [
                row["case"], f"{row['ms']:.2f}", f"{row['gflops']:.1f}", f"{row['matmul_floor_ms']:.2f}",
                row["peer"] or "-", f"{row['peer_ms']:.0f}" if row["peer_ms"] else "-",
                f"{row['ratio']:.1f}" if row["ratio"] else "-",
            ]
            for row in prefill
        ],
    )  # fmt: skip
    table(
        "Decode, one token a sequence, one thread",
        ["case", "us", "GB/s", "copy GB/s", "of copy", "pool exceeds caches"],
        [
            [
                row["case"], f"{row['us']:.0f}", f"{row['gb_per_s']:.1f}", f"{row['copy_gb_per_s']:.1f}",
                f"{row['ratio']:.0%}", "yes" if row["exceeds_cache"] else "no",
            ]
            for row in decode
        ],
    )  # fmt: skip
    name = "cpu_kda_quick" if arguments.quick else "cpu_kda"
    plot = arguments.out / f"{name}.png"
    draw(prefill, decode, plot)
    print(f"plot: {plot}")
    absent = [] if peers else ["transformers"]
    print_result(
        "cpu_kda", ratios, arguments.out / f"{name}.json",
        prefill=prefill, decode=decode, peers_absent=absent, plot=plot.name,
    )  # fmt: skip


if __name__ == "__main__":
    main()
