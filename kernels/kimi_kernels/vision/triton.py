"""The vision operations on Triton kernels: float32, bfloat16 or float16. The kernels are imported when first run."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton, dispatch

MAX_HEAD = 256  # a head's channels are one block
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _refuses_dtype(**tensors: Tensor | None) -> str | None:
    for name, x in tensors.items():
        if x is not None and x.dtype not in _DTYPES:
            return f"takes float32, bfloat16 or float16, got {x.dtype} for {name}"
    return None


def _refuses_head(width: int) -> str | None:
    return f"takes head sizes up to {MAX_HEAD}, got {width}" if width > MAX_HEAD else None


def _config(config: _triton.Config, grid: Tensor, **constants: object) -> _triton.Config:
    return config._replace(constants={**config.constants, "SIDES": grid.shape[1], **constants})


def _blocks(rows: int, config: _triton.Config) -> tuple[int, int]:
    """Programs of a kernel that takes blocks of rows and channels."""
    constants = config.constants
    return -(-rows // constants["BT"]), -(-constants["D"] // constants["BD"])


def _rotate(
    q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, grid: Tensor, theta: float, sign: float
) -> None:
    from . import triton_kernels as kernels

    tokens, heads, width = q.shape
    config = _config(kernels.rope_config(width, theta), grid)
    groups = -(-heads // config.constants["HEADS"])
    _triton.launch(
        kernels.rope_kernel, (-(-tokens // config.constants["BT"]), 2 * groups), q,
        q, k, q_out, k_out, grid.contiguous(),
        *q.stride()[:2], *k.stride()[:2], *q_out.stride()[:2], *k_out.stride()[:2],
        tokens, grid.shape[0], heads, sign, config=config,
    )  # fmt: skip


@dispatch.register("rope_2d", "triton", lambda q, k, *_: _refuses_dtype(q=q) or _refuses_head(q.shape[2]))
def rope_2d(q: Tensor, k: Tensor, grid: Tensor, theta: float, inverse: bool) -> tuple[Tensor, Tensor]:
    q, k = _triton.rows(q), _triton.rows(k)
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    _rotate(q, k, q_out, k_out, grid, theta, -1.0 if inverse else 1.0)
    return q_out, k_out


@dispatch.register(
    "rope_2d_inplace", "triton", lambda qkv, *_: _refuses_dtype(qkv=qkv) or _refuses_head(qkv.shape[3])
)
def rope_2d_inplace(qkv: Tensor, grid: Tensor, theta: float) -> None:
    q, k = qkv[:, :2].unbind(1)
    if q.stride(-1) == 1:
        _rotate(q, k, q, k, grid, theta, 1.0)
    else:
        for x, turned in zip((q, k), rope_2d(q, k, grid, theta, False)):
            x.copy_(turned)


@dispatch.register(
    "interpolate_pos_embed",
    "triton",
    lambda x, weight, grid, time_weight, bicubic: _refuses_dtype(x=x, weight=weight, time_weight=time_weight),
)
def interpolate_pos_embed(
    x: Tensor, weight: Tensor, grid: Tensor, time_weight: Tensor | None, bicubic: bool
) -> Tensor:
    from . import triton_kernels as kernels

    x = _triton.rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = _config(
        kernels.interpolate_config(x.shape[1]), grid, TAPS=4 if bicubic else 2, HAS_TIME=time_weight is not None,
        ROWS=weight.shape[0], COLUMNS=weight.shape[1],
    )  # fmt: skip
    _triton.launch(
        kernels.interpolate_kernel, _blocks(x.shape[0], config), x,
        x, weight.contiguous(), None if time_weight is None else time_weight.contiguous(), out, grid.contiguous(),
        x.stride(0), out.stride(0), x.shape[0], grid.shape[0], 0 if time_weight is None else time_weight.shape[0],
        config=config,
    )  # fmt: skip
    return out


@dispatch.register(
    "interpolate_pos_embed_backward",
    "triton",
    lambda d_out, weight, *_: _refuses_dtype(d_out=d_out, weight=weight),
)
def interpolate_pos_embed_backward(d_out: Tensor, weight: Tensor, grid: Tensor, bicubic: bool) -> Tensor:
    from . import triton_kernels as kernels

    d_out = _triton.rows(d_out)
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    rows, columns, width = weight.shape
    config = _config(
        kernels.channel_config(width), grid, TAPS=4 if bicubic else 2, ROWS=rows, COLUMNS=columns
    )
    _triton.launch(
        kernels.interpolate_back_kernel, (rows * columns, _blocks(0, config)[1]), d_out,
        d_out, d_weight, grid.contiguous(), d_out.stride(0), d_out.shape[0], grid.shape[0], config=config,
    )  # fmt: skip
    return d_weight


@dispatch.register("merge_patches", "triton", lambda x, *_: _refuses_dtype(x=x))
def merge_patches(x: Tensor, grid: Tensor, kernel_h: int, kernel_w: int, count: int) -> Tensor:
    from . import triton_kernels as kernels

    x = _triton.rows(x)
    out = torch.empty((count, kernel_h * kernel_w, x.shape[1]), dtype=x.dtype, device=x.device)
    slots = count * kernel_h * kernel_w
    config = _config(kernels.channel_config(x.shape[1]), grid, KH=kernel_h, KW=kernel_w)
    _triton.launch(
        kernels.merge_kernel, _blocks(slots, config), x,
        x, out, grid.contiguous(), x.stride(0), x.shape[0], slots, grid.shape[0], config=config,
    )  # fmt: skip
    return out


@dispatch.register("merge_patches_backward", "triton", lambda d_out, *_: _refuses_dtype(d_out=d_out))
def merge_patches_backward(d_out: Tensor, grid: Tensor, kernel_h: int, kernel_w: int, patches: int) -> Tensor:
    from . import triton_kernels as kernels

    d_out = _triton.rows(d_out)
    d_x = torch.empty((patches, d_out.shape[2]), dtype=d_out.dtype, device=d_out.device)
    config = _config(kernels.channel_config(d_out.shape[2]), grid, KH=kernel_h, KW=kernel_w)
    _triton.launch(
        kernels.merge_back_kernel, _blocks(patches, config), d_out,
        d_out, d_x, grid.contiguous(), *d_out.stride()[:2], patches, d_out.shape[0], grid.shape[0], config=config,
    )  # fmt: skip
    return d_x
