"""The C structs of csrc/kda/args.h, field by field."""

from __future__ import annotations

import ctypes
import struct

_p, _i, _f = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class Tokens(ctypes.Structure):
    _fields_ = [("data", _p), ("dtype", _i), ("stride_b", _i), ("stride_t", _i), ("stride_h", _i)]


class States(ctypes.Structure):
    _fields_ = [("data", _p), ("stride_n", _i), ("stride_h", _i), ("stride_k", _i), ("stride_v", _i)]


class KdaArgs(ctypes.Structure):
    _fields_ = [
        *((name, Tokens) for name in ("q", "k", "v", "g", "beta", "o")),
        *((name, States) for name in ("initial", "final")),
        *((name, _p) for name in ("cu_seqlens", "A_log", "dt_bias")),
        *((name, _i) for name in ("N", "T", "H", "HV", "K", "V")),
        *((name, _i) for name in ("l2norm", "gate", "beta_sigmoid", "num_threads")),
        *((name, _f) for name in ("scale", "lower_bound", "beta_scale")),
    ]


class KdaGrads(ctypes.Structure):
    _fields_ = [
        ("d_o", Tokens),
        ("d_final", States),
        ("d_initial", States),
        *((name, _p) for name in ("dq", "dk", "dv", "dg", "dbeta", "dA_log", "ddt_bias")),
    ]


class KdaLayer(ctypes.Structure):
    _fields_ = [
        ("conv_weight", _p),
        *((name, _i) for name in ("conv_weight_dtype", "conv_width")),
        ("conv_state", _p),
        *((f"conv_{name}", _i) for name in ("state_dtype", "stride_slot", "stride_entry", "stride_channel")),
        ("gate", Tokens),
        ("norm_weight", _p),
        ("norm_eps", _f),
        ("state_indices", _p),
        ("indices_per_sequence", _i),
        *((name, _p) for name in ("has_initial", "num_accepted", "cu_seqlens")),
        *((name, _i) for name in ("slots", "problem", "problem_at")),
    ]


def packer(structure: type[ctypes.Structure]) -> struct.Struct:
    """Packs the fields of `structure`, those of nested structures in their place; a null pointer is 0.

    Several times faster than filling the structure, which counts in a call per layer and token.
    """

    def codes(kind: type) -> str:
        if issubclass(kind, ctypes.Structure):
            return "".join(codes(field[1]) for field in kind._fields_)
        return "d" if kind is _f else "q"

    return struct.Struct(codes(structure))
