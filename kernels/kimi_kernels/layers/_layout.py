"""The C structs of csrc/layers.h, field by field."""

from __future__ import annotations

import ctypes

_p, _i, _f = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class KdaWeights(ctypes.Structure):
    _fields_ = [
        *((name, _p) for name in ("in_proj", "gate_up", "o_proj")),
        *((name, _i) for name in ("D", "N", "rank", "O", "dtype")),
    ]


class MlaWeights(ctypes.Structure):
    _fields_ = [
        *((name, _p) for name in ("in_proj", "q_norm", "q_up", "latent_norm", "key_up", "value_up", "o_proj", "cache")),
        *((name, _i) for name in ("D", "H", "nope", "rope", "v", "rank", "q_rank", "O", "value_stride")),
        *((name, _i) for name in ("block_size", "block_stride", "row_stride", "dtype", "threads")),
        *((name, _f) for name in ("eps", "scale")),
    ]


class MoeWeights(ctypes.Structure):
    _fields_ = [
        *((name, _p) for name in ("gate", "bias", "w13", "w2")),
        *((name, _i) for name in ("E", "D", "I", "k", "groups", "kept", "shared", "renormalize", "dtype", "threads")),
        ("factor", _f),
    ]
