"""The vision operations in plain torch, over all images at once. It is the path for the CPU as well: these are gathers
and element-wise sums without a loop over images, which torch's own threaded kernels do.

Arithmetic is float32, or float64 when an input is float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch

CUBIC = -0.75  # the `a` of the bicubic kernel in torch.nn.functional.interpolate


def _accumulator(*tensors: Tensor | None) -> torch.dtype:
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


class Places(NamedTuple):
    """Where each of L patches is: all [L] int64, `inside` bool. Padding is in a further image of one patch."""

    inside: Tensor
    image: Tensor
    frames: Tensor
    rows: Tensor
    columns: Tensor
    frame: Tensor
    row: Tensor
    column: Tensor


def _starts(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0))


def _images(grid: Tensor) -> Tensor:
    """[3, N + 1] int64: frames, rows and columns of the images, and ones for the padding."""
    grid = grid.to(torch.int64)
    if grid.shape[1] == 2:
        grid = F.pad(grid, (1, 0), value=1)
    return F.pad(grid, (0, 0, 0, 1), value=1).T


def _locate(grid: Tensor, patches: int) -> Places:
    images = _images(grid)
    starts = _starts(images.prod(0)[:-1])
    index = torch.arange(patches, device=grid.device)
    image = torch.searchsorted(starts[1:].contiguous(), index, right=True)
    frames, rows, columns = images[:, image]
    index = index - starts[image]
    inside = image < grid.shape[0]
    within = index % (rows * columns)
    return Places(
        inside, image, frames, rows, columns, index // (rows * columns), within // columns, within % columns
    )


def _rotation(grid: Tensor, patches: int, width: int, theta: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, 1, width / 2], in float64."""
    at = _locate(grid, patches)
    exponent = torch.arange(0, width, 4, dtype=torch.float64, device=grid.device) / -width
    position = torch.stack([at.column, at.row], dim=1) * at.inside.unsqueeze(1)
    angle = (theta**exponent).unsqueeze(1) * position.unsqueeze(1)
    angle = angle.flatten(1).unsqueeze(1)
    return angle.cos(), -angle.sin() if inverse else angle.sin()


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    acc = _accumulator(x)
    cos, sin = cos.to(acc), sin.to(acc)
    even, odd = x.to(acc).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)


@dispatch.register("rope_2d", "reference")
@dispatch.register("rope_2d", "cpu", native=False)
def rope_2d(q: Tensor, k: Tensor, grid: Tensor, theta: float, inverse: bool) -> tuple[Tensor, Tensor]:
    cos, sin = _rotation(grid, q.shape[0], q.shape[2], theta, inverse)
    return _turn(q, cos, sin), _turn(k, cos, sin)


@dispatch.register("rope_2d_inplace", "reference")
@dispatch.register("rope_2d_inplace", "cpu", native=False)
def rope_2d_inplace(qkv: Tensor, grid: Tensor, theta: float) -> None:
    cos, sin = _rotation(grid, qkv.shape[0], qkv.shape[3], theta, False)
    for x in qkv[:, :2].unbind(1):
        x.copy_(_turn(x, cos, sin))


def _taps(
    position: Tensor, size: Tensor, table: int, bicubic: bool, acc: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Which entries of a side of the table make up a position on a side of an image: indices and weights [L, 2 or 4].

    The position is at ((2 position + 1) table - size) / (2 size) in the table; floor and fraction come from integers,
    so that none is off by one.
    """
    numerator, denominator = (2 * position + 1) * table - size, 2 * size
    first = torch.div(numerator, denominator, rounding_mode="floor")
    t = ((numerator - first * denominator).to(acc) / denominator).unsqueeze(1)
    if bicubic:
        near = lambda d: ((CUBIC + 2) * d - (CUBIC + 3)) * d * d + 1
        far = lambda d: ((CUBIC * d - 5 * CUBIC) * d + 8 * CUBIC) * d - 4 * CUBIC
        weights = [far(1 + t), near(t), near(1 - t), far(2 - t)]
    else:
        weights = [1 - t, t]
    taps = torch.arange(len(weights), device=first.device) - (len(weights) // 2 - 1)
    return (first.unsqueeze(1) + taps).clamp(0, table - 1), torch.cat(weights, dim=1)


def _taps_2d(at: Places, weight: Tensor, bicubic: bool, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of the flat table and their weights [L, 4 or 16]. Padding has weights of 0."""
    y, wy = _taps(at.row, at.rows, weight.shape[0], bicubic, acc)
    x, wx = _taps(at.column, at.columns, weight.shape[1], bicubic, acc)
    indices = y.unsqueeze(2) * weight.shape[1] + x.unsqueeze(1)
    weights = wy.unsqueeze(2) * wx.unsqueeze(1) * at.inside[:, None, None]
    return indices.flatten(1), weights.flatten(1)


@dispatch.register("interpolate_pos_embed", "reference")
@dispatch.register("interpolate_pos_embed", "cpu", native=False)
def interpolate_pos_embed(
    x: Tensor, weight: Tensor, grid: Tensor, time_weight: Tensor | None, bicubic: bool
) -> Tensor:
    acc = _accumulator(x, weight, time_weight)
    at = _locate(grid, x.shape[0])
    table = weight.to(acc).flatten(0, 1)
    indices, weights = _taps_2d(at, weight, bicubic, acc)
    embedded = x.to(acc) + F.embedding_bag(indices, table, per_sample_weights=weights, mode="sum")
    if time_weight is not None:
        row = at.frame.clamp(max=time_weight.shape[0] - 1)
        moving = (at.inside & (at.frames > 1)).to(acc)
        embedded.addcmul_(time_weight.to(acc)[row], moving.unsqueeze(1))
    return embedded.to(x.dtype)


@dispatch.register("interpolate_pos_embed_backward", "reference")
@dispatch.register("interpolate_pos_embed_backward", "cpu", native=False)
def interpolate_pos_embed_backward(d_out: Tensor, weight: Tensor, grid: Tensor, bicubic: bool) -> Tensor:
    """The gradient of the table."""
    acc = _accumulator(d_out, weight)
    at = _locate(grid, d_out.shape[0])
    d_out = d_out.to(acc)
    d_table = torch.zeros(weight.shape, dtype=acc, device=weight.device).flatten(0, 1)
    indices, weights = _taps_2d(at, weight, bicubic, acc)
    for index, share in zip(indices.unbind(1), weights.unbind(1)):
        d_table.index_add_(0, index, d_out * share.unsqueeze(1))
    return d_table.view(weight.shape).to(weight.dtype)


def _merged(
    grid: Tensor, patches: int, kernel_h: int, kernel_w: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which patches belong to a kernel, their rows in the merged [count * kernel_h * kernel_w, D], and their frames."""
    at = _locate(grid, patches)
    frames, rows, columns = _images(grid)
    starts = _starts(((rows // kernel_h) * (columns // kernel_w) * (frames > 0))[:-1])
    across = at.columns // kernel_w
    y, x = at.row // kernel_h, at.column // kernel_w
    token = starts[at.image] + y * across + x
    slot = (token * kernel_h + at.row % kernel_h) * kernel_w + at.column % kernel_w
    whole = at.inside & (y < at.rows // kernel_h) & (x < across) & (token < count)
    patch = whole.nonzero().squeeze(1)
    return patch, slot[patch], at.frames[patch].unsqueeze(1)


@dispatch.register("merge_patches", "reference")
@dispatch.register("merge_patches", "cpu", native=False)
def merge_patches(x: Tensor, grid: Tensor, kernel_h: int, kernel_w: int, count: int) -> Tensor:
    acc = _accumulator(x)
    patch, slot, frames = _merged(grid, x.shape[0], kernel_h, kernel_w, count)
    size = kernel_h * kernel_w
    total = torch.zeros((count * size, x.shape[1]), dtype=acc, device=x.device)
    total.index_add_(0, slot, x[patch].to(acc))
    divisor = torch.ones((count * size, 1), dtype=acc, device=x.device)
    divisor[slot] = frames.to(acc)
    return (total / divisor).to(x.dtype).view(count, size, x.shape[1])


@dispatch.register("merge_patches_backward", "reference")
@dispatch.register("merge_patches_backward", "cpu", native=False)
def merge_patches_backward(d_out: Tensor, grid: Tensor, kernel_h: int, kernel_w: int, patches: int) -> Tensor:
    patch, slot, frames = _merged(grid, patches, kernel_h, kernel_w, d_out.shape[0])
    d_x = torch.zeros((patches, d_out.shape[2]), dtype=d_out.dtype, device=d_out.device)
    d_x[patch] = (d_out.flatten(0, 1)[slot].to(_accumulator(d_out)) / frames).to(d_out.dtype)
    return d_x
