"""Muon for matrices and AdamW for the rest, as Kimi models are trained, small enough for one process."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kimi_models.config import KimiLinearConfig
from kimi_models.names import Weight, weight_table
from kimi_models.weights import param_slice

# Newton-Schulz quintic of Muon: slopes steeply at 0, so five steps bring singular values near 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_STEPS = 5
# Moonlight report, 2.2: an orthogonal update times 0.2 * sqrt(max(rows, columns)) has the size of AdamW's.
_MATCH_ADAMW = 0.2
# Vectors in all but shape: AdamW keeps them.
_NOT_MATRICES = (
    "embed_tokens.weight",
    "lm_head.weight",
    "gate.weight",
    "b_proj.weight",
    "_conv1d.weight",
    "_res_proj.weight",
)
# Of those, the tables with a row for each token of the vocabulary.
_TABLES = ("embed_tokens.weight", "lm_head.weight")


@dataclass
class _Matrices:
    """Views of all matrices of one shape, updated together."""

    masters: list[Tensor] = field(default_factory=list)
    sources: list[tuple[nn.Parameter, Weight]] = field(default_factory=list)
    momentum: Tensor | None = None


class MuonAdamW:
    """Muon on the matrices inside the layers, AdamW on everything else.

    AdamW's learning rate is Muon's times `table_scale` for embeddings and head, and times `vector_scale` for the
    rest: a router's row or an AttnRes query meets every channel at once, so that steps of the same size
    everywhere add up, and drive sigmoid and softmax into their flat ends.

    Published tensors that share one parameter here (q, k, v; gate, up; the experts) are orthogonalised one by
    one, as if stored apart. What is optimised are float32 copies, so the model itself may be in bfloat16.
    """

    def __init__(
        self,
        model: nn.Module,
        config: KimiLinearConfig,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        table_scale: float = 3.0,
        vector_scale: float = 0.2,
    ) -> None:
        self.weight_decay, self.momentum = weight_decay, momentum
        self._params = dict(model.named_parameters())
        self._masters = {n: p.detach().float().clone() for n, p in self._params.items()}
        self._groups: dict[tuple[int, ...], _Matrices] = defaultdict(_Matrices)
        matrices = set()
        for name, w in weight_table(config).items():
            if w.param not in self._params or len(w.shape) != 2 or name.endswith(_NOT_MATRICES):
                continue
            group = self._groups[w.shape]
            group.masters.append(param_slice(self._masters, w))
            group.sources.append((self._params[w.param], w))
            matrices.add(w.param)
        self._rest = [n for n in self._params if n not in matrices]
        groups = []
        for names, scale in (
            ([n for n in self._rest if n.endswith(_TABLES)], table_scale),
            ([n for n in self._rest if not n.endswith(_TABLES)], vector_scale),
        ):
            for decay, many in ((weight_decay, True), (0.0, False)):
                params = [self._masters[n] for n in names if (self._params[n].ndim > 1) == many]
                groups.append({"params": params, "weight_decay": decay, "scale": scale})
        self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-10)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with learning rate `lr` from the gradients, which are then cleared."""
        for name in self._rest:
            grad = self._params[name].grad
            self._masters[name].grad = None if grad is None else grad.float()
        for group in self._adamw.param_groups:
            group["lr"] = lr * group["scale"]
        self._adamw.step()
        for shape, matrices in self._groups.items():
            grads = torch.stack([_gradient(p, w) for p, w in matrices.sources]).float()
            if matrices.momentum is None:
                matrices.momentum = torch.zeros_like(grads)
            matrices.momentum.lerp_(grads, 1 - self.momentum)
            updates = orthogonalise(grads.lerp(matrices.momentum, self.momentum))
            size = _MATCH_ADAMW * math.sqrt(max(shape))
            for master, update in zip(matrices.masters, updates.unbind()):
                master.mul_(1 - lr * self.weight_decay).sub_(update, alpha=lr * size)
        for name, p in self._params.items():
            p.copy_(self._masters[name])
            p.grad = None


def orthogonalise(matrices: Tensor) -> Tensor:
    """[N, R, C] -> about the orthogonal polar factor of each, by five Newton-Schulz steps in bfloat16."""
    a, b, c = _QUINTIC
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def _gradient(p: nn.Parameter, w: Weight) -> Tensor:
    assert p.grad is not None
    return param_slice({w.param: p.grad}, w)
