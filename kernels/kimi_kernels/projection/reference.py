"""Linear maps as torch computes them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch


@dispatch.register("linear", "reference")
def linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


@dispatch.register("batched_linear", "reference")
def batched_linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x, weight.transpose(1, 2))
