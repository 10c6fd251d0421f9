"""KDA in plain torch: any device, differentiable, in float64 when the inputs are, in float32 otherwise.

Kimi Linear, arXiv 2510.26692: the recurrence is equation 1, the chunk form equations 2-9. The recurrence is the
definition against which everything else is tested; the chunk form is the same arithmetic as matrix products.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch

L2_NORM_EPS = 1e-6  # inside the root, as in the published model
CHUNK = 16


class Options(NamedTuple):
    """How the inputs become what the recurrence sees, in the order in which the custom ops take them."""

    scale: float
    l2norm: bool
    gate: bool
    beta_sigmoid: bool
    allow_neg_eigval: bool
    lower_bound: float | None
    state_v_first: bool


def _working_dtype(*tensors: Tensor | None) -> torch.dtype:
    return (
        torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    )


def kda_gate(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    dtype = _working_dtype(g, A_log, dt_bias)
    heads, width = g.shape[-2:]
    z = g.to(dtype)
    if dt_bias is not None:
        z = z + dt_bias.to(dtype).view(heads, width)
    rate = 1.0 if A_log is None else A_log.to(dtype).exp().view(heads, 1)
    if lower_bound is None:
        # log(1 + e^z) without overflow; F.softplus would switch to the identity at 20.
        return -rate * torch.logaddexp(z, torch.zeros_like(z))
    return lower_bound * torch.sigmoid(rate * z)


def l2_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_NORM_EPS)


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """[B, T, HV, ...] in the working dtype, state [B, HV, K, V]; token by token."""
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t].exp().unsqueeze(-1) * state
        kt = k[:, t].unsqueeze(-1)
        u = beta[:, t].unsqueeze(-1) * (v[:, t] - (state * kt).sum(-2))
        state = state + kt * u.unsqueeze(-2)
        outputs.append((state * q[:, t].unsqueeze(-1)).sum(-2))
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), state


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """As `_recurrent`, in chunks. Pair decays are formed as e^(G_i - G_j) with i >= j, so any decay is safe."""
    outputs = []
    for first in range(0, q.shape[1], CHUNK):
        qc, kc, vc, gc = (x[:, first : first + CHUNK].transpose(1, 2) for x in (q, k, v, g))
        bc = beta[:, first : first + CHUNK].transpose(1, 2).unsqueeze(-1)
        total = gc.cumsum(-2)
        length = total.shape[-2]
        later = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().unsqueeze(-1)
        # Masked before the exponential: its gradient would be inf * 0 above the diagonal.
        gap = (total.unsqueeze(-2) - total.unsqueeze(-3)).masked_fill(~later, float("-inf"))
        decayed = kc.unsqueeze(-3) * gap.exp()
        A = (kc.unsqueeze(-2) * decayed).sum(-1).tril(-1)
        P = (qc.unsqueeze(-2) * decayed).sum(-1).tril()
        grown = total.exp()
        identity = torch.eye(length, dtype=q.dtype, device=q.device)
        rhs = bc * (vc - (kc * grown) @ state)
        u = torch.linalg.solve_triangular(identity + bc * A, rhs, upper=False, unitriangular=True)
        outputs.append(((qc * grown) @ state + P @ u).transpose(1, 2))
        left = kc * (total[..., -1:, :] - total).exp()
        state = grown[..., -1, :].unsqueeze(-1) * state + left.transpose(-1, -2) @ u
    return (torch.cat(outputs, 1) if outputs else torch.zeros_like(v)), state


def _run(
    core,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    dtype = _working_dtype(q, k, v, g, beta, initial_state, A_log, dt_bias)
    heads, value_heads, width = q.shape[2], v.shape[2], k.shape[3]
    out_dtype = v.dtype
    log_decay = kda_gate(g, A_log, dt_bias, options.lower_bound) if options.gate else g
    q, k, v, log_decay, beta = (x.to(dtype) for x in (q, k, v, log_decay, beta))
    if options.l2norm:
        q, k = l2_norm(q), l2_norm(k)
    q, k = (x.repeat_interleave(value_heads // heads, 2) for x in (q * options.scale, k))
    if options.beta_sigmoid:
        beta = beta.sigmoid()
    if options.allow_neg_eigval:
        beta = 2 * beta

    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    count = q.shape[0] if bounds is None else len(bounds) - 1
    if initial_state is None:
        state = torch.zeros(count, value_heads, width, v.shape[3], dtype=dtype, device=v.device)
    else:
        state = initial_state.to(dtype)
        state = state.transpose(-1, -2) if options.state_v_first else state
    if bounds is None or count == 0:
        out, state = core(q, k, v, log_decay, beta, state)
    else:
        parts = [
            core(*(x[:, a:b] for x in (q, k, v, log_decay, beta)), state[n : n + 1])
            for n, (a, b) in enumerate(itertools.pairwise(bounds))
        ]
        out = torch.cat([p[0] for p in parts], 1)
        state = torch.cat([p[1] for p in parts])
    state = state.transpose(-1, -2) if options.state_v_first else state
    return out.to(out_dtype), state.contiguous()


@dispatch.register("chunk_kda", "reference")
def chunk_kda(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options: Options):
    return _run(_chunked, q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options)


def by_interval(
    rule: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    interval: int,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """`chunk_kda_states` by a backend's `rule` for `chunk_kda`, which goes on from each state that is asked for."""
    batch, tokens = k.shape[:2]
    if cu_seqlens is None:
        sequences = [(n, n * (tokens // interval), 0, tokens) for n in range(batch)]
    else:
        spans = itertools.pairwise(cu_seqlens.tolist())
        sequences = [(0, a // interval, a, b) for a, b in spans]
    out = torch.zeros_like(v, memory_format=torch.contiguous_format)
    finals, marks = [], {}
    for n, (row, mark, first, end) in enumerate(sequences):
        state = None if initial_state is None else initial_state[n : n + 1]
        for start in range(first, max(end, first + 1), interval):
            span = slice(start, min(start + interval, end))
            parts = (x[row : row + 1, span] for x in (q, k, v, g, beta))
            out[row : row + 1, span], state = rule(*parts, state, A_log, dt_bias, None, options)
            if span.stop - start == interval:
                marks[mark + (start - first) // interval] = state[0]
        finals.append(state)
    rows = batch * (tokens // interval)
    if finals:
        final = torch.cat(finals)
    else:
        _, final = rule(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options)
    states = final.new_zeros((rows, *final.shape[1:]))
    for mark, state in marks.items():
        states[mark] = state
    return out, final, states


@dispatch.register("chunk_kda_states", "reference")
def chunk_kda_states(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return by_interval(chunk_kda, *args)


@dispatch.register("fused_recurrent_kda", "reference")
def fused_recurrent_kda(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options: Options):
    return _run(_recurrent, q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options)


@dispatch.register("chunk_kda_backward", "reference")
def chunk_kda_backward(
    d_out, d_state, q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options: Options
) -> list[Tensor | None]:
    """Gradients of q, k, v, g, beta, initial_state, A_log, dt_bias, by autograd through the chunk form."""
    inputs = (q, k, v, g, beta, initial_state, A_log, dt_bias)
    with torch.enable_grad():
        leaves: list[Any] = [None if x is None else x.detach().requires_grad_() for x in inputs]
        q, k, v, g, beta, initial_state, A_log, dt_bias = leaves
        out, state = _run(_chunked, q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options)
        wanted = [x for x in leaves if x is not None]
        grads = iter(
            torch.autograd.grad((out, state), wanted, (d_out, d_state.to(state.dtype)), allow_unused=True)
        )
    found = [None if x is None else next(grads) for x in leaves]
    return [None if x is None else torch.zeros_like(x) if d is None else d for x, d in zip(leaves, found)]


dispatch.register("kda_gate", "reference")(kda_gate)


@dispatch.register("kda_gate_backward", "reference")
def kda_gate_backward(d_out, g, A_log, dt_bias, lower_bound) -> list[Tensor | None]:
    with torch.enable_grad():
        leaves: list[Any] = [None if x is None else x.detach().requires_grad_() for x in (g, A_log, dt_bias)]
        wanted = [x for x in leaves if x is not None]
        out = kda_gate(leaves[0], leaves[1], leaves[2], lower_bound)
        grads = iter(torch.autograd.grad(out, wanted, d_out))
    return [None if x is None else next(grads) for x in leaves]
