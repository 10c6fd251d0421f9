"""The custom op of Newton-Schulz: what torch.compile sees."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .._library import custom_op
from . import cpu, reference, triton  # noqa: F401  (register the backends)


@custom_op("kimi::newton_schulz", mutates_args=())
def newton_schulz(x: Tensor, coefficients: list[float], eps: float, dtype: torch.dtype) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return dispatch.run("newton_schulz", x.device, x, coefficients, eps, dtype)


@newton_schulz.register_fake
def _(x, coefficients, eps, dtype):
    return x.new_empty(x.shape)
