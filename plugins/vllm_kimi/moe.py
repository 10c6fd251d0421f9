"""Feed-forward layers: the dense MLP, and routed experts beside shared ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

from kimi_kernels import MoeLayer, linear
from kimi_models import KimiLinearConfig

# With more tokens than this a dense layer is faster as two matrix products of torch.
MOST_TOKENS = 128


class KimiMLP(nn.Module):
    """SwiGLU, its width split over tensor-parallel ranks."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.tp_size = get_tensor_model_parallel_world_size()
        self.local = width // self.tp_size
        self.gate_up = nn.Parameter(torch.empty(2 * self.local, hidden_size), requires_grad=False)
        self.down = nn.Parameter(torch.empty(hidden_size, self.local), requires_grad=False)
        self.layer: MoeLayer | None = None  # made at first use, on the device that the weights are on then

    def places(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(published name below the layer, local tensor) of every weight."""
        gate, up = self.gate_up.data.split(self.local)
        yield "gate_proj.weight", gate
        yield "up_proj.weight", up
        yield "down_proj.weight", self.down.data

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > MOST_TOKENS:
            gate, up = linear(x, self.gate_up).chunk(2, dim=-1)
            out = linear(F.silu(gate) * up, self.down)
        else:
            if self.layer is None:
                self.layer = MoeLayer(None, None, self.gate_up.unsqueeze(0), self.down.unsqueeze(0))
            out = self.layer(x)
        return tensor_model_parallel_all_reduce(out) if self.tp_size > 1 else out


class KimiMoE(nn.Module):
    """Sigmoid-routed experts with bias-corrected choice, and shared experts that every token uses.

    Every expert's width is split over tensor-parallel ranks; the router is held by each rank whole. Scores are
    computed in float32. A shared MLP n experts wide is n more experts, which every token has with weight 1: one
    kernel call computes both.
    """

    def __init__(self, config: KimiLinearConfig) -> None:
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
        self.layer: MoeLayer | None = None  # made at first use, on the device that the weights are on then

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
        if self.layer is None:
            self.layer = self._layer()
        out = self.layer(x)
        return tensor_model_parallel_all_reduce(out) if self.tp_size > 1 else out

    def _layer(self) -> MoeLayer:
        return MoeLayer(
            self.gate,
            self.bias,
            self.gate_up,
            self.down,
            top_k=self.top_k,
            num_groups=self.groups,
            topk_groups=self.topk_group,
            renormalize=self.renormalize,
            factor=self.factor,
        )
