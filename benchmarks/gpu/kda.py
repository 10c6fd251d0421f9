"""KDA: forward, forward and backward, the paged decode step, and what a call takes of the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import peers
from benchmarks.gpu.case import OURS, Absent, Call, Case, Size
from kimi_kernels import chunk_kda, kda_decode

WIDTH = 128
LOWER_BOUND = -5.0
CHUNK = 64
FLA, FLASHKDA, RECURRENCE = "FLA", "FlashKDA", "FLA, the recurrence alone"
IN_KERNEL = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
# H100, bfloat16: what the forward is aimed at, over what FLA takes there as published (kernel notes of its users).
FORWARD_GOALS = {96: 2.9, 16: 3.3}
BACKWARD_GOAL = 1.5
DECODE_GOAL = 0.85  # of a copy's bandwidth, at 128 sequences


def flops(tokens: int, heads: int) -> int:
    """Of the chunked forward (Kimi Linear, section 3.1 and appendix): 6 T d^2 + 3 T C d + T C^2 a head."""
    return heads * tokens * (6 * WIDTH**2 + 3 * CHUNK * WIDTH + CHUNK**2)


def moved(tokens: int, heads: int) -> int:
    """Bytes of q, k, v, g and o in bfloat16, and beta."""
    return heads * tokens * (5 * 2 * WIDTH + 2)


def inputs(device: Any, tokens: int, heads: int, packed: bool, width: int = WIDTH) -> dict[str, Tensor | None]:
    """What a layer hands over, before norm and gate."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, tokens, *shape, device=device, dtype=torch.float32).to(torch.bfloat16)

    offsets = None
    if packed:  # eight sequences, the longest nearly half of all
        shares = torch.tensor([0, 1, 3, 4, 7, 10, 18, 19, 34]) / 34
        offsets = (shares * tokens).round().to(torch.int64).to(device)
    return {
        "q": normal(heads, width), "k": normal(heads, width), "v": normal(heads, width), "g": normal(heads, width),
        "beta": normal(heads), "A_log": torch.empty(heads, device=device).uniform_(1, 16).log(),
        "dt_bias": torch.rand(heads * width, device=device), "cu_seqlens": offsets,
    }  # fmt: skip


def forward(tokens: int, heads: int, packed: bool = False, bounded: bool = True, goal: float | None = None) -> Case:
    def make(device: Any) -> dict[str, Any]:
        x = inputs(device, tokens, heads, packed)
        bound = LOWER_BOUND if bounded else None

        def ours() -> Call:
            return torch.no_grad()(lambda: chunk_kda(**x, **IN_KERNEL, lower_bound=bound, output_final_state=True))

        def fla() -> Call:
            function = peers.imported("fla.ops.kda", "chunk_kda")
            options = {"safe_gate": bounded, "lower_bound": bound, "output_final_state": True}
            return torch.no_grad()(lambda: function(**x, **IN_KERNEL, **options))

        def flash() -> Call:
            if not bounded:
                raise Absent("FlashKDA takes the bounded gate only")
            function = peers.flash_kda()
            names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias")
            return lambda: function(*(x[n] for n in names), LOWER_BOUND, x["cu_seqlens"])

        return {OURS: ours, FLA: fla, FLASHKDA: flash}

    kind = ", 8 packed" if packed else ""
    gate = "" if bounded else ", softplus gate"
    goals = {} if goal is None else {FLA: goal}
    return Case(
        "KDA forward", f"H{heads} T{tokens}{kind}{gate}", make, moved(tokens, heads), flops(tokens, heads), goals
    )


def forward_backward(tokens: int, heads: int) -> Case:
    def make(device: Any) -> dict[str, Any]:
        x = inputs(device, tokens, heads, packed=False)
        leaves = [t for t in x.values() if t is not None]
        for leaf in leaves:
            leaf.requires_grad_()
        weight = torch.randn(1, tokens, heads, WIDTH, device=device).to(torch.bfloat16)

        def through(function: Any, **options: Any) -> Call:
            def call() -> tuple[Tensor, ...]:
                out = function(**x, **IN_KERNEL, lower_bound=LOWER_BOUND, **options)[0]
                return torch.autograd.grad(out, leaves, weight)

            return call

        return {
            OURS: lambda: through(chunk_kda),
            FLA: lambda: through(peers.imported("fla.ops.kda", "chunk_kda"), safe_gate=True),
        }

    return Case(
        "KDA forward and backward", f"H{heads} T{tokens}", make, 3 * moved(tokens, heads), 3 * flops(tokens, heads),
        {FLA: BACKWARD_GOAL},
    )  # fmt: skip


def decode(sequences: int, heads: int = 32, width: int = WIDTH) -> Case:
    channels, conv = 3 * heads * width, 4
    states = 2 * sequences * heads * width * width * 4
    rest = sequences * 2 * (channels * (1 + 2 * (conv - 1)) + 3 * heads * width)

    def make(device: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        x = inputs(device, sequences, heads, packed=False, width=width)
        row = {n: t[0] for n, t in x.items() if n in ("g", "beta")}
        qkv = torch.cat([x[n][0].flatten(1) for n in ("q", "k", "v")], 1)
        state = torch.zeros(sequences, heads, width, width, device=device)
        slots = torch.arange(sequences, device=device, dtype=torch.int32)
        gate, norm = torch.randn_like(x["v"][0]), torch.ones(width, device=device)
        weight = (torch.randn(channels, conv, device=device) / conv).to(torch.bfloat16)
        window = torch.zeros(sequences, conv - 1, channels, device=device, dtype=torch.bfloat16)
        out = torch.empty(sequences, heads * width, device=device, dtype=torch.bfloat16)

        def ours() -> Call:
            return lambda: kda_decode(
                qkv, row["g"], row["beta"], gate, weight, window, state, slots, x["A_log"], x["dt_bias"], norm,
                num_heads=heads, head_dim=width, lower_bound=LOWER_BOUND, out=out,
            )  # fmt: skip

        def fla() -> Call:
            function = peers.imported("fla.ops.kda.fused_recurrent", "fused_recurrent_kda_fwd")
            one = {n: x[n].transpose(0, 1).contiguous() for n in ("q", "k", "v", "g", "beta")}
            return lambda: function(
                **one, A_log=x["A_log"], dt_bias=x["dt_bias"], initial_state=state, inplace_final_state=True,
                state_v_first=True, lower_bound=LOWER_BOUND, **IN_KERNEL,
            )  # fmt: skip

        return {OURS: ours, RECURRENCE: fla}

    # The recurrence alone does less and answers something else: times are compared, results are not.
    floors = {"copy of the states": (states, DECODE_GOAL if sequences >= 128 else 0.0)}
    return Case(
        "KDA decode", f"N{sequences} H{heads}", make, states + rest,
        sequences * heads * 6 * width * width, {}, floors, error=float("inf"),
    )  # fmt: skip


def cases(size: Size) -> list[Case]:
    if size == "tiny":
        return [
            forward(80, 1), forward(72, 2, packed=True), forward(20, 1, bounded=False), forward_backward(64, 1),
            decode(2, 1, width=32),
        ]  # fmt: skip
    first = [
        forward(8192, 96, goal=FORWARD_GOALS[96]),
        forward(8192, 16, goal=FORWARD_GOALS[16]),
        forward_backward(4096, 16),
        decode(128),
    ]
    if size == "quick":
        return first
    more = [forward(t, h) for t in (1024, 65536) for h in (16, 32, 96)]
    more += [forward(8192, 32), *(forward(8192, h, packed=True) for h in (16, 32, 96))]
    more += [forward(8192, 32, bounded=False), forward_backward(8192, 32)]
    return [*first, *more, *(decode(n) for n in (1, 8, 32, 256))]
