"""KDA on Triton kernels: float32 or bfloat16 tensors, states in float32. The kernels are imported when first run."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton, dispatch
from .reference import Options

MAX_HEAD = 256  # a slice of the state stays in registers
_DTYPES = (torch.float32, torch.bfloat16)


def _refuses(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options) -> str | None:
    for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta)):
        if x.dtype not in _DTYPES:
            return f"takes float32 or bfloat16, got {x.dtype} for {name}"
    for name, x in (("initial_state", initial_state), ("A_log", A_log), ("dt_bias", dt_bias)):
        if x is not None and x.dtype == torch.float64:
            return f"computes in float32, got float64 for {name}"
    if k.shape[3] > MAX_HEAD or v.shape[3] > MAX_HEAD:
        return f"takes head sizes up to {MAX_HEAD}, got K={k.shape[3]}, V={v.shape[3]}"
    return None


class _Problem:
    """One call: what both forms pass to their kernels."""

    def __init__(self, q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options: Options) -> None:
        self.q, self.k, self.v, self.g = map(_triton.rows, (q, k, v, g))
        self.beta, self.initial, self.offsets = beta, initial_state, cu_seqlens
        self.A_log = None if A_log is None else A_log.reshape(-1)
        self.dt_bias = None if dt_bias is None else dt_bias.reshape(-1)
        batch, self.T, self.H, self.K = k.shape
        self.HV, self.V = v.shape[2:]
        self.N = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.groups = self.HV // self.H
        self.wide = v.dtype == torch.float32
        self.options = options
        self.out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        sizes = (self.V, self.K) if options.state_v_first else (self.K, self.V)
        self.final = torch.empty((self.N, self.HV, *sizes), dtype=torch.float32, device=v.device)

    def numbers(self) -> tuple[float, float, float]:
        o = self.options
        return o.scale, o.lower_bound or 0.0, 2.0 if o.allow_neg_eigval else 1.0

    def input_constants(self) -> dict[str, object]:
        from . import triton_kernels as kernels

        o = self.options
        gate = kernels.GATE_SOFTPLUS if o.lower_bound is None else kernels.GATE_LOWER_BOUND
        return {
            "HV": self.HV,
            "GATE": gate if o.gate else kernels.GATE_NONE,
            "HAS_RATE": self.A_log is not None,
            "HAS_BIAS": self.dt_bias is not None,
            "L2NORM": o.l2norm,
            "SIGMOID": o.beta_sigmoid,
            "PACKED": self.offsets is not None,
        }

    def state_strides(self) -> tuple[int, ...]:
        return *self._strides_of(self.initial), *self._strides_of(self.final)

    def _strides_of(self, state: Tensor | None) -> tuple[int, ...]:
        if state is None:
            return 0, 0, 0, 0
        n, h, a, b = state.stride()
        return (n, h, b, a) if self.options.state_v_first else (n, h, a, b)


@dispatch.register("chunk_kda", "triton", _refuses)
def chunk_kda(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options: Options):
    from . import triton_kernels as kernels

    p = _Problem(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options)
    config = kernels.prepare_config(p.K, p.wide)
    BT, KP = config.constants["BT"], config.constants["KP"]
    slots = p.T // BT + p.N if p.offsets is not None else p.N * -(-p.T // BT)
    slots = slots if p.T else 0

    def room(*shape: int, dtype: torch.dtype = v.dtype) -> Tensor:
        return torch.empty((slots, p.HV, *shape), dtype=dtype, device=v.device)

    read_key, query, write_key = (room(BT, KP) for _ in range(3))
    decay, solve, attend = room(KP, dtype=torch.float32), room(BT, BT), room(BT, BT)
    pairs = (read_key, query, write_key, decay, solve, attend)
    _triton.launch(
        kernels.prepare_kernel, (slots, p.HV), v,
        p.q, p.k, p.g, p.beta, p.A_log, p.dt_bias, p.offsets, *pairs,
        *p.q.stride()[:3], *p.k.stride()[:3], *p.g.stride()[:3], *p.beta.stride(),
        p.T, p.N, p.groups, KP, *p.numbers(),
        config=config._replace(constants={**config.constants, **p.input_constants()}),
    )  # fmt: skip
    config = kernels.scan_config(p.K, p.V, p.wide)
    constants = {"HV": p.HV, "HAS_INITIAL": p.initial is not None, "PACKED": p.offsets is not None}
    _triton.launch(
        kernels.scan_kernel, (-(-p.V // config.constants["BV"]), p.N * p.HV), v,
        *pairs, p.v, p.initial, p.out, p.final, p.offsets,
        *p.v.stride()[:3], *p.out.stride()[:3], *p.state_strides(), p.T,
        config=config._replace(constants={**config.constants, **constants}),
    )  # fmt: skip
    return p.out, p.final


@dispatch.register("fused_recurrent_kda", "triton", _refuses)
def fused_recurrent_kda(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options: Options):
    from . import triton_kernels as kernels

    p = _Problem(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options)
    config = kernels.recurrent_config(p.K, p.V)
    constants = {**p.input_constants(), "HAS_INITIAL": p.initial is not None}
    _triton.launch(
        kernels.recurrent_kernel, (-(-p.V // config.constants["BV"]), p.N * p.HV), v,
        p.q, p.k, p.v, p.g, p.beta, p.A_log, p.dt_bias, p.offsets, p.initial, p.out, p.final,
        *p.q.stride()[:3], *p.k.stride()[:3], *p.g.stride()[:3], *p.beta.stride(),
        *p.v.stride()[:3], *p.out.stride()[:3], *p.state_strides(), p.T, p.groups, *p.numbers(),
        config=config._replace(constants={**config.constants, **constants}),
    )  # fmt: skip
    return p.out, p.final
