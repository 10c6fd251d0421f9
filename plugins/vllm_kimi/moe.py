"""Feed-forward layers: the dense MLP, and routed experts beside shared ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import ReplicatedLinear, RowParallelLinear

from kimi_kernels import moe_experts, moe_route
from kimi_models import KimiLinearConfig
from vllm_kimi.norm import KimiSiluAndMul


class KimiMLP(nn.Module):
    """SwiGLU, its width split over tensor-parallel ranks."""

    def __init__(self, hidden_size: int, width: int, prefix: str) -> None:
        super().__init__()
        local = width // get_tensor_model_parallel_world_size()
        self.local = local
        self.gate_up_proj = ReplicatedLinear(
            hidden_size, 2 * local, bias=False, prefix=f"{prefix}.gate_up_proj", return_bias=False
        )
        self.down_proj = RowParallelLinear(
            width,
            hidden_size,
            bias=False,
            prefix=f"{prefix}.down_proj",
            return_bias=False,
        )
        self.act = KimiSiluAndMul()

    def places(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(published name below the layer, local tensor) of every weight."""
        gate, up = self.gate_up_proj.weight.data.split(self.local)
        yield "gate_proj.weight", gate
        yield "up_proj.weight", up
        yield "down_proj.weight", self.down_proj.weight.data

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_up_proj(x)))


class KimiMoE(nn.Module):
    """Sigmoid-routed experts with bias-corrected choice, and shared experts that every token uses.

    Every expert's width is split over tensor-parallel ranks; the router is held by each rank whole. Scores are
    computed in float32. A shared MLP n experts wide is n more experts, which every token has with weight 1: one
    kernel call computes both.
    """

    def __init__(self, config: KimiLinearConfig, prefix: str) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_token
        self.groups = config.num_expert_group
        self.topk_group = config.topk_group
        self.renormalize = config.moe_renormalize
        self.factor = config.routed_scaling_factor
        self.tp_size = get_tensor_model_parallel_world_size()
        self.local = config.moe_intermediate_size // self.tp_size
        self.routed, self.shared = config.num_experts, config.num_shared_experts
        hidden, experts = config.hidden_size, self.routed + self.shared
        self.gate = nn.Parameter(torch.empty(self.routed, hidden, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(self.routed, dtype=torch.float32), requires_grad=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * self.local, hidden), requires_grad=False)
        self.down = nn.Parameter(torch.empty(experts, hidden, self.local), requires_grad=False)

    def places(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(published name below the layer, local tensor) of every weight."""
        yield "gate.weight", self.gate.data
        yield "gate.e_score_correction_bias", self.bias.data
        gate_up, down = self.gate_up.data, self.down.data
        for e in range(self.routed):
            yield f"experts.{e}.w1.weight", gate_up[e, : self.local]
            yield f"experts.{e}.w3.weight", gate_up[e, self.local :]
            yield f"experts.{e}.w2.weight", down[e]
        if self.shared:
            yield "shared_experts.gate_proj.weight", gate_up[self.routed :, : self.local]
            yield "shared_experts.up_proj.weight", gate_up[self.routed :, self.local :]
            yield "shared_experts.down_proj.weight", down[self.routed :].transpose(0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        experts, weights = moe_route(
            x,
            self.gate,
            self.bias,
            self.top_k,
            self.groups,
            self.topk_group,
            self.renormalize,
            self.factor,
            self.shared,
        )
        out = moe_experts(x, self.gate_up, self.down, experts, weights)
        return tensor_model_parallel_all_reduce(out) if self.tp_size > 1 else out
