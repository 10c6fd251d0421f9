"""The custom ops of linear maps: what torch.compile sees."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from .._library import custom_op
from . import cpu, reference  # noqa: F401  (register the backends)


@custom_op("kimi::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor) -> Tensor:
    return dispatch.run("linear", x.device, x, weight)


@linear.register_fake
def _(x, weight):
    return x.new_empty((x.shape[0], weight.shape[0]))


@custom_op("kimi::batched_linear", mutates_args=())
def batched_linear(x: Tensor, weight: Tensor) -> Tensor:
    return dispatch.run("batched_linear", x.device, x, weight)


@batched_linear.register_fake
def _(x, weight):
    return x.new_empty((x.shape[0], x.shape[1], weight.shape[1]))
