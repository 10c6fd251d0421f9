"""What the public vision functions accept; each calls one of these once."""

from __future__ import annotations

import torch
from torch import Tensor

MODES = ("bicubic", "bilinear")


def _readable(grid_thw: Tensor) -> bool:
    """Whether the values of a grid can be read without waiting for a GPU, and are known."""
    return grid_thw.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_grid(grid_thw: Tensor, name: str, x: Tensor) -> list[tuple[int, int, int]] | None:
    """The images' frames, rows and columns, or None where they cannot be read."""
    if grid_thw.dim() != 2 or grid_thw.shape[1] not in (2, 3):
        raise ValueError(
            f"grid_thw must have shape [N, 3] (frames, rows, columns) or [N, 2], got {tuple(grid_thw.shape)}"
        )
    if grid_thw.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"grid_thw must be int32 or int64, got {grid_thw.dtype}")
    if grid_thw.device != x.device and grid_thw.device.type != "cpu":
        raise ValueError(f"grid_thw must be on {name}'s device {x.device} or the CPU, got {grid_thw.device}")
    if not _readable(grid_thw):
        return None
    images = [(1, *row) if len(row) == 2 else tuple(row) for row in grid_thw.tolist()]
    for n, image in enumerate(images):
        if min(image) < 0:
            raise ValueError(f"grid_thw[{n}] must not be negative, got {grid_thw[n].tolist()}")
    patches = sum(t * h * w for t, h, w in images)
    if patches != len(x):
        raise ValueError(f"{name} must have the {patches} patches of grid_thw's images, got {len(x)}")
    return images


def _check_theta(theta: float) -> None:
    if not theta > 0:
        raise ValueError(f"theta must be positive, got {theta}")


def _check_head(name: str, width: int) -> None:
    if width == 0 or width % 4:
        raise ValueError(
            f"{name} must have a head size that is a multiple of 4, got {width}: "
            "a row and a column turn a pair of channels each"
        )


def check_rope(q: Tensor, k: Tensor, grid_thw: Tensor, theta: float) -> None:
    if q.dim() != 3:
        raise ValueError(f"q must have shape [L, H, D], got {tuple(q.shape)}")
    if q.shape != k.shape or q.dtype != k.dtype:
        raise ValueError(
            f"q and k must share shape and dtype, got {q.dtype} {tuple(q.shape)} and {k.dtype} {tuple(k.shape)}"
        )
    _check_head("q", q.shape[2])
    _check_theta(theta)
    _check_grid(grid_thw, "q", q)


def check_packed_rope(qkv: Tensor, grid_thw: Tensor, theta: float) -> None:
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must have shape [L, 3, H, D], got {tuple(qkv.shape)}")
    if qkv.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "qkv requires a gradient, which writing in place has not: use rope_2d, or torch.no_grad()"
        )
    _check_head("qkv", qkv.shape[3])
    _check_theta(theta)
    _check_grid(grid_thw, "qkv", qkv)


def check_interpolation(
    x: Tensor, weight: Tensor, grid_thw: Tensor, mode: str, time_weight: Tensor | None
) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must have shape [L, D], got {tuple(x.shape)}")
    if weight.dim() != 3 or weight.shape[2] != x.shape[1] or 0 in weight.shape[:2]:
        raise ValueError(
            f"weight must have shape [rows, columns, {x.shape[1]}] to match x, got {tuple(weight.shape)}"
        )
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if time_weight is not None:
        if time_weight.dim() != 2 or time_weight.shape[1] != x.shape[1] or len(time_weight) == 0:
            raise ValueError(
                f"time_weight must have shape [T, {x.shape[1]}] to match x, got {tuple(time_weight.shape)}"
            )
        if time_weight.requires_grad and torch.is_grad_enabled():
            raise ValueError("time_weight requires a gradient, but is taken as constant: pass it detached")
    images = _check_grid(grid_thw, "x", x)
    for n, (t, _, _) in enumerate(images or ()):
        if time_weight is not None and t > len(time_weight):
            raise ValueError(
                f"grid_thw[{n}] has {t} frames, time_weight rows for {len(time_weight)}: cut videos into such chunks"
            )


def check_merge(x: Tensor, grid_thw: Tensor, kernel: tuple[int, int], num_merged: int | None) -> int:
    """The number of merged patches."""
    if x.dim() != 2:
        raise ValueError(f"x must have shape [L, D], got {tuple(x.shape)}")
    if len(kernel) != 2 or min(kernel) < 1:
        raise ValueError(f"kernel must be two positive integers, got {kernel}")
    images = _check_grid(grid_thw, "x", x)
    if images is None:
        if num_merged is not None:
            return num_merged
        if grid_thw.shape[1] == 2:
            return x.shape[0] // (kernel[0] * kernel[1])
        raise ValueError(
            "num_merged is missing: a grid [N, 3] on a GPU or under torch.compile is not read; "
            "pass the sum of (rows // kernel[0]) * (columns // kernel[1])"
        )
    for n, (_, h, w) in enumerate(images):
        if h % kernel[0] or w % kernel[1]:
            raise ValueError(
                f"grid_thw[{n}] has {h} x {w} patches, no multiple of the kernel {kernel[0]} x {kernel[1]}: "
                "pad the image"
            )
    count = sum((h // kernel[0]) * (w // kernel[1]) for t, h, w in images if t)
    if num_merged is not None and num_merged != count:
        raise ValueError(f"num_merged must be {count} for this grid_thw, got {num_merged}")
    return count
