"""Kernels shared by trainer and servers: every public name is importable from here, loaded on first use."""

from __future__ import annotations

import importlib
from typing import Any

# The folders attnres and projection: a module must not share its name with a function exported here.
_MODULE_OF = {
    "chunk_kda": "kda",
    "chunk_kda_states": "kda",
    "fused_recurrent_kda": "kda",
    "kda_gate": "kda",
    "kda_prefill": "kda",
    "kda_decode": "kda",
    "causal_conv1d": "conv",
    "rmsnorm_gated": "norm",
    "attn_res": "attnres",
    "attn_res_phase1": "attnres",
    "attn_res_merge": "attnres",
    "attn_res_step": "attnres",
    "mla_paged_attention": "mla",
    "moe_experts": "moe",
    "moe_route": "moe",
    "KdaDecodeLayer": "layers",
    "MlaLayer": "layers",
    "MoeLayer": "layers",
    "linear": "projection",
    "batched_linear": "projection",
    "interpolate_pos_embed": "vision",
    "merge_patches": "vision",
    "rope_2d": "vision",
    "rope_2d_": "vision",
    "sincos_time_embed": "vision",
    "newton_schulz": "muon",
    "qk_max_logits": "max_logit",
    "backend_report": "dispatch",
    "BackendError": "dispatch",
    "NativeLibraryError": "native_files",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'kimi_kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
