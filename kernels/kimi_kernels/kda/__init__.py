"""Kimi Delta Attention: the delta rule with a decay per channel (Kimi Linear, arXiv 2510.26692, section 3).

Names, shapes and defaults follow `fla.ops.kda`. Per head, with state S [K, V], in this order for every token:

    S = diag(e^g) S;  u = beta (v - S^T k);  S = S + k u^T;  o = S^T (scale q)
"""

from __future__ import annotations

from torch import Tensor

from . import ops
from .paged import kda_decode, kda_prefill
from .validation import STATE_STEP, check_gate, check_interval, check_kda

__all__ = ["chunk_kda", "chunk_kda_states", "fused_recurrent_kda", "kda_decode", "kda_gate", "kda_prefill"]


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule over whole sequences, in tiles of matrix products (Kimi Linear, section 3.1). Differentiable.

    Any strides; arithmetic in float32 (float64 when an input is). Deterministic. An output depends on its own and
    earlier tokens only, to the bit. It does not depend on what else is in the batch either, with one exception: on a
    GPU, with few heads and long sequences, the scan over a sequence is split as the batch leaves room, which moves last
    bits. KIMI_KERNELS_BATCH_INVARIANT=1 in the environment rules that out; gradients and `kda_decode` are never split.

    Args:
        q, k: [B, T, H, K]. The recurrence needs |k| <= 1: normalised by the caller, or with `use_qk_l2norm_in_kernel`.
        v: [B, T, HV, V], HV a multiple of H: value head i reads q and k of head i // (HV / H).
        g: [B, T, HV, K], natural-log decay per token (not cumulative), finite and <= 0, of any size;
            or the raw gate input with `use_gate_in_kernel`.
        beta: [B, T, HV], write strength in [0, 1]; or its logit with `use_beta_sigmoid_in_kernel`.
        scale: factor on q, by default K**-0.5.
        initial_state: [N, HV, K, V] float32, by default zeros.
        output_final_state: whether to return the state after the last token.
        use_qk_l2norm_in_kernel: q and k are divided by sqrt(|x|^2 + 1e-6) first.
        use_gate_in_kernel: apply `kda_gate` to g, with `A_log`, `dt_bias` and `lower_bound`.
        use_beta_sigmoid_in_kernel: apply the sigmoid to beta.
        allow_neg_eigval: double beta, so that the transition may have eigenvalues in (-1, 1).
        lower_bound: of the gate, in [-5, 0); None is the softplus gate.
        state_v_first: states are [N, HV, V, K].
        cu_seqlens: [N+1] int32 or int64 offsets of N sequences packed in one row (B = 1), from 0 to T. Sequences may
            be empty. Without it N = B.
        A_log: [HV], dt_bias: [HV*K] or None, of the gate; A_log may be None with a lower bound (then 0).

    Returns:
        (o [B, T, HV, V] in v's dtype, final state like `initial_state` or None).

    Raises:
        ValueError: a device, shape, dtype or range does not fit; the message names the argument. The values of g and of
            `cu_seqlens` are checked on the CPU only, as reading them from a GPU would wait for it: there wrong offsets
            give wrong results but touch no memory outside of the inputs, and a positive g may overflow.
    """
    check_kda(
        q,
        k,
        v,
        g,
        beta,
        initial_state,
        cu_seqlens,
        use_gate_in_kernel,
        A_log,
        dt_bias,
        lower_bound,
        state_v_first,
    )
    o, state = ops.chunk(
        q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, k.shape[3] ** -0.5 if scale is None else scale,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound,
        state_v_first,
    )  # fmt: skip
    return o, state if output_final_state else None


def chunk_kda_states(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    state_interval: int = STATE_STEP,
) -> tuple[Tensor, Tensor, Tensor]:
    """`chunk_kda`, with the states on the way, for prefix caches. No gradients.

    fla-core returns the state before every chunk with `return_intermediate_states`; this one that after every
    `state_interval`-th token, in float32, each at a place that follows from the offsets alone.

    Args:
        state_interval: a multiple of 64.
        Others as for `chunk_kda`.

    Returns:
        (o, final state, states [B * (T // state_interval), HV, K, V] float32). The state of batch row b after
        i * state_interval tokens is states[b * (T // state_interval) + i - 1]. With `cu_seqlens` that of sequence n is
        states[cu_seqlens[n] // state_interval + i - 1], and rows between those of the sequences are zeros.

    Raises:
        ValueError: as for `chunk_kda`, or the interval does not fit, or an input requires a gradient.
    """
    check_kda(
        q,
        k,
        v,
        g,
        beta,
        initial_state,
        cu_seqlens,
        use_gate_in_kernel,
        A_log,
        dt_bias,
        lower_bound,
        state_v_first,
    )
    check_interval(state_interval, q, k, v, g, beta, initial_state, A_log, dt_bias)
    return ops.chunk_states(
        q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, state_interval,
        k.shape[3] ** -0.5 if scale is None else scale, use_qk_l2norm_in_kernel, use_gate_in_kernel,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound, state_v_first,
    )  # fmt: skip


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_kda`, token by token: the same arguments, result and gradients; faster for a few tokens."""
    check_kda(
        q,
        k,
        v,
        g,
        beta,
        initial_state,
        cu_seqlens,
        use_gate_in_kernel,
        A_log,
        dt_bias,
        lower_bound,
        state_v_first,
    )
    o, state = ops.recurrent(
        q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, k.shape[3] ** -0.5 if scale is None else scale,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound,
        state_v_first,
    )  # fmt: skip
    return o, state if output_final_state else None


def kda_gate(
    g: Tensor, A_log: Tensor | None = None, dt_bias: Tensor | None = None, lower_bound: float | None = None
) -> Tensor:
    """Log decay per token and channel from the raw gate. Differentiable.

    With z = g + dt_bias: -e^A_log softplus(z) (Kimi Linear, section 4), or with a lower bound
    lower_bound * sigmoid(e^A_log z) (Kimi K3, section 2.1).

    Args:
        g: [..., HV, K].
        A_log: [HV]; may be None with a lower bound (then 0).
        dt_bias: [HV*K] or None.
        lower_bound: in [-5, 0), or None.

    Returns:
        [..., HV, K] float32 (float64 when an input is), in (-inf, 0) or (lower_bound, 0).
    """
    check_gate(g, A_log, dt_bias, lower_bound)
    return ops.gate(g, A_log, dt_bias, lower_bound)
