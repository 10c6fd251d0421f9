"""The paged serving ops in plain torch: one sequence after the other."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from .reference import _chunked, _recurrent, _working_dtype, kda_gate, l2_norm
from .validation import check_sequences


class LayerOptions(NamedTuple):
    """Constants of a KDA layer, in the order in which the custom ops take them."""

    num_heads: int
    lower_bound: float | None
    norm_eps: float
    scale: float


class _Layer:
    def __init__(self, conv_weight, state, A_log, dt_bias, norm_weight, options: LayerOptions) -> None:
        self.weight, self.norm_weight = conv_weight, norm_weight
        self.A_log, self.dt_bias, self.options = A_log, dt_bias, options
        self.value_heads, self.value_width, self.width = state.shape[1:]

    def run(
        self, core, x: Tensor, history: Tensor, g: Tensor, beta: Tensor, gate: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens [T, ...] of one sequence after `history` [width - 1, channels], on `state` [HV, V, K]."""
        o, heads = self.options, self.options.num_heads
        dtype = _working_dtype(x)
        window = torch.cat([history.to(dtype), x.to(dtype)])
        taps = self.weight.to(dtype).t()
        y = sum(tap * window[i : i + len(x)] for i, tap in enumerate(taps))
        y = torch.nn.functional.silu(y)
        q, k, v = y.split([heads * self.width] * 2 + [self.value_heads * self.value_width], -1)
        groups = self.value_heads // heads
        q, k = (l2_norm(t.unflatten(-1, (heads, -1))).repeat_interleave(groups, 1) for t in (q, k))
        log_decay = kda_gate(g, self.A_log, self.dt_bias, o.lower_bound).to(dtype)
        parts = (q * o.scale, k, v.unflatten(-1, (self.value_heads, -1)), log_decay, beta.to(dtype).sigmoid())
        out, new = core(*(p.unsqueeze(0) for p in parts), state.to(dtype).transpose(-1, -2).unsqueeze(0))
        out = out[0]
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + o.norm_eps)
        out = out * self.norm_weight.to(dtype) * gate.to(dtype).sigmoid()
        return out.flatten(1), new[0].transpose(-1, -2)


@dispatch.register("kda_prefill", "reference")
def kda_prefill(
    qkv, g, beta, gate, conv_weight, conv_state, state, state_indices, cu_seqlens, has_initial_state,
    A_log, dt_bias, norm_weight, out, options: LayerOptions,
) -> None:  # fmt: skip
    layer = _Layer(conv_weight, state, A_log, dt_bias, norm_weight, options)
    past = conv_weight.shape[1] - 1
    bounds, slots, resumed = cu_seqlens.tolist(), state_indices.tolist(), has_initial_state.tolist()
    check_sequences(bounds, [[slot] for slot in slots], None, len(state), len(qkv))
    out.zero_()
    for n, (a, b) in enumerate(itertools.pairwise(bounds)):
        slot = slots[n]
        if slot < 0 or a == b:
            continue
        history = conv_state[slot, :past] if resumed[n] else torch.zeros_like(conv_state[slot, :past])
        start = state[slot] if resumed[n] else torch.zeros_like(state[slot])
        core = _recurrent if b - a == 1 else _chunked
        o, new = layer.run(core, qkv[a:b], history, g[a:b], beta[a:b], gate[a:b], start)
        out[a:b] = o.to(out.dtype)
        state[slot] = new
        conv_state[slot, :past] = torch.cat([history, qkv[a:b].to(conv_state.dtype)])[b - a :]


@dispatch.register("kda_decode", "reference")
def kda_decode(
    qkv, g, beta, gate, conv_weight, conv_state, state, state_indices,
    A_log, dt_bias, norm_weight, cu_seqlens, num_accepted_tokens, out, options: LayerOptions,
) -> None:  # fmt: skip
    layer = _Layer(conv_weight, state, A_log, dt_bias, norm_weight, options)
    past = conv_weight.shape[1] - 1
    slots = state_indices.view(len(state_indices), -1).tolist()
    bounds = list(range(len(slots) + 1)) if cu_seqlens is None else cu_seqlens.tolist()
    given = None if num_accepted_tokens is None else num_accepted_tokens.tolist()
    check_sequences(bounds, slots, given, len(state), len(qkv))
    accepted = given or [1] * len(slots)
    out.zero_()
    for n, (a, b) in enumerate(itertools.pairwise(bounds)):
        if slots[n][0] < 0 or a == b:
            continue
        history = conv_state[slots[n][0], accepted[n] - 1 : accepted[n] - 1 + past].clone()
        current = state[slots[n][accepted[n] - 1]]
        window = torch.cat([history, qkv[a:b].to(conv_state.dtype)])
        for t in range(a, b):
            seen = torch.cat([history, qkv[a:t].to(history.dtype)])[t - a :]
            o, current = layer.run(
                _recurrent, qkv[t : t + 1], seen, g[t : t + 1], beta[t : t + 1], gate[t : t + 1], current
            )
            out[t : t + 1] = o.to(out.dtype)
            if slots[n][t - a] >= 0:
                state[slots[n][t - a]] = current
        conv_state[slots[n][0], : past - 1 + b - a] = window[1:]
