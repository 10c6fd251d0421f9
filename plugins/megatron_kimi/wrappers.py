"""Megatron's optimizer wrappers, with the little that MuonClip needs different. Imports megatron.core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import nn

from .attention import QkClip

_SECOND_MOMENT = "exp_avg_sq"


class MuonClipDistributedOptimizer(DistributedOptimizer):
    """Megatron's distributed optimizer (ZeRO-1) around `MuonClipInner`.

    Its checkpoint formats store the same tensors for every parameter of a buffer, so a matrix is saved with a second
    moment of zeros beside its momentum. It has none in memory.
    """

    def _get_main_param_and_optimizer_states(self, model_param: nn.Parameter) -> dict[str, Any]:
        tensors = super()._get_main_param_and_optimizer_states(model_param)
        tensors = dict(tensors)
        if _SECOND_MOMENT not in tensors:
            tensors[_SECOND_MOMENT] = torch.zeros_like(tensors["exp_avg"])
        return tensors

    def _set_main_param_and_optimizer_states(
        self, model_param: nn.Parameter, tensors: dict[str, Any]
    ) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        # the step is in the parameter groups: some formats leave it out here
        for name, target in {"param": main.detach(), **self.optimizer.state[main]}.items():
            if name != "step":
                target.copy_(tensors[name])


class MuonClipChain(ChainedOptimizer):
    """Megatron's chain of optimizers (dense and expert weights), with QK-Clip closing each step.

    `after_step(successful)` is called on every rank after each step.
    """

    def __init__(self, optimizers: list[Any], clip: QkClip | None) -> None:
        super().__init__(optimizers)
        self.clip = clip
        self.after_step: Callable[[bool], None] | None = None

    @torch.no_grad()
    def step(self) -> tuple[bool, float | None, int | None]:
        result = super().step()
        if self.clip is not None:
            self.clip.finish()
        if self.after_step is not None:
            self.after_step(bool(result[0]))
        return result
