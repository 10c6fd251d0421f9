"""vLLM's norm, on a CPU by its C++ kernels.

In eager mode vLLM computes it from single torch operations there; at a decode step that costs several times the
arithmetic.
"""

from __future__ import annotations

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.layernorm import RMSNorm


class KimiRMSNorm(RMSNorm):
    """RMSNorm(x) * weight; with a residual, (RMSNorm(x + residual) * weight, x + residual), both in place."""

    def forward_cpu(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if residual is not None:
            ops.fused_add_rms_norm(x, residual, self.weight, self.variance_epsilon)
            return x, residual
        out = torch.empty_like(x)
        ops.rms_norm(out, x, self.weight, self.variance_epsilon)
        return out
