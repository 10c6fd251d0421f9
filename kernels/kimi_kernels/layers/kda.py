"""The decode step of a KDA layer with the projections around it."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..kda import kda_decode
from ..kda._layout import KdaArgs, KdaLayer
from ..kda.cpu import GATE_LOWER_BOUND, GATE_SOFTPLUS
from ..kda.paged_cpu import layer_refusal
from ..kda.validation import check_pools, check_rows, check_shape, layer_problem
from ..projection import batched_linear, linear
from ._layout import KdaWeights
from ._prepared import MOST_TOKENS, check_hidden, int32, native_refusal


class KdaDecodeLayer:
    """One step of a KDA layer for one token per sequence, from hidden state to hidden state (Kimi Linear, section 4).

    Args:
        in_proj: [2*H*K + HV*V + 2*R + HV, D], rows of q, k, v, the down projections of decay and output gate, beta.
        gate_up: [2, HV*K, R], the gates' up projections, decay first; K = V.
        o_proj: [O, HV*V].
        conv_weight, conv_state, state, A_log, dt_bias, norm_weight, lower_bound, norm_eps, scale: as for `kda_decode`;
            the pools are updated in place by each call.
        num_heads: H, heads of q and k.

    Weights and pools may change their values, not their places.

    Raises:
        ValueError: a shape or dtype does not fit; the message names it.
    """

    def __init__(
        self,
        in_proj: Tensor,
        gate_up: Tensor,
        o_proj: Tensor,
        conv_weight: Tensor,
        conv_state: Tensor,
        state: Tensor,
        A_log: Tensor,
        dt_bias: Tensor | None,
        norm_weight: Tensor,
        *,
        num_heads: int,
        lower_bound: float | None = None,
        norm_eps: float = 1e-5,
        scale: float | None = None,
    ) -> None:
        check_pools(
            conv_weight, conv_state, state, A_log, dt_bias, norm_weight, num_heads, state.shape[-1], lower_bound
        )
        self.slots, heads, value_width, width = state.shape
        if value_width != width:
            raise ValueError(f"state must be [slots, HV, V, K] with V = K, got {tuple(state.shape)}")
        if gate_up.dim() != 3 or gate_up.shape[:2] != (2, heads * width):
            raise ValueError(f"gate_up must have shape [2, {heads * width}, R], got {tuple(gate_up.shape)}")
        rank = gate_up.shape[2]
        self.splits = ((2 * num_heads + heads) * width, 2 * rank, heads)
        if in_proj.dim() != 2 or in_proj.shape[0] != sum(self.splits):
            raise ValueError(
                f"in_proj must have 2*H*K + HV*V + 2*R + HV = {sum(self.splits)} rows, got {tuple(in_proj.shape)}"
            )
        check_shape("o_proj", o_proj, (o_proj.shape[0], heads * width), "[O, HV*V]")
        self.in_proj, self.gate_up, self.o_proj = in_proj, gate_up, o_proj
        self.pools = (conv_weight, conv_state, state)
        self.state = state
        self.parameters = (A_log, dt_bias, norm_weight)
        self.options: dict[str, Any] = {
            "num_heads": num_heads,
            "head_dim": width,
            "lower_bound": lower_bound,
            "norm_eps": norm_eps,
            "scale": width**-0.5 if scale is None else scale,
        }
        floats = [x for x in self.parameters if x is not None]
        if any(x.dtype != torch.float32 or not x.is_contiguous() for x in floats):
            self.refusal: str | None = "needs contiguous float32 A_log, dt_bias and norm_weight"
        else:
            self.refusal = native_refusal(in_proj, gate_up, o_proj) or layer_refusal(*self.pools)
        if self.refusal is None:
            self._prepare()

    def _prepare(self) -> None:
        conv_weight, conv_state, state = self.pools
        A_log, dt_bias, norm_weight = self.parameters
        _, heads, _, width = state.shape
        slot_stride, head_stride, value_stride, _ = state.stride()
        self._args, self._layer, self._weights = KdaArgs(), KdaLayer(), KdaWeights()
        a, layer, w = self._args, self._layer, self._weights
        for pool in (a.initial, a.final):
            pool.data, pool.stride_n, pool.stride_h = state.data_ptr(), slot_stride, head_stride
            pool.stride_k, pool.stride_v = 1, value_stride
        a.A_log, a.dt_bias = A_log.data_ptr(), _native.pointer(dt_bias)
        a.H, a.HV, a.K, a.V = self.options["num_heads"], heads, width, width
        a.l2norm = a.beta_sigmoid = 1
        a.beta_scale, a.scale = 1.0, self.options["scale"]
        lower_bound = self.options["lower_bound"]
        a.gate, a.lower_bound = (GATE_SOFTPLUS, 0.0) if lower_bound is None else (GATE_LOWER_BOUND, lower_bound)
        a.num_threads = torch.get_num_threads()
        layer.conv_weight, layer.conv_weight_dtype = conv_weight.data_ptr(), _native.DTYPE_CODES[conv_weight.dtype]
        layer.conv_width, layer.slots = conv_weight.shape[1], self.slots
        layer.conv_state, layer.conv_state_dtype = conv_state.data_ptr(), _native.DTYPE_CODES[conv_state.dtype]
        layer.conv_stride_slot, layer.conv_stride_entry, layer.conv_stride_channel = conv_state.stride()
        layer.norm_weight, layer.norm_eps = norm_weight.data_ptr(), self.options["norm_eps"]
        for name in ("in_proj", "gate_up", "o_proj"):
            setattr(w, name, getattr(self, name).data_ptr())
        w.N, w.D = self.in_proj.shape
        w.rank, w.O = self.gate_up.shape[2], self.o_proj.shape[0]
        w.dtype = _native.DTYPE_CODES[self.in_proj.dtype]
        self._addresses = tuple(ctypes.addressof(x) for x in (a, layer, w))
        self._call = _native.kernel("kda_decode_layer", "ppppp" + "ii" + "pi" + "pp")

    def __call__(
        self,
        hidden: Tensor,
        state_indices: Tensor,
        cu_seqlens: Tensor | None = None,
        num_accepted_tokens: Tensor | None = None,
    ) -> Tensor:
        """[T, D] normed -> [T, O]; the sequences as for `kda_decode`. Raises ValueError where they do not fit."""
        check_hidden(hidden, self.in_proj)
        tokens = hidden.shape[0]
        if self.refusal is not None or tokens > MOST_TOKENS:
            return self._by_ops(hidden, state_indices, cu_seqlens, num_accepted_tokens)
        check_rows(tokens, *self.pools[:2], state_indices, cu_seqlens, num_accepted_tokens)
        hidden, state_indices = hidden.contiguous(), int32(state_indices)
        cu_seqlens = None if cu_seqlens is None else int32(cu_seqlens)
        accepted = None if num_accepted_tokens is None else int32(num_accepted_tokens)
        out = torch.empty((tokens, self.o_proj.shape[0]), dtype=hidden.dtype)
        self._call(
            *self._addresses,
            hidden.data_ptr(),
            out.data_ptr(),
            tokens,
            state_indices.shape[0],
            state_indices.data_ptr(),
            1 if state_indices.dim() == 1 else state_indices.shape[1],
            _native.pointer(cu_seqlens),
            _native.pointer(accepted),
        )
        if self._layer.problem:
            raise layer_problem(self._layer.problem, self._layer.problem_at, self.slots, tokens)
        return out

    def _by_ops(
        self,
        hidden: Tensor,
        state_indices: Tensor,
        cu_seqlens: Tensor | None,
        num_accepted_tokens: Tensor | None,
    ) -> Tensor:
        qkv, down, beta = linear(hidden, self.in_proj).split(self.splits, dim=-1)
        down = down.unflatten(-1, (2, -1)).transpose(0, 1)
        decay, gate = batched_linear(down, self.gate_up).unflatten(-1, self.state.shape[1:3])
        core = kda_decode(
            qkv, decay, beta, gate, *self.pools, state_indices, *self.parameters,
            cu_seqlens=cu_seqlens, num_accepted_tokens=num_accepted_tokens, **self.options,
        )  # fmt: skip
        return linear(core, self.o_proj)
