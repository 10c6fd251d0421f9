"""Muon for matrices and AdamW for the rest, as Kimi models are trained, small enough for one process."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kimi_models.config import KimiLinearConfig
from kimi_models.names import weight_table
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


@dataclass
class _Matrices:
    """Views of all matrices of one shape, updated together."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[tuple[nn.Parameter, int | None, tuple[int, int] | None]] = field(default_factory=list)
    momentum: Tensor | None = None


class MuonAdamW:
    """Muon on the matrices inside the layers, AdamW on embeddings, head, routers, norms, gates and queries.

    One learning rate serves both. Published tensors that share one parameter here (q, k, v; gate, up; the
    experts) are orthogonalised one by one, as if stored apart.
    """

    def __init__(
        self,
        model: nn.Module,
        config: KimiLinearConfig,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        params = dict(model.named_parameters())
        self._groups: dict[tuple[int, ...], _Matrices] = defaultdict(_Matrices)
        taken = set()
        for name, w in weight_table(config).items():
            if w.param not in params or len(w.shape) != 2 or name.endswith(_NOT_MATRICES):
                continue
            group = self._groups[w.shape]
            group.params.append(param_slice(params, w).detach())
            group.grads.append((params[w.param], w.expert, w.rows))
            taken.add(w.param)
        rest = [p for n, p in params.items() if n not in taken]
        self._adamw = torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
                {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=lr,
            betas=betas,
            eps=1e-10,
        )

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with learning rate `lr` from the gradients, which are then cleared."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        for shape, matrices in self._groups.items():
            grad = torch.stack([_slice(p.grad, expert, rows) for p, expert, rows in matrices.grads])
            if matrices.momentum is None:
                matrices.momentum = torch.zeros_like(grad)
            matrices.momentum.lerp_(grad, 1 - self.momentum)
            update = orthogonalise(grad.lerp(matrices.momentum, self.momentum))
            size = _MATCH_ADAMW * math.sqrt(max(shape))
            for p, u in zip(matrices.params, update.unbind()):
                p.mul_(1 - lr * self.weight_decay).sub_(u, alpha=lr * size)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Clears every gradient."""
        self._adamw.zero_grad()
        for matrices in self._groups.values():
            for p, _, _ in matrices.grads:
                p.grad = None


def orthogonalise(matrices: Tensor) -> Tensor:
    """[N, R, C] -> about the orthogonal polar factor of each, by five Newton-Schulz steps in float32."""
    a, b, c = _QUINTIC
    x = matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def _slice(grad: Tensor | None, expert: int | None, rows: tuple[int, int] | None) -> Tensor:
    assert grad is not None
    if expert is not None:
        grad = grad[expert]
    return grad if rows is None else grad[rows[0] : rows[1]]
