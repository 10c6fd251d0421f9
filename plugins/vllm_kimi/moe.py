"""Feed-forward layers: the dense MLP, and routed experts beside shared ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from kimi_kernels import moe_experts
from kimi_models import KimiLinearConfig
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import ReplicatedLinear, RowParallelLinear


class KimiMLP(nn.Module):
    """SwiGLU, its width split over tensor-parallel ranks."""

    def __init__(self, hidden_size: int, width: int, prefix: str, reduce_results: bool = True) -> None:
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
            reduce_results=reduce_results,
            prefix=f"{prefix}.down_proj",
            return_bias=False,
        )
        self.act = SiluAndMul()

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
    computed in float32.
    """

    def __init__(self, config: KimiLinearConfig, prefix: str) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_token
        self.groups = config.num_expert_group
        self.topk_group = config.topk_group
        self.renormalize = config.moe_renormalize
        self.factor = config.routed_scaling_factor
        self.tp_size = get_tensor_model_parallel_world_size()
        local = config.moe_intermediate_size // self.tp_size
        self.local = local
        experts, hidden = config.num_experts, config.hidden_size
        self.gate = nn.Parameter(torch.empty(experts, hidden, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(experts, dtype=torch.float32), requires_grad=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * local, hidden), requires_grad=False)
        self.down = nn.Parameter(torch.empty(experts, hidden, local), requires_grad=False)
        self.shared_experts = (
            KimiMLP(
                hidden,
                config.moe_intermediate_size * config.num_shared_experts,
                f"{prefix}.shared_experts",
                reduce_results=False,
            )
            if config.num_shared_experts
            else None
        )

    def places(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(published name below the layer, local tensor) of every weight."""
        yield "gate.weight", self.gate.data
        yield "gate.e_score_correction_bias", self.bias.data
        for e in range(self.gate_up.shape[0]):
            yield f"experts.{e}.w1.weight", self.gate_up.data[e, : self.local]
            yield f"experts.{e}.w3.weight", self.gate_up.data[e, self.local :]
            yield f"experts.{e}.w2.weight", self.down.data[e]
        if self.shared_experts is not None:
            for name, place in self.shared_experts.places():
                yield f"shared_experts.{name}", place

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (float32) and experts of each token, [tokens, top_k] both."""
        scores = F.linear(x.float(), self.gate).sigmoid()
        choice = scores + self.bias
        if self.groups > 1:
            grouped = choice.unflatten(-1, (self.groups, -1))
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.topk_group, dim=-1).indices
            kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
            choice = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)
        experts = choice.topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, experts)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.factor, experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, experts = self.route(x)
        out = moe_experts(x, self.gate_up, self.down, experts, weights)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return tensor_model_parallel_all_reduce(out) if self.tp_size > 1 else out
