"""Attention Residuals: in one pass, with gradients, and in two phases for a group of sub-layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import peers
from benchmarks.gpu.case import OURS, Call, Case, Size
from kimi_kernels import attn_res, attn_res_phase1, attn_res_step

FLA, DIRECT = "FLA", "ours, one pass a sub-layer"
GROUP = 4  # sub-layers that share a first phase


def sources(device: Any, count: int, tokens: int, width: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(tokens, width, device=device).to(torch.bfloat16) for _ in range(count)]


def weights(device: Any, width: int, *many: int) -> tuple[Tensor, Tensor, Tensor]:
    """A query, the gain of the keys' norm and that of the norm behind the mixture."""
    query = torch.randn(*many, width, device=device) / width**0.5
    return query, torch.rand(*many, width, device=device) + 0.5, torch.rand(width, device=device) + 0.5


def direct(count: int, tokens: int, width: int) -> Case:
    def make(device: Any) -> dict[str, Any]:
        x, (query, gain, out_gain) = sources(device, count, tokens, width), weights(device, width)

        def fla() -> Call:
            function = peers.imported("fla.ops.attnres", "fused_attnres")
            return torch.no_grad()(lambda: function(query, x, gain, out_gain))

        return {OURS: lambda: torch.no_grad()(lambda: attn_res(query, x, gain, out_gain)), FLA: fla}

    return Case(
        "AttnRes", f"n{count} d{width} T{tokens}", make, 2 * tokens * width * (count + 1),
        5 * tokens * width * count,
    )  # fmt: skip


def with_gradients(count: int, tokens: int, width: int) -> Case:
    def make(device: Any) -> dict[str, Any]:
        x, (query, gain, out_gain) = sources(device, count, tokens, width), weights(device, width)
        leaves = [*x, query, gain, out_gain]
        for leaf in leaves:
            leaf.requires_grad_()
        weight = torch.randn(tokens, width, device=device).to(torch.bfloat16)

        def through(function: Any) -> Call:
            return lambda: torch.autograd.grad(function(query, x, gain, out_gain), leaves, weight)

        return {
            OURS: lambda: through(attn_res),
            FLA: lambda: through(peers.imported("fla.ops.attnres", "fused_attnres")),
        }

    return Case(
        "AttnRes forward and backward", f"n{count} d{width} T{tokens}", make,
        2 * tokens * width * (3 * count + 2), 20 * tokens * width * count,
    )  # fmt: skip


def two_phase(count: int, tokens: int, width: int) -> Case:
    """GROUP sub-layers over `count` finished blocks and the sum that grows: residual update and next norm included.

    Its floor is what one pass a sub-layer has to move: every source once for each, the sum's old and new value, the
    update and the result.
    """
    one_pass = GROUP * 2 * tokens * width * (count + 4)

    def make(device: Any) -> dict[str, Any]:
        x, (queries, gains, out_gain) = sources(device, count, tokens, width), weights(device, width, GROUP)
        start = torch.randn(tokens, width, device=device).to(torch.bfloat16)
        updates = [torch.randn_like(start) for _ in range(GROUP)]

        @torch.no_grad()
        def grouped() -> Tensor:
            out, lse = attn_res_phase1(queries, x, gains)
            partial, merged = start, start
            for i, update in enumerate(updates):
                merged, partial = attn_res_step(out[i], lse[i], partial, update, queries[i], gains[i], out_gain)
            return merged

        def apart(mix: Any) -> Call:
            @torch.no_grad()
            def call() -> Tensor:
                partial, merged = start, start
                for i, update in enumerate(updates):
                    partial = partial + update
                    merged = mix(queries[i], [*x, partial], gains[i], out_gain)
                return merged

            return call

        return {
            OURS: lambda: grouped,
            DIRECT: lambda: apart(attn_res),
            FLA: lambda: apart(peers.imported("fla.ops.attnres", "fused_attnres")),
        }

    least = 2 * tokens * width * (count + GROUP + GROUP * 6)
    return Case(
        f"AttnRes, {GROUP} sub-layers", f"n{count} d{width} T{tokens}", make, least,
        5 * tokens * width * (count + 1) * GROUP,
        floors={"what one pass a sub-layer moves": (one_pass, 1.0)},
    )  # fmt: skip


def cases(size: Size) -> list[Case]:
    if size == "tiny":
        return [direct(3, 5, 24), with_gradients(2, 4, 16), two_phase(2, 4, 32)]
    first = [two_phase(8, 8192, 7168), direct(8, 8192, 7168), with_gradients(8, 8192, 2304)]
    if size == "quick":
        return first
    return [
        *first, *(direct(n, 8192, d) for d in (2304, 7168) for n in (1, 2, 4, 6, 10)), direct(8, 8192, 2304),
        two_phase(8, 8192, 2304), two_phase(8, 64, 7168), with_gradients(8, 8192, 7168),
    ]  # fmt: skip
