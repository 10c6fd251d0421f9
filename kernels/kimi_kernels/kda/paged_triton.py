"""The paged serving ops on Triton kernels: four launches for a prefill, one for a decode step of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton, dispatch
from .paged_reference import LayerOptions
from .reference import Options
from .triton import MAX_HEAD, Chunks, Problem
from .validation import check_sequences

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CONV_WIDTH = 8


def _refuses(qkv, g, beta, gate, conv_weight, conv_state, state, *rest) -> str | None:
    inputs = zip(
        ("qkv", "g", "beta", "gate", "conv_weight", "conv_state"),
        (qkv, g, beta, gate, conv_weight, conv_state),
    )
    for name, x in inputs:
        if x.dtype not in _DTYPES:
            return f"takes float32, bfloat16 or float16, got {x.dtype} for {name}"
    if max(state.shape[2:]) > MAX_HEAD:
        return f"takes head sizes up to {MAX_HEAD}, got {max(state.shape[2:])}"
    if state.stride(3) != 1:
        return f"takes states whose last dimension is contiguous, got strides {state.stride()}"
    if conv_weight.shape[1] > MAX_CONV_WIDTH:
        return f"takes convolutions of width up to {MAX_CONV_WIDTH}, got {conv_weight.shape[1]}"
    return None


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@dispatch.register("kda_prefill", "triton", _refuses)
def kda_prefill(
    qkv, g, beta, gate, conv_weight, conv_state, state, state_indices, cu_seqlens, has_initial_state,
    A_log, dt_bias, norm_weight, out, options: LayerOptions,
) -> None:  # fmt: skip
    """Slots and offsets stay on the GPU: there, a sequence that names no slot of the pool is skipped."""
    from . import paged_triton_kernels as kernels

    slots, value_heads, V, K = state.shape
    tokens, channels = qkv.shape
    count, heads, W = state_indices.shape[0], options.num_heads, conv_weight.shape[1]
    if qkv.device.type == "cpu":
        check_sequences(cu_seqlens.tolist(), state_indices.view(-1, 1).tolist(), None, slots, tokens)
    if count == 0:
        out.zero_()
        return
    qkv, g, gate = map(_triton.rows, (qkv, g, gate))
    indices, offsets = state_indices.contiguous(), cu_seqlens.contiguous()
    resumed = has_initial_state.to(torch.bool).contiguous().view(torch.uint8)

    convolved = torch.empty((tokens, channels), dtype=qkv.dtype, device=qkv.device)
    config = kernels.convolve_config()
    _triton.launch(
        kernels.convolve_kernel,
        (tokens // config.constants["BT"] + count, -(-channels // config.constants["BC"])), qkv,
        qkv, conv_weight, conv_state, convolved, indices, resumed, offsets,
        qkv.stride(0), *conv_weight.stride(), *conv_state.stride(), tokens, count, slots, channels,
        config=config._replace(constants={**config.constants, "W": W}),
    )  # fmt: skip

    q, k, v = convolved.unsqueeze(0).split([heads * K, heads * K, value_heads * V], -1)
    q, k, v = q.unflatten(-1, (heads, K)), k.unflatten(-1, (heads, K)), v.unflatten(-1, (value_heads, V))
    rule = Options(options.scale, True, True, True, False, options.lower_bound, True)
    problem = Problem(q, k, v, g.unsqueeze(0), beta.unsqueeze(0), state, A_log, dt_bias, offsets, rule)
    Chunks(problem, keep=False).scan(
        out.unsqueeze(0).unflatten(-1, (value_heads, V)), state, entries=(indices, resumed)
    )

    config = kernels.finish_config(K, V)
    layer = {"H": heads, "GROUPS": value_heads // heads, "W": W}
    _triton.launch(
        kernels.finish_kernel, (tokens // config.constants["BT"] + count + 1, value_heads), qkv,
        out, gate, norm_weight.contiguous(), qkv, conv_state, indices, resumed, offsets,
        out.stride(0), *gate.stride()[:2], qkv.stride(0), *conv_state.stride(), tokens, count, slots, options.norm_eps,
        config=config._replace(constants={**config.constants, **layer}),
    )  # fmt: skip


@dispatch.register("kda_decode", "triton", _refuses)
def kda_decode(
    qkv, g, beta, gate, conv_weight, conv_state, state, state_indices,
    A_log, dt_bias, norm_weight, cu_seqlens, num_accepted_tokens, out, options: LayerOptions,
) -> None:  # fmt: skip
    """Slots, offsets and counts stay on the GPU: there, a sequence that names no slot of the pool is skipped."""
    from . import paged_triton_kernels as kernels
    from .triton_kernels import GATE_LOWER_BOUND, GATE_SOFTPLUS

    slots, value_heads, V, K = state.shape
    columns = 1 if state_indices.dim() == 1 else state_indices.shape[1]
    count = state_indices.shape[0]
    if qkv.device.type == "cpu":
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
        "GATE": GATE_SOFTPLUS if options.lower_bound is None else GATE_LOWER_BOUND,
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
