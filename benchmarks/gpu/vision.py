"""MoonViT's packed operations, beside torch's way image by image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.case import OURS, Case, Size
from kimi_kernels.vision import interpolate_pos_embed, merge_patches, rope_2d

HEADS, WIDTH, DIM, TABLE, THETA = 16, 72, 1152, 64, 10000.0  # MoonViT (Kimi-VL, section 2.1)
TORCH = "torch"
GRIDS = [[32, 32], [64, 48], [27 * 2, 20 * 2], [128, 96]]
TINY = [[4, 6], [2, 2], [8, 4]]


def rotations(grids: list[list[int]], width: int, device: Any) -> Tensor:
    """[L, 1, width / 2] unit complex numbers: column and row angles in turn. Made once a model, as servers do."""
    frequency = THETA ** (-torch.arange(0, width, 4, device=device, dtype=torch.float64) / width)
    parts = []
    for rows, columns in grids:
        y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
        angle = torch.stack([x.flatten()[:, None] * frequency, y.flatten()[:, None] * frequency], -1).flatten(1)
        parts.append(torch.polar(torch.ones_like(angle), angle).to(torch.complex64))
    return torch.cat(parts)[:, None]


def tokens(grids: list[list[int]]) -> int:
    return sum(rows * columns for rows, columns in grids)


def rope(grids: list[list[int]], heads: int, width: int) -> Case:
    length = tokens(grids)

    def make(device: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        qkv = torch.randn(length, 3, heads, width, device=device).to(torch.bfloat16)
        q, k = qkv[:, 0], qkv[:, 1]
        grid, turn = torch.tensor(grids, device=device), rotations(grids, width, device)

        def one(x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)

        return {OURS: lambda: lambda: rope_2d(q, k, grid), TORCH: lambda: lambda: (one(q), one(k))}

    return Case(
        "2-D rotary", f"{len(grids)} images, {length} patches", make, 2 * 4 * length * heads * width,
        6 * length * heads * width,
    )  # fmt: skip


def positions(grids: list[list[int]], table: int, dim: int) -> Case:
    length = tokens(grids)

    def make(device: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        x = torch.randn(length, dim, device=device).to(torch.bfloat16)
        weight = torch.randn(table, table, dim, device=device).to(torch.bfloat16)
        grid = torch.tensor(grids, device=device)

        def in_torch() -> Tensor:
            image = weight.permute(2, 0, 1)[None].float()
            parts = [
                F.interpolate(image, size=size, mode="bicubic").squeeze(0).permute(1, 2, 0).flatten(0, 1)
                for size in grids
            ]
            return x + torch.cat(parts).to(x.dtype)

        return {OURS: lambda: torch.no_grad()(lambda: interpolate_pos_embed(x, weight, grid)), TORCH: lambda: in_torch}

    return Case(
        "interpolated positions", f"{len(grids)} images, {length} patches", make,
        2 * dim * (2 * length + table * table), 2 * 16 * length * dim,
    )  # fmt: skip


def merge(grids: list[list[int]], dim: int) -> Case:
    length = tokens(grids)

    def make(device: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        x = torch.randn(length, dim, device=device).to(torch.bfloat16)
        grid = torch.tensor(grids, device=device)
        sizes = [rows * columns for rows, columns in grids]

        def in_torch() -> Tensor:
            parts = []
            for part, (rows, columns) in zip(x.split(sizes), grids):
                kernels = part.view(rows // 2, 2, columns // 2, 2, dim).transpose(1, 2)
                parts.append(kernels.reshape(rows * columns // 4, 4, dim))
            return torch.cat(parts)

        return {OURS: lambda: lambda: merge_patches(x, grid, num_merged=length // 4), TORCH: lambda: in_torch}

    return Case("merged patches", f"{len(grids)} images, {length} patches", make, 2 * 2 * length * dim)


def cases(size: Size) -> list[Case]:
    if size == "tiny":
        return [rope(TINY, 2, 16), positions(TINY, 6, 24), merge(TINY, 24)]
    return [rope(GRIDS, HEADS, WIDTH), positions(GRIDS, TABLE, DIM), merge(GRIDS, DIM)]
