"""Vision towers on packed images: 2-D rotary, interpolated positions, merging of patches; one launch for all images.

MoonViT (Kimi-VL, arXiv 2504.07491, section 2.1) and MoonViT-3D (Kimi K2.5, arXiv 2602.02276). The patches of all images
lie in one row [L, ...], image after image, and in an image frame after frame, row after row. `grid_thw` says where each
is: integers [N, 3], the frames, rows and columns of patches of N images, or [N, 2], rows and columns of images of one
frame. A row of zeros is an image without patches.

A grid on the CPU is checked. One on a GPU is never read by the host, so that calls can be captured in a CUDA graph:
patches behind those of its images are padding, and a grid that asks for more patches than there are is cut off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .validation import check_interpolation, check_merge, check_packed_rope, check_rope

__all__ = ["interpolate_pos_embed", "merge_patches", "rope_2d", "rope_2d_", "sincos_time_embed"]


def rope_2d(q: Tensor, k: Tensor, grid_thw: Tensor, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Rotate q and k by the row and column of each patch (Kimi-VL, section 2.1). Differentiable.

    Seen as D/2 complex numbers, element 2i is turned by column * theta**(-4i/D), element 2i+1 by row * theta**(-4i/D),
    i < D/4; all frames alike. Arithmetic is float32 (float64 for float64 q); angles keep their digits at positions up
    to 4095, where the float32 product of position and frequency would not.

    Args:
        q, k: [L, H, D], one dtype, D a multiple of 4; any strides, such as slices of a packed qkv.
        grid_thw: [N, 3] or [N, 2], on q's device or on the CPU.
        theta: base of the frequencies.

    Returns:
        (q, k) rotated, [L, H, D] in their dtype, contiguous. Padding is copied.

    Raises:
        ValueError: a shape or dtype does not fit, or a grid on the CPU does not have L patches.
    """
    check_rope(q, k, grid_thw, theta)
    return ops.rope(q, k, grid_thw.to(q.device), theta, False)


def rope_2d_(qkv: Tensor, grid_thw: Tensor, theta: float = 10000.0) -> Tensor:
    """`rope_2d` in place on the q and k of a packed projection: what a server runs. No gradient.

    Args:
        qkv: [L, 3, H, D], of which [:, 0] and [:, 1] are rotated; any strides.
        grid_thw: [N, 3] or [N, 2], on qkv's device or on the CPU.
        theta: base of the frequencies.

    Returns:
        qkv itself.

    Raises:
        ValueError: as `rope_2d`, or qkv requires a gradient.
    """
    check_packed_rope(qkv, grid_thw, theta)
    ops.rope_inplace(qkv, grid_thw.to(qkv.device), theta)
    return qkv


def interpolate_pos_embed(
    x: Tensor,
    weight: Tensor,
    grid_thw: Tensor,
    mode: str = "bicubic",
    time_weight: Tensor | None = None,
) -> Tensor:
    """x + the learned position table, resampled to the grid of each image. Differentiable in x and weight.

    The resampling is that of `torch.nn.functional.interpolate(mode=mode, align_corners=False)`: pixel centres, no
    antialiasing, edges repeated, for bicubic the kernel with a = -0.75. Where a grid has the table's size, it is the
    table. All frames of an image get the same, and of more than one frame each a row of `time_weight` as well.

    Args:
        x: [L, D], the embedded patches.
        weight: [rows, columns, D], the table (64 x 64 in the published models).
        grid_thw: [N, 3] or [N, 2], on x's device or on the CPU.
        mode: "bicubic" (Kimi-VL, K2.5) or "bilinear" (K3).
        time_weight: [T, D], a constant: row f is added to frame f of images of more than one frame
            (`sincos_time_embed`). None adds nothing.

    Returns:
        [L, D] in x's dtype, whatever the tables'; rounded once, arithmetic is float32 (float64 when an input is).
        Padding is copied.

    Raises:
        ValueError: a shape, dtype or the mode does not fit, a grid on the CPU does not have L patches or has more than
            T frames, or time_weight requires a gradient.
    """
    check_interpolation(x, weight, grid_thw, mode, time_weight)
    return ops.interpolate(x, weight, grid_thw.to(x.device), time_weight, mode == "bicubic")


def sincos_time_embed(num_frames: int, dim: int, theta: float = 10000.0) -> Tensor:
    """The fixed table of MoonViT-3D: row f is [sin(f w), cos(f w)] with w_i = theta**(-2i/dim), i < dim/2.

    Args:
        num_frames: frames of the longest chunk, 4 in K2.5.
        dim: width of the tower, even.
        theta: base of the frequencies.

    Returns:
        [num_frames, dim] float32, on the CPU.
    """
    if dim % 2:
        raise ValueError(f"dim must be even, got {dim}: half of it are sines, half cosines")
    frequency = theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / -dim)
    angle = torch.arange(num_frames, dtype=torch.float64).unsqueeze(1) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def merge_patches(
    x: Tensor, grid_thw: Tensor, kernel: tuple[int, int] = (2, 2), num_merged: int | None = None
) -> Tensor:
    """Gather the patches of each kernel of an image, averaged over its frames. Differentiable.

    Args:
        x: [L, D], the tower's output.
        grid_thw: [N, 3] or [N, 2], on x's device or on the CPU; rows and columns multiples of the kernel's.
        kernel: rows and columns of patches that are merged.
        num_merged: M, the sum of (rows // kernel[0]) * (columns // kernel[1]) over the images. Needed only where it
            cannot be known without reading a GPU: for a grid [N, 3] on one, and under `torch.compile`. A larger one
            leaves zeros at the end.

    Returns:
        [M, kernel[0] * kernel[1], D] in x's dtype: image after image, kernels and the patches in a kernel row by row.
        Means are taken in float32 (float64 for float64 x).

    Raises:
        ValueError: a shape or dtype does not fit, num_merged is missing or, like the number of patches, does not fit a
            grid on the CPU, or a side is no multiple of the kernel's.
    """
    count = check_merge(x, grid_thw, kernel, num_merged)
    return ops.merge(x, grid_thw.to(x.device), kernel[0], kernel[1], count)
