"""The oracles of the vision tests: one image after the other, as the published models compute them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


def images(grid: Tensor) -> list[tuple[int, int, int]]:
    return [(1, *row) if len(row) == 2 else tuple(row) for row in grid.tolist()]


def rotate(q: Tensor, k: Tensor, grid: Tensor, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Products with complex numbers, column and row in turns."""
    width = q.shape[-1]
    frequency = theta ** (-torch.arange(0, width, 4, dtype=torch.float64) / width)
    rotations = [torch.zeros(0, width // 2, dtype=torch.complex128)]
    for t, h, w in images(grid):
        y, x = torch.meshgrid(torch.arange(h).double(), torch.arange(w).double(), indexing="ij")
        angle = torch.stack([x.unsqueeze(-1) * frequency, y.unsqueeze(-1) * frequency], dim=-1).reshape(
            h * w, width // 2
        )
        rotations.append(torch.polar(torch.ones_like(angle), angle).repeat(t, 1))
    rotation = torch.cat(rotations).unsqueeze(1)
    turn = lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation).flatten(
        -2
    )
    return turn(q), turn(k)


def embed(
    x: Tensor, weight: Tensor, grid: Tensor, mode: str = "bicubic", time_weight: Tensor | None = None
) -> Tensor:
    embedded = [x[:0]]
    for t, h, w in images(grid):
        if t * h * w == 0:
            continue
        table = F.interpolate(weight.permute(2, 0, 1).unsqueeze(0), size=(h, w), mode=mode).squeeze(0)
        each = table.permute(1, 2, 0).reshape(1, h * w, -1).expand(t, -1, -1)
        if t > 1 and time_weight is not None:
            each = each + time_weight[:t].unsqueeze(1)
        embedded.append(each.flatten(0, 1))
    return x + torch.cat(embedded)


def merge(x: Tensor, grid: Tensor, kernel: tuple[int, int] = (2, 2)) -> Tensor:
    kh, kw = kernel
    merged = [x[:0].view(0, kh * kw, x.shape[1])]
    for part, (t, h, w) in zip(x.split([t * h * w for t, h, w in images(grid)]), images(grid)):
        if len(part):
            blocks = part.view(t, h // kh, kh, w // kw, kw, -1).mean(0).transpose(1, 2)
            merged.append(blocks.reshape(-1, kh * kw, x.shape[1]))
    return torch.cat(merged)


@pytest.fixture
def rotated() -> Callable[..., tuple[Tensor, Tensor]]:
    return rotate


@pytest.fixture
def embedded() -> Callable[..., Tensor]:
    return embed


@pytest.fixture
def merged() -> Callable[..., Tensor]:
    return merge
