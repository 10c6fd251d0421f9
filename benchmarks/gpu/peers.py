"""Other people's implementations: each is imported when asked for, and `Absent` says why one is not there."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import Absent

FLASHKDA = "FLASHKDA_LIBRARY"  # the file `_flashkda_C.abi3.so` of a vLLM wheel, where vLLM itself is not installed


def imported(module: str, name: str) -> Any:
    """`name` of `module`, or Absent with the reason."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a peer may fail to import in any way
        said = (str(error).splitlines() or [""])[0]
        raise Absent(f"{module}.{name}: {type(error).__name__}: {said}") from None


def versions() -> dict[str, str]:
    """Distribution -> version of what may take part."""
    from importlib import metadata

    found = {}
    for name in ("torch", "triton", "fla-core", "flash-linear-attention", "flash-kda", "vllm", "liger-kernel"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def flash_kda() -> Callable[..., tuple[Tensor, Tensor]]:
    """FlashKDA's forward: takes (q, k, v, g, beta, A_log, dt_bias, lower_bound, cu_seqlens), as `chunk_kda` does."""
    path = os.environ.get(FLASHKDA)
    try:
        if path:
            torch.ops.load_library(path)
        else:
            importlib.import_module("vllm._flashkda_C")
        ops = torch.ops._flashkda_C
        schema = ops.fwd.default._schema
    except Exception as error:
        what = f"{FLASHKDA}={path}" if path else f"vllm._flashkda_C (or {FLASHKDA}=FILE)"
        raise Absent(f"FlashKDA: {what}: {(str(error).splitlines() or [''])[0]}") from None

    def run(q, k, v, g, beta, A_log, dt_bias, lower_bound, cu_seqlens):
        tokens, heads, width = q.shape[0] * q.shape[1], q.shape[2], q.shape[3]
        count = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, tokens + 1, q.shape[1], device=q.device)
        state = torch.zeros(count, heads, v.shape[3], width, device=q.device)
        out, final = torch.empty_like(v), torch.empty_like(state)
        space = ops.get_workspace_size(tokens, heads, count)
        workspace = torch.empty(space, dtype=torch.uint8, device=q.device)
        given = (
            q, k, v, g, beta, width**-0.5, out, workspace, A_log, dt_bias.view(heads, width), lower_bound,
            state, final, cu_seqlens.to(torch.int64),
        )  # fmt: skip
        ops.fwd(*given, *[None] * (len(schema.arguments) - len(given)))
        return out, final

    return run
