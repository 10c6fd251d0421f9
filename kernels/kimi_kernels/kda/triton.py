"""KDA on Triton kernels: float32, bfloat16 or float16 tensors, float32 states. They are imported when first run."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from .. import _triton, dispatch
from .reference import Options

MAX_HEAD = 256  # a slice of the state stays in registers
LEAST_CHUNKS, SEGMENTS = 8, 4  # the shortest segment of a split scan, and the fewest worth a split
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _refuses(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options) -> str | None:
    for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta)):
        if x.dtype not in _DTYPES:
            return f"takes float32, bfloat16 or float16, got {x.dtype} for {name}"
    for name, x in (("initial_state", initial_state), ("A_log", A_log), ("dt_bias", dt_bias)):
        if x is not None and x.dtype == torch.float64:
            return f"computes in float32, got float64 for {name}"
    if k.shape[3] > MAX_HEAD or v.shape[3] > MAX_HEAD:
        return f"takes head sizes up to {MAX_HEAD}, got K={k.shape[3]}, V={v.shape[3]}"
    return None


def batch_invariant() -> bool:
    """Whether a sequence must give the same bits alone and packed: KIMI_KERNELS_BATCH_INVARIANT=1 asks for it."""
    return os.environ.get("KIMI_KERNELS_BATCH_INVARIANT") == "1"


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def segment_count(p: Problem, programs: int, chunk: int) -> int:
    """Into how many segments the scan of each sequence is split, that `programs` of it would leave processors idle.

    A segment is gone through twice, side by side with the others: from SEGMENTS on that takes at most half as long.
    In float32 the kernels have no registers to spare for it.
    The answer depends on how many sequences share a batch and how long they are, hence a sequence's last bits do;
    KIMI_KERNELS_BATCH_INVARIANT=1 keeps all scans whole.
    """
    if batch_invariant() or p.wide or programs == 0:
        return 1
    chunks = p.T // (p.N * chunk) if p.offsets is not None else p.T // chunk
    count = min(processors(p.v.device) // programs, chunks // LEAST_CHUNKS)
    return count if count >= SEGMENTS else 1


class Problem:
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

    def results(self) -> tuple[Tensor, Tensor]:
        """Room for the output and the final states."""
        sizes = (self.V, self.K) if self.options.state_v_first else (self.K, self.V)
        final = torch.empty((self.N, self.HV, *sizes), dtype=torch.float32, device=self.v.device)
        return torch.empty(self.v.shape, dtype=self.v.dtype, device=self.v.device), final

    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.q, self.k, self.g, self.beta, self.A_log, self.dt_bias, self.offsets

    def input_strides(self) -> tuple[int, ...]:
        return *self.q.stride()[:3], *self.k.stride()[:3], *self.g.stride()[:3], *self.beta.stride()

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

    def strides_of(self, state: Tensor | None) -> tuple[int, ...]:
        if state is None:
            return 0, 0, 0, 0
        n, h, a, b = state.stride()
        return (n, h, b, a) if self.options.state_v_first else (n, h, a, b)


class Chunks:
    """The chunk quantities of one call, made by the launch that all chunks share."""

    def __init__(self, p: Problem, keep: bool) -> None:
        from . import triton_kernels as kernels

        config = kernels.prepare_config(p.K, p.wide)
        self.BT, self.KP = config.constants["BT"], config.constants["KP"]
        slots = p.T // self.BT + p.N if p.offsets is not None else p.N * -(-p.T // self.BT)
        self.p, self.slots = p, slots if p.T else 0
        self.read_key, self.query, self.write_key = (self.room(self.BT, self.KP) for _ in range(3))
        self.decay = self.room(self.KP, dtype=torch.float32)
        self.solve, self.attend = self.room(self.BT, self.BT), self.room(self.BT, self.BT)
        self.solve_back = self.room(self.BT, self.BT) if keep else None
        self.strengths = self.room(self.BT, dtype=torch.float32) if keep else None
        _triton.launch(
            kernels.prepare_kernel, (self.slots, p.HV), p.v,
            *p.inputs(), *self.pairs(), self.attend, self.solve_back, self.strengths,
            *p.input_strides(), p.T, p.N, p.groups, self.KP, *p.numbers(),
            config=config._replace(constants={**config.constants, **p.input_constants(), "KEEP": keep}),
        )  # fmt: skip

    def room(self, *shape: int, dtype: torch.dtype | None = None, zero: bool = False) -> Tensor:
        """A tensor [slots, HV, *shape]; kernels write the slots that are in use."""
        make = torch.zeros if zero else torch.empty
        return make((self.slots, self.p.HV, *shape), dtype=dtype or self.p.v.dtype, device=self.p.v.device)

    def pairs(self) -> tuple[Tensor, ...]:
        return self.read_key, self.query, self.write_key, self.decay, self.solve

    def scan(
        self,
        out: Tensor | None,
        final: Tensor | None,
        kept: tuple[Tensor, Tensor] | None = None,
        entries: tuple[Tensor, Tensor] | None = None,
        boundaries: tuple[Tensor, int] | None = None,
    ) -> None:
        """Go through the chunks in order: to outputs and final states, or to what gradients need.

        entries: state_indices and has_initial_state, where the initial and final states are one pool.
        boundaries: room for states on the way, and after how many tokens each.
        """
        from . import triton_kernels as kernels

        p = self.p
        programs = -(-p.V // kernels.scan_config(p.K, p.V, p.wide).constants["BV"]) * p.N * p.HV
        segments = 1 if kept else segment_count(p, programs, self.BT)
        config = kernels.scan_config(p.K, p.V, p.wide, segments > 1 or boundaries is not None)
        blocks = -(-p.V // config.constants["BV"])
        constants = {"HV": p.HV, "HAS_INITIAL": p.initial is not None, "PACKED": p.offsets is not None,
                     "POOLED": entries is not None, "LEAST": LEAST_CHUNKS}  # fmt: skip
        starts = self._starts(segments, entries, constants) if segments > 1 else None
        constants |= {"KEEP": kept is not None, "SEGMENTED": segments > 1, "BOUNDARIES": boundaries is not None}
        marks, interval = boundaries or (None, 0)
        _triton.launch(
            kernels.scan_kernel, (blocks, p.N * p.HV, segments), p.v,
            *self.pairs(), self.attend, self.strengths, p.v, p.initial, out, final, *(kept or (None, None)), p.offsets,
            *(entries or (None, None)), starts, marks,
            *p.v.stride()[:3], *_token_strides(out), *p.strides_of(p.initial), *p.strides_of(final),
            *p.strides_of(marks), p.T, 0 if p.initial is None else len(p.initial), interval, p.options.scale,
            config=config._replace(constants={**config.constants, **constants}),
        )  # fmt: skip

    def _starts(
        self, segments: int, entries: tuple[Tensor, Tensor] | None, constants: dict[str, object]
    ) -> Tensor:
        """[N * HV, segments, KP, V] float32, the states before the segments of each sequence, in two launches.

        A segment of chunks takes a state S to M S + b. All M and b are made at once, then the states one by one.
        """
        from . import triton_kernels as kernels

        p = self.p
        room = {"dtype": torch.float32, "device": p.v.device}
        starts = torch.empty((p.N * p.HV, segments, self.KP, p.V), **room)
        carries = torch.empty((p.N * p.HV, segments, self.KP, self.KP), **room)
        config = kernels.segment_config(p.K, p.V, p.wide)
        blocks, carried = (-(-columns // config.constants["BV"]) for columns in (p.V, self.KP))
        _triton.launch(
            kernels.segment_kernel, (blocks + carried, p.N * p.HV, segments - 1), p.v,
            self.read_key, self.write_key, self.decay, self.solve, p.v, p.initial, p.offsets,
            *(entries or (None, None)), starts, carries,
            *p.v.stride()[:3], *p.strides_of(p.initial), p.T, 0 if p.initial is None else len(p.initial),
            config=config._replace(constants={**config.constants, **constants}),
        )  # fmt: skip
        config = kernels.merge_config(p.K, p.V, p.wide)
        shared = {name: constants[name] for name in ("HV", "PACKED", "LEAST")}
        _triton.launch(
            kernels.merge_kernel, (blocks if segments > 2 else 0, p.N * p.HV), p.v,
            starts, carries, p.offsets, segments, self.KP, p.T,
            config=config._replace(constants={**config.constants, **shared}),
        )  # fmt: skip
        return starts


def _token_strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


@dispatch.register("chunk_kda", "triton", _refuses)
def chunk_kda(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options: Options):
    p = Problem(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options)
    out, final = p.results()
    Chunks(p, keep=False).scan(out, final)
    return out, final


@dispatch.register("chunk_kda_states", "triton", lambda *args: _refuses(*args[:-2] + args[-1:]))
def chunk_kda_states(
    q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, interval: int, options: Options
):  # fmt: skip
    p = Problem(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options)
    out, final = p.results()
    rows = k.shape[0] * (p.T // interval)
    # Packed, some rows may belong to no sequence.
    states = (torch.empty if cu_seqlens is None else torch.zeros)(
        (rows, *final.shape[1:]), dtype=torch.float32, device=v.device
    )
    Chunks(p, keep=False).scan(out, final, boundaries=(states, interval))
    return out, final, states


@dispatch.register("chunk_kda_backward", "triton", lambda d_out, d_state, *args: _refuses(*args))
def chunk_kda_backward(
    d_out, d_state, q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options: Options
) -> list[Tensor | None]:
    """Four launches: the chunks again, forth and back through the states, and all other gradients chunk by chunk."""
    from . import triton_kernels as kernels

    p = Problem(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options)
    d_out, d_state = _triton.rows(d_out.to(v.dtype)), d_state.to(torch.float32)
    chunks = Chunks(p, keep=True)
    states, written = chunks.room(chunks.KP, p.V), chunks.room(chunks.BT, p.V, dtype=torch.float32)
    chunks.scan(None, None, kept=(states, written))

    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    d_initial = None if initial_state is None else torch.empty_like(initial_state, dtype=torch.float32)
    d_states, d_written = torch.empty_like(states), chunks.room(chunks.BT, p.V)
    config = kernels.scan_back_config(p.K, p.V, p.wide)
    blocks = -(-p.V // config.constants["BV"])
    d_strengths = chunks.room(blocks, chunks.BT, dtype=torch.float32)
    constants = {"HV": p.HV, "HAS_INITIAL": p.initial is not None, "PACKED": p.offsets is not None}
    _triton.launch(
        kernels.scan_back_kernel, (blocks, p.N * p.HV), v,
        chunks.read_key, chunks.query, chunks.write_key, chunks.decay, chunks.solve_back, chunks.attend,
        chunks.strengths, written, d_out, d_state, d_initial, dv, d_states, d_written, d_strengths, p.offsets,
        *d_out.stride()[:3], *dv.stride()[:3], *p.strides_of(d_state), *p.strides_of(d_initial), p.T, options.scale,
        config=config._replace(constants={**config.constants, **constants}),
    )  # fmt: skip

    def like_g(dtype: torch.dtype) -> Tensor:
        return torch.empty(g.shape, dtype=dtype, device=g.device)

    narrow = torch.float32 if p.groups > 1 else q.dtype  # of each value head, summed below
    dq, dk, dg = like_g(narrow), like_g(narrow), like_g(g.dtype)
    dq_hat, dk_hat = (like_g(torch.float32) if options.l2norm else None for _ in range(2))
    dbeta = torch.empty(beta.shape, dtype=beta.dtype, device=beta.device)
    d_rate = None if A_log is None else chunks.room(dtype=torch.float32, zero=True)
    d_bias = None if dt_bias is None else chunks.room(chunks.KP, dtype=torch.float32, zero=True)
    config = kernels.gradient_config(p.K, p.V, p.wide)
    _triton.launch(
        kernels.gradient_kernel, (chunks.slots, p.HV), v,
        *p.inputs(), d_out, states, d_states, written, d_written, chunks.strengths, d_strengths,
        dq_hat, dk_hat, dq, dk, dg, dbeta, d_rate, d_bias,
        *p.input_strides(), *d_out.stride()[:3], p.T, p.N, p.groups, chunks.KP, p.V, blocks, *p.numbers(),
        config=config._replace(constants={**config.constants, **p.input_constants()}),
    )  # fmt: skip
    if p.groups > 1:
        dq, dk = (x.unflatten(2, (p.H, p.groups)).sum(3).to(q.dtype) for x in (dq, dk))
    if d_initial is not None:
        d_initial = d_initial.to(initial_state.dtype)
    dA_log = None if d_rate is None else d_rate.sum(0).view(A_log.shape).to(A_log.dtype)
    ddt_bias = None if d_bias is None else d_bias.sum(0)[:, : p.K].reshape(dt_bias.shape).to(dt_bias.dtype)
    return [dq, dk, dv, dg, dbeta, d_initial, dA_log, ddt_bias]


@dispatch.register("fused_recurrent_kda", "triton", _refuses)
def fused_recurrent_kda(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options: Options):
    from . import triton_kernels as kernels

    p = Problem(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, options)
    out, final = p.results()
    config = kernels.recurrent_config(p.K, p.V)
    constants = {**p.input_constants(), "HAS_INITIAL": p.initial is not None}
    _triton.launch(
        kernels.recurrent_kernel, (-(-p.V // config.constants["BV"]), p.N * p.HV), v,
        p.q, p.k, p.v, p.g, p.beta, p.A_log, p.dt_bias, p.offsets, p.initial, out, final,
        *p.input_strides(), *p.v.stride()[:3], *out.stride()[:3], *p.strides_of(p.initial), *p.strides_of(final),
        p.T, p.groups, *p.numbers(),
        config=config._replace(constants={**config.constants, **constants}),
    )  # fmt: skip
    return out, final
