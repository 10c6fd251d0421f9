"""KDA when serving: a whole layer between its projections, on pools of states that are updated in place."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from .._library import custom_op
from . import paged_cpu, paged_reference, paged_triton  # noqa: F401  (register the backends)
from .paged_reference import LayerOptions
from .validation import check_layer


@custom_op("kimi::kda_prefill", mutates_args=("conv_state", "state", "out"))
def _prefill(
    qkv: Tensor,
    g: Tensor,
    beta: Tensor,
    gate: Tensor,
    conv_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor,
    has_initial_state: Tensor,
    A_log: Tensor,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    out: Tensor,
    num_heads: int,
    lower_bound: float | None,
    norm_eps: float,
    scale: float,
) -> None:
    dispatch.run(
        "kda_prefill", qkv.device, qkv, g, beta, gate, conv_weight, conv_state, state, state_indices,
        cu_seqlens, has_initial_state, A_log, dt_bias, norm_weight, out,
        LayerOptions(num_heads, lower_bound, norm_eps, scale),
    )  # fmt: skip


@custom_op("kimi::kda_decode", mutates_args=("conv_state", "state", "out"))
def _decode(
    qkv: Tensor,
    g: Tensor,
    beta: Tensor,
    gate: Tensor,
    conv_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    state_indices: Tensor,
    A_log: Tensor,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    cu_seqlens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    out: Tensor,
    num_heads: int,
    lower_bound: float | None,
    norm_eps: float,
    scale: float,
) -> None:
    dispatch.run(
        "kda_decode", qkv.device, qkv, g, beta, gate, conv_weight, conv_state, state, state_indices,
        A_log, dt_bias, norm_weight, cu_seqlens, num_accepted_tokens, out,
        LayerOptions(num_heads, lower_bound, norm_eps, scale),
    )  # fmt: skip


@_prefill.register_fake
def _(*args, **kwargs) -> None:
    return None


@_decode.register_fake
def _(*args, **kwargs) -> None:
    return None


def kda_prefill(
    qkv: Tensor,
    g: Tensor,
    beta: Tensor,
    gate: Tensor,
    conv_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor,
    has_initial_state: Tensor,
    A_log: Tensor,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    *,
    num_heads: int,
    head_dim: int,
    lower_bound: float | None = None,
    norm_eps: float = 1e-5,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Short convolution, SiLU, L2 norm, gate, delta rule and gated RMSNorm over packed sequences (Kimi Linear, §4).

    `conv_state` and `state` are updated in place; there are no gradients. Last bits may depend on the batch as those of
    `chunk_kda` may.

    Args:
        qkv: [T, 2*H*K + HV*V], the packed q, k and v projections before the convolution; rows of any stride.
        g: [T, HV, K], raw decay gate; `kda_gate` is applied inside.
        beta: [T, HV], raw write strength; the sigmoid is inside.
        gate: [T, HV, V], raw output gate; the sigmoid is inside.
        conv_weight: [2*H*K + HV*V, W], depthwise filters, newest input last.
        conv_state: [slots, >= W-1, 2*H*K + HV*V], any strides. Entries 0..W-2 of a slot are the inputs before the
            sequence; afterwards its last W-1 inputs.
        state: [slots, HV, V, K] float32, any slot stride.
        state_indices: [N] int32, the slot of each sequence; -1: skip it, its outputs are zero. No slot twice.
        cu_seqlens: [N+1] int32 offsets of the sequences, from 0 to T. Empty sequences leave their slot alone.
        has_initial_state: [N] bool; False: the sequence starts from zeros whatever the slot holds.
        A_log: [HV], dt_bias: [HV*K] or None, of the gate.
        norm_weight: [V], gain of the output norm.
        num_heads: H, heads of q and k; HV must be a multiple of it.
        head_dim: K.
        lower_bound: None for the softplus gate, else in [-5, 0).
        norm_eps: epsilon of the output norm.
        scale: factor on q, by default K**-0.5.
        out: [T, HV*V] to write to, of qkv's dtype.

    Returns:
        [T, HV*V] in qkv's dtype.

    Raises:
        ValueError: a device, shape, dtype, stride, offset or slot does not fit; the message names it. The values of
            offsets and slots are checked on the CPU only, as reading them from a GPU would wait for it: there a
            sequence that names no slot of the pool is skipped, and wrong offsets touch no memory outside of the inputs.
    """
    check_layer(
        qkv, g, beta, gate, conv_weight, conv_state, state, state_indices, A_log, dt_bias, norm_weight,
        cu_seqlens, has_initial_state, None, num_heads, head_dim, lower_bound, out,
    )  # fmt: skip
    if out is None:
        out = qkv.new_empty((qkv.shape[0], state.shape[1] * state.shape[2]))
    scale = head_dim**-0.5 if scale is None else scale
    tensors = (
        qkv, g, beta, gate, conv_weight, conv_state, state, state_indices, cu_seqlens, has_initial_state,
        A_log, dt_bias, norm_weight, out,
    )  # fmt: skip
    _prefill(*tensors, num_heads, lower_bound, norm_eps, scale)
    return out


def kda_decode(
    qkv: Tensor,
    g: Tensor,
    beta: Tensor,
    gate: Tensor,
    conv_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    state_indices: Tensor,
    A_log: Tensor,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    *,
    num_heads: int,
    head_dim: int,
    lower_bound: float | None = None,
    norm_eps: float = 1e-5,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`kda_prefill` for one token per sequence: the state is read and written once.

    Sequence n is row n; rows past the last sequence are padding, their outputs are zero. With speculation of S tokens
    pass `cu_seqlens` [N+1] int32 (1 to S+1 tokens a sequence), `state_indices` [N, S+1] and `num_accepted_tokens` [N]
    int32, how many tokens of the previous step were kept (1 after a prefill). Then

    * the start state is that of slot `state_indices[n, num_accepted_tokens[n] - 1]`;
    * the convolution's history is entries `num_accepted_tokens[n] - 1 ...` of slot `state_indices[n, 0]`;
    * the state after token t is written to slot `state_indices[n, t]` (-1: nowhere);
    * the conv entries become the history without its oldest input, then this step's inputs, so that the next
      step's `num_accepted_tokens` picks the right window: the pool needs W-1+S entries.

    Other arguments, result and errors as for `kda_prefill`, but that on a GPU the offsets are relied on: they must go
    up from 0, to T at most, by at most S+1.
    """
    check_layer(
        qkv, g, beta, gate, conv_weight, conv_state, state, state_indices, A_log, dt_bias, norm_weight,
        cu_seqlens, None, num_accepted_tokens, num_heads, head_dim, lower_bound, out,
    )  # fmt: skip
    if out is None:
        out = qkv.new_empty((qkv.shape[0], state.shape[1] * state.shape[2]))
    scale = head_dim**-0.5 if scale is None else scale
    tensors = (
        qkv, g, beta, gate, conv_weight, conv_state, state, state_indices, A_log, dt_bias, norm_weight,
        cu_seqlens, num_accepted_tokens, out,
    )  # fmt: skip
    _decode(*tensors, num_heads, lower_bound, norm_eps, scale)
    return out
