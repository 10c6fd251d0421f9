"""The largest attention logit of each head, beside torch's own ways to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import peers
from benchmarks.gpu.case import OURS, Absent, Call, Case, Size
from kimi_kernels import qk_max_logits

BLOCK = 1024  # queries whose scores torch's products hold at once
PRODUCTS, FLEX = "torch's products in blocks", "torch FlexAttention"


def in_blocks(q: Tensor, k: Tensor) -> Tensor:
    """[H] by products of blocks of queries with all keys that they see."""
    _, tokens, heads, width = q.shape
    qs, ks = q[0].transpose(0, 1), k[0].transpose(0, 1).repeat_interleave(heads // k.shape[2], 0)
    best = torch.full((heads,), float("-inf"), device=q.device)
    for i in range(0, tokens, BLOCK):
        end = min(i + BLOCK, tokens)
        scores = torch.bmm(qs[:, i:end], ks[:, :end].mT).float()
        hidden = torch.ones(end - i, end, dtype=torch.bool, device=q.device).triu(i + 1)
        best = torch.maximum(best, scores.masked_fill_(hidden, float("-inf")).amax((1, 2)))
    return best * width**-0.5


def case(tokens: int, heads: int, groups: int, width: int) -> Case:
    def make(device: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        q = torch.randn(1, tokens, heads, width, device=device).to(torch.bfloat16)
        k = torch.randn(1, tokens, heads // groups, width, device=device).to(torch.bfloat16)

        def flex() -> Call:
            if not q.is_cuda:
                raise Absent("torch FlexAttention: measured on a GPU only")
            module = "torch.nn.attention.flex_attention"
            attend, request, mask = (
                peers.imported(module, n) for n in ("flex_attention", "AuxRequest", "create_block_mask")
            )
            if width & (width - 1):
                raise Absent(f"torch FlexAttention takes widths that are powers of two, got {width}")
            causal = mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device=device)
            compiled = torch.compile(attend)
            x, y = q.transpose(1, 2), k.transpose(1, 2)

            def call() -> Tensor:
                aux = compiled(
                    x, y, y, block_mask=causal, enable_gqa=groups > 1, return_aux=request(max_scores=True)
                )[1]
                return aux.max_scores.amax((0, 2))

            return call

        return {OURS: lambda: lambda: qk_max_logits(q, k), PRODUCTS: lambda: lambda: in_blocks(q, k), FLEX: flex}

    return Case(
        "largest logits", f"T{tokens} H{heads}/{heads // groups} D{width}", make,
        2 * tokens * width * (heads + heads // groups), heads * tokens * tokens * width,
    )  # fmt: skip


def cases(size: Size) -> list[Case]:
    if size == "tiny":
        return [case(70, 2, 2, 16), case(40, 1, 1, 24)]
    first = [case(4096, 64, 1, 192)]
    return first if size == "quick" else [*first, case(8192, 32, 4, 128), case(4096, 32, 4, 128)]
