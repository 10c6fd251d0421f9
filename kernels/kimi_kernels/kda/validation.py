"""What the public KDA functions accept; each calls one of these once."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

# Kimi K3, section 2.1: the published bound; beyond it a tile of 16 tokens leaves the range of bf16.
LOWEST_BOUND = -5.0
STATE_STEP = 64  # the largest chunk of the backends


def check_lower_bound(lower_bound: float | None) -> None:
    if lower_bound is not None and not LOWEST_BOUND <= lower_bound < 0:
        raise ValueError(
            f"lower_bound must be in [{LOWEST_BOUND:g}, 0), got {lower_bound}: "
            "it is the lowest log decay per token; pass None for the softplus gate"
        )


def check_shape(name: str, x: Tensor | None, shape: tuple[int, ...], what: str) -> None:
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} = {what}, got {tuple(x.shape)}")


def check_gate(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> None:
    if g.dim() < 2:
        raise ValueError(f"g must have shape [..., HV, K], got {tuple(g.shape)}")
    heads, width = g.shape[-2:]
    if A_log is None and lower_bound is None:
        raise ValueError("A_log is missing: the softplus gate needs the log rate of each head, shape [HV]")
    if A_log is not None and A_log.numel() != heads:
        raise ValueError(f"A_log must have {heads} elements = [HV], got shape {tuple(A_log.shape)}")
    if dt_bias is not None and dt_bias.numel() != heads * width:
        raise ValueError(
            f"dt_bias must have {heads * width} elements = [HV*K], got shape {tuple(dt_bias.shape)}"
        )
    check_lower_bound(lower_bound)


def check_devices(device: torch.device, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.device != device:
            raise ValueError(f"{name} must be on {device} as the other inputs are, got {x.device}: move it there")


def check_floats(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name} must have a floating-point dtype, got {x.dtype}: convert it")


def check_log_decay(g: Tensor) -> None:
    if g.device.type != "cpu" or torch.compiler.is_compiling():
        return  # as for the values of offsets
    if bool((g > 0).any()):
        raise ValueError(
            f"g must be <= 0, got {g.max().item():.3g}: pass natural-log decays, "
            "or with use_gate_in_kernel=True the gate's input"
        )


def check_offsets(cu_seqlens: Tensor, tokens: int) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens must have shape [N+1], got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return  # to read values is to wait for the device, and impossible while tracing or capturing a graph
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {offsets[0]}: pass offsets of the packed batch")
    for n, (a, b) in enumerate(itertools.pairwise(offsets)):
        if b < a:
            raise ValueError(f"cu_seqlens must not decrease, got {a} then {b} at sequence {n}")
    if offsets[-1] != tokens:
        raise ValueError(
            f"cu_seqlens must end at T={tokens}, got {offsets[-1]}: pass offsets of the packed batch"
        )


def check_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    use_gate_in_kernel: bool,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    state_v_first: bool,
) -> None:
    for name, x, shape in (("q", q, "[B, T, H, K]"), ("k", k, "[B, T, H, K]"), ("v", v, "[B, T, HV, V]")):
        if x.dim() != 4:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    check_devices(
        q.device, k=k, v=v, g=g, beta=beta, initial_state=initial_state, A_log=A_log, dt_bias=dt_bias,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    check_floats(q=q, g=g, beta=beta, A_log=A_log, dt_bias=dt_bias)
    batch, tokens, heads, width = k.shape
    value_heads, value_width = v.shape[2:]
    check_shape("q", q, tuple(k.shape), "k's shape")
    if tuple(v.shape[:2]) != (batch, tokens):
        raise ValueError(f"v must have batch and length {(batch, tokens)} as k has, got {tuple(v.shape[:2])}")
    if heads == 0 or value_heads % heads:
        raise ValueError(f"v must have a multiple of k's heads, got HV={value_heads}, H={heads}")
    check_shape("g", g, (batch, tokens, value_heads, width), "[B, T, HV, K]")
    check_shape("beta", beta, (batch, tokens, value_heads), "[B, T, HV]")
    count = batch
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"with cu_seqlens the batch must be packed into one row, got B={batch}")
        check_offsets(cu_seqlens, tokens)
        count = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        order = ("V, K", (value_width, width)) if state_v_first else ("K, V", (width, value_width))
        check_shape("initial_state", initial_state, (count, value_heads, *order[1]), f"[N, HV, {order[0]}]")
        if initial_state.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"initial_state must be float32, got {initial_state.dtype}: states are kept in float32"
            )
    if use_gate_in_kernel:
        check_gate(g, A_log, dt_bias, lower_bound)
    elif A_log is not None or dt_bias is not None or lower_bound is not None:
        raise ValueError("A_log, dt_bias and lower_bound belong to the gate: pass use_gate_in_kernel=True")
    else:
        check_log_decay(g)


def check_interval(interval: int, *inputs: Tensor | None) -> None:
    if interval < 1 or interval % STATE_STEP:
        raise ValueError(
            f"state_interval must be a positive multiple of {STATE_STEP}, got {interval}: "
            "states are known between the chunks that a sequence is computed in"
        )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise ValueError(
            "chunk_kda_states has no gradients: call it under torch.no_grad() or torch.inference_mode(), "
            "or chunk_kda for training"
        )


def check_layer(
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
    has_initial_state: Tensor | None,
    num_accepted_tokens: Tensor | None,
    num_heads: int,
    head_dim: int,
    lower_bound: float | None,
    out: Tensor | None,
) -> None:
    """Devices, shapes and dtypes of a serving call. Offsets and slots are checked where they are read: on the CPU."""
    if qkv.dim() != 2:
        raise ValueError(f"qkv must have shape [T, 2*H*K + HV*V], got {tuple(qkv.shape)}")
    check_devices(
        qkv.device, g=g, beta=beta, gate=gate, conv_weight=conv_weight, conv_state=conv_state, state=state,
        state_indices=state_indices, A_log=A_log, dt_bias=dt_bias, norm_weight=norm_weight, cu_seqlens=cu_seqlens,
        has_initial_state=has_initial_state, num_accepted_tokens=num_accepted_tokens, out=out,
    )  # fmt: skip
    tokens, channels = qkv.shape
    check_pools(conv_weight, conv_state, state, A_log, dt_bias, norm_weight, num_heads, head_dim, lower_bound)
    check_rows(tokens, conv_weight, conv_state, state_indices, cu_seqlens, num_accepted_tokens)
    _, value_heads, value_width, width = state.shape
    if channels != conv_weight.shape[0]:
        raise ValueError(f"qkv must have 2*H*K + HV*V = {conv_weight.shape[0]} channels, got {channels}")
    if g.shape != (tokens, value_heads, width):
        check_shape("g", g, (tokens, value_heads, width), "[T, HV, K]")
    if beta.shape != (tokens, value_heads):
        check_shape("beta", beta, (tokens, value_heads), "[T, HV]")
    if gate.shape != (tokens, value_heads, value_width):
        check_shape("gate", gate, (tokens, value_heads, value_width), "[T, HV, V]")
    if has_initial_state is not None and has_initial_state.shape != state_indices.shape[:1]:
        check_shape("has_initial_state", has_initial_state, (state_indices.shape[0],), "[N]")
    if out is not None and (
        out.shape != (tokens, value_heads * value_width)
        or out.dtype != qkv.dtype
        or out.stride(1) != 1
        or (tokens > 1 and out.stride(0) < out.shape[1])
    ):
        raise ValueError(
            f"out must be {qkv.dtype} {(tokens, value_heads * value_width)} with contiguous rows of their own, "
            f"got {out.dtype} {tuple(out.shape)} with strides {out.stride()}"
        )


def check_pools(
    conv_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    A_log: Tensor,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    num_heads: int,
    head_dim: int,
    lower_bound: float | None,
) -> None:
    """Shapes and dtypes of what a layer keeps from call to call."""
    if state.dim() != 4 or state.dtype != torch.float32:
        raise ValueError(f"state must be float32 [slots, HV, V, K], got {state.dtype} {tuple(state.shape)}")
    _, value_heads, value_width, width = state.shape
    if width != head_dim:
        raise ValueError(f"state must have K = head_dim = {head_dim} last, got {tuple(state.shape)}")
    if num_heads < 1 or value_heads % num_heads:
        raise ValueError(f"state must have a multiple of num_heads={num_heads} heads, got HV={value_heads}")
    channels = 2 * num_heads * width + value_heads * value_width
    if conv_weight.dim() != 2 or conv_weight.shape[0] != channels:
        raise ValueError(f"conv_weight must have shape [{channels}, W], got {tuple(conv_weight.shape)}")
    if conv_state.dim() != 3 or conv_state.shape[2] != channels:
        raise ValueError(
            f"conv_state must have shape [slots, W-1+S, {channels}], got {tuple(conv_state.shape)}"
        )
    if conv_state.shape[0] != state.shape[0]:
        raise ValueError(
            f"conv_state has {conv_state.shape[0]} slots, state has {state.shape[0]}: pass one pool"
        )
    for name, x in (("conv_state", conv_state), ("state", state)):
        if any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape)):
            raise ValueError(
                f"{name} must have memory for every element, got strides {x.stride()}: it is written, so not expanded"
            )
    if A_log.numel() != value_heads:
        raise ValueError(f"A_log must have {value_heads} elements = [HV], got shape {tuple(A_log.shape)}")
    if dt_bias is not None and dt_bias.numel() != value_heads * width:
        raise ValueError(
            f"dt_bias must have {value_heads * width} elements = [HV*K], got {tuple(dt_bias.shape)}"
        )
    if norm_weight.shape != (value_width,):
        check_shape("norm_weight", norm_weight, (value_width,), "[V]")
    check_lower_bound(lower_bound)


def check_rows(
    tokens: int,
    conv_weight: Tensor,
    conv_state: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor | None,
    num_accepted_tokens: Tensor | None,
) -> None:
    """Shapes and dtypes of what tells the sequences of one call apart."""
    for name, x in (
        ("state_indices", state_indices),
        ("cu_seqlens", cu_seqlens),
        ("num_accepted_tokens", num_accepted_tokens),
    ):
        if x is not None and x.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 or int64, got {x.dtype}")
    entries = conv_weight.shape[1] - 1
    if num_accepted_tokens is not None:
        if state_indices.dim() != 2 or cu_seqlens is None:
            raise ValueError("num_accepted_tokens needs cu_seqlens [N+1] and state_indices [N, S+1]")
        entries += state_indices.shape[1] - 1
    elif state_indices.dim() != 1:
        raise ValueError(f"state_indices must have shape [N], got {tuple(state_indices.shape)}")
    if conv_state.shape[1] < entries:
        raise ValueError(
            f"conv_state must have shape [slots, >= {entries}, {conv_state.shape[2]}], "
            f"got {tuple(conv_state.shape)}"
        )
    count = state_indices.shape[0]
    if cu_seqlens is not None and cu_seqlens.shape != (count + 1,):
        check_shape("cu_seqlens", cu_seqlens, (count + 1,), "[N+1]")
    if num_accepted_tokens is not None and num_accepted_tokens.shape != (count,):
        check_shape("num_accepted_tokens", num_accepted_tokens, (count,), "[N]")
    if cu_seqlens is None and count > tokens:
        raise ValueError(f"state_indices names {count} sequences for {tokens} tokens: pass a row for each")


# Numbered as LayerProblem in csrc/kda/args.h.
_BAD_INDEX, _BAD_LENGTH, _BAD_ACCEPTED, _BAD_OFFSETS = 1, 2, 3, 4
_LAYER_PROBLEMS = {
    _BAD_INDEX: "state_indices holds an index outside [-1, {slots}) for sequence {n}: pass slots of this pool",
    _BAD_LENGTH: "cu_seqlens gives sequence {n} more tokens than state_indices has columns: pass a slot per token",
    _BAD_ACCEPTED: "num_accepted_tokens[{n}] names no slot of the sequence: pass 1 to state_indices' columns",
    _BAD_OFFSETS: "cu_seqlens does not fit {tokens} tokens at sequence {n}: pass offsets from 0 that never fall",
}


def layer_problem(problem: int, n: int, slots: int, tokens: int) -> ValueError:
    """The error for what a kernel found wrong with sequence `n`."""
    return ValueError(_LAYER_PROBLEMS[problem].format(n=n, slots=slots, tokens=tokens))


def check_sequences(
    bounds: list[int], indices: list[list[int]], accepted: list[int] | None, slots: int, tokens: int
) -> None:
    """Offsets, slots and counts of a serving call, as the native kernels check them."""
    for n, row in enumerate(indices):
        first, end = bounds[n], bounds[n + 1]
        problem = None
        if first < 0 or end < first or end > tokens or (n == 0 and first != 0):
            problem = _BAD_OFFSETS
        elif any(not -1 <= index < slots for index in row):
            problem = _BAD_INDEX
        elif accepted is not None and row[0] >= 0:
            if end - first > len(row):
                problem = _BAD_LENGTH
            elif not 1 <= accepted[n] <= len(row) or row[accepted[n] - 1] < 0:
                problem = _BAD_ACCEPTED
        if problem is not None:
            raise layer_problem(problem, n, slots, tokens)
