"""A feed-forward layer of routed and shared experts; a dense one is a shared expert alone."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import _native
from ..moe import moe_experts, moe_route
from ._layout import MoeWeights
from ._prepared import check_hidden, native_refusal


class MoeLayer:
    """`moe_experts` with the choice of `moe_route`, or a dense SwiGLU layer.

    Args:
        gate: [E, D] float32. bias: [E] float32. The router; None: no routed experts.
        w13: [E + S, 2 I, D]. w2: [E + S, D, I]. Routed experts, then S shared ones that every token has with weight 1.
        top_k, num_groups, topk_groups, renormalize, factor: as for `moe_route`.

    Weights may change their values, not their places.
    """

    def __init__(
        self,
        gate: Tensor | None,
        bias: Tensor | None,
        w13: Tensor,
        w2: Tensor,
        *,
        top_k: int = 0,
        num_groups: int = 1,
        topk_groups: int = 1,
        renormalize: bool = True,
        factor: float = 1.0,
    ) -> None:
        if gate is None or bias is None:
            gate, bias = w13.new_empty((0, w13.shape[2]), dtype=torch.float32), torch.empty(0)
        self.gate, self.bias, self.w13, self.w2 = gate, bias, w13, w2
        self.shared = w13.shape[0] - gate.shape[0]
        self.options = (top_k, num_groups, topk_groups, renormalize, factor, self.shared)
        # The single ops check what they are given: a bad weight is named now, by a call without tokens.
        nothing = w13.new_empty((0, w13.shape[2]))
        moe_experts(nothing, w13, w2, *self._choose(nothing))
        self.refusal = native_refusal(w13, w2) or native_refusal(gate, bias)
        if self.refusal is None and num_groups > 1 and gate.shape[0] // num_groups < 2:
            self.refusal = "needs two experts in a group"
        if self.refusal is None:
            self._prepare()

    def _choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.gate.shape[0]:
            return moe_route(x, self.gate, self.bias, *self.options)
        ids = torch.arange(self.shared, dtype=torch.int32, device=x.device).expand(x.shape[0], -1)
        return ids, torch.ones(ids.shape, device=x.device)

    def _prepare(self) -> None:
        top_k, groups, kept, renormalize, factor, shared = self.options
        self._weights = w = MoeWeights()
        for name in ("gate", "bias", "w13", "w2"):
            setattr(w, name, getattr(self, name).data_ptr())
        w.E, w.D, w.I = self.gate.shape[0], self.w2.shape[1], self.w2.shape[2]
        w.k, w.groups, w.kept, w.shared, w.renormalize = top_k, groups, kept, shared, int(renormalize)
        w.dtype, w.threads, w.factor = _native.DTYPE_CODES[self.w13.dtype], torch.get_num_threads(), factor
        self._address = ctypes.addressof(w)
        self._call = _native.kernel("moe_layer", "pppi")

    def __call__(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]. A token gets the same bits alone or in a batch."""
        check_hidden(x, self.w13)
        if self.refusal is not None:
            return moe_experts(x, self.w13, self.w2, *self._choose(x))
        x = x.contiguous()
        out = torch.empty_like(x)
        self._call(self._address, x.data_ptr(), out.data_ptr(), x.shape[0])
        return out
