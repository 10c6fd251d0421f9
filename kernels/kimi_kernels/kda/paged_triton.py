"""The paged decode step on a Triton kernel: one launch for a layer between its projections."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton, dispatch
from .paged_reference import LayerOptions
from .triton import MAX_HEAD
from .validation import check_sequences

_DTYPES = (torch.float32, torch.bfloat16)
MAX_CONV_WIDTH = 8


def _refuses(qkv, g, beta, gate, conv_weight, conv_state, state, *rest) -> str | None:
    inputs = zip(
        ("qkv", "g", "beta", "gate", "conv_weight", "conv_state"),
        (qkv, g, beta, gate, conv_weight, conv_state),
    )
    for name, x in inputs:
        if x.dtype not in _DTYPES:
            return f"takes float32 or bfloat16, got {x.dtype} for {name}"
    if max(state.shape[2:]) > MAX_HEAD:
        return f"takes head sizes up to {MAX_HEAD}, got {max(state.shape[2:])}"
    if state.stride(3) != 1:
        return f"takes states whose last dimension is contiguous, got strides {state.stride()}"
    if conv_weight.shape[1] > MAX_CONV_WIDTH:
        return f"takes convolutions of width up to {MAX_CONV_WIDTH}, got {conv_weight.shape[1]}"
    return None


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@dispatch.register("kda_decode", "triton", _refuses)
def kda_decode(
    qkv, g, beta, gate, conv_weight, conv_state, state, state_indices,
    A_log, dt_bias, norm_weight, cu_seqlens, num_accepted_tokens, out, options: LayerOptions,
) -> None:  # fmt: skip
    """Slots, offsets and counts stay on the GPU: there, a sequence that names no slot of the pool is skipped."""
    from . import triton_kernels as kernels

    slots, value_heads, V, K = state.shape
    columns = 1 if state_indices.dim() == 1 else state_indices.shape[1]
    count = state_indices.shape[0]
    if not qkv.is_cuda:
        bounds = list(range(count + 1)) if cu_seqlens is None else cu_seqlens.tolist()
        accepted = None if num_accepted_tokens is None else num_accepted_tokens.tolist()
        check_sequences(bounds, state_indices.view(count, -1).tolist(), accepted, slots, len(qkv))
    if count == 0:
        out.zero_()
        return
    config = kernels.decode_config(K, V)
    constants = {
        "H": options.num_heads,
        "GROUPS": value_heads // options.num_heads,
        "W": conv_weight.shape[1],
        "COLUMNS": columns,
        "GATE": kernels.GATE_SOFTPLUS if options.lower_bound is None else kernels.GATE_LOWER_BOUND,
        "HAS_BIAS": dt_bias is not None,
        "PACKED": cu_seqlens is not None,
        "SPECULATIVE": num_accepted_tokens is not None,
    }
    qkv, g, gate = map(_triton.rows, (qkv, g, gate))
    raw_out = torch.empty((qkv.shape[0], value_heads, V), dtype=torch.float32, device=qkv.device)
    keys = None
    if cu_seqlens is not None:
        keys = torch.empty((qkv.shape[0], options.num_heads, 2, K), dtype=torch.float32, device=qkv.device)
    _triton.launch(
        kernels.decode_kernel, (count, options.num_heads), qkv,
        qkv, g, beta, gate, conv_weight, conv_state, state, state_indices.contiguous(), A_log.reshape(-1),
        None if dt_bias is None else dt_bias.reshape(-1), norm_weight.contiguous(),
        _contiguous(cu_seqlens), _contiguous(num_accepted_tokens), out, raw_out, keys,
        qkv.stride(0), *g.stride()[:2], *beta.stride(), *gate.stride()[:2], *conv_weight.stride(),
        *conv_state.stride(), *state.stride()[:3], out.stride(0),
        qkv.shape[0], slots, V, options.scale, options.lower_bound or 0.0, options.norm_eps,
        config=config._replace(constants={**config.constants, **constants}),
    )  # fmt: skip
