"""Muon as Kimi K2 runs it (arXiv 2507.20534, algorithm 1; Moonlight, 2502.16982, section 2), in plain torch.

Options, the maths on tensors wherever they live (`feed_`, `orthogonal_updates`), and an optimizer for one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_kernels import newton_schulz
from kimi_kernels.muon import schulz_triples

from .qk_clip import GQA_RULES, GqaRule
from .splits import Split, merge, split

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class MuonClipConfig:
    """Options of MuonClip; the defaults are those of Kimi K2. Each is the launch flag --muonclip-NAME.

    momentum: M = momentum * M + G.
    nesterov: orthogonalise momentum * M + G instead of M.
    steps: Newton-Schulz iterations.
    coefficients: a name in kimi_kernels.muon.COEFFICIENTS.
    update_rms: an orthogonal update [n, m] is multiplied by update_rms * sqrt(max(n, m)), which gives it about
        this root mean square per entry, AdamW's; learning rates tuned for AdamW carry over.
    weight_decay: decoupled, times the learning rate.
    eps: added to the norm that Newton-Schulz divides by.
    dtype: arithmetic of Newton-Schulz: "bfloat16", "float32" or "float64".
    per_head: orthogonalise q, k and v head by head.
    tau: largest attention logit that QK-Clip lets pass; infinity turns clipping off.
    alpha: the query's share of a clip, gamma^alpha; the key takes gamma^(1 - alpha).
    gqa_rule: "group" or "head", see `qk_clip.attention_factors`.
    """

    momentum: float = 0.95
    nesterov: bool = True
    steps: int = 5
    coefficients: str = "moonlight"
    update_rms: float = 0.2
    weight_decay: float = 0.1
    eps: float = 1e-7
    dtype: str = "bfloat16"
    per_head: bool = False
    tau: float = 100.0
    alpha: float = 0.5
    gqa_rule: GqaRule = "group"

    def __post_init__(self) -> None:
        self._require("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        self._require("update_rms", 0 < self.update_rms < math.inf, "positive")
        self._require("weight_decay", 0 <= self.weight_decay < math.inf, "zero or positive")
        self._require("eps", 0 <= self.eps < math.inf, "zero or positive")
        self._require("tau", self.tau > 0, "positive (inf turns clipping off)")
        self._require("alpha", 0 <= self.alpha <= 1, "in [0, 1]")
        self._require("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        self._require("gqa_rule", self.gqa_rule in GQA_RULES, f"one of {', '.join(GQA_RULES)}")
        try:
            schulz_triples(self.coefficients, self.steps)
        except ValueError as error:
            raise ValueError(f"{error}: set {flag('coefficients')} and {flag('steps')}") from None

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {what}, got {getattr(self, name)!r}: set {flag(name)}")


def flag(name: str) -> str:
    """The launch flag of a field of MuonClipConfig."""
    return "--muonclip-" + name.replace("_", "-")


def feed_(momentum: Tensor, grad: Tensor, config: MuonClipConfig) -> Tensor:
    """Advance the momentum in place and return what is orthogonalised (the momentum itself without Nesterov).

    Elementwise: whole matrices and flat shards of them alike.
    """
    momentum.mul_(config.momentum).add_(grad)
    return grad.add(momentum, alpha=config.momentum) if config.nesterov else momentum


def orthogonal_updates(feeds: Sequence[Tensor], config: MuonClipConfig) -> list[Tensor]:
    """update_rms * sqrt(max(n, m)) * NS(feed) of each feed [..., n, m], in the feed's dtype.

    Matrices of one shape, or of that shape transposed, go through Newton-Schulz as one batch.
    """
    batches: dict[tuple[int, int, torch.dtype, torch.device], list[int]] = {}
    for i, feed in enumerate(feeds):
        wide = (min(feed.shape[-2:]), max(feed.shape[-2:]))
        batches.setdefault((*wide, feed.dtype, feed.device), []).append(i)
    out: list[Tensor] = [torch.empty(0)] * len(feeds)
    for (rows, columns, *_), members in batches.items():
        wide_feeds = [_wide(feeds[i]).reshape(-1, rows, columns) for i in members]
        updates = newton_schulz(
            wide_feeds[0] if len(wide_feeds) == 1 else torch.cat(wide_feeds),
            config.steps,
            config.coefficients,
            config.eps,
            DTYPES[config.dtype],
        ).mul_(config.update_rms * math.sqrt(columns))
        for i, update in zip(members, updates.split([len(f) for f in wide_feeds])):
            shape = feeds[i].shape
            tall = shape[-2] > shape[-1]
            out[i] = (update.mT if tall else update).reshape(shape)
    return out


def _wide(x: Tensor) -> Tensor:
    return x.mT if x.shape[-2] > x.shape[-1] else x


def split_updates(
    feeds: Sequence[Tensor], layouts: Sequence[Split | None], config: MuonClipConfig
) -> list[Tensor]:
    """`orthogonal_updates` of parameters, each split into its matrices first and merged again after.

    feeds[i] is a matrix with layouts[i] (None: one matrix), or a stack [N, n, m] of matrices without a layout.
    """
    parts = [{"": f} if s is None else split(f, s) for f, s in zip(feeds, layouts, strict=True)]
    flat = iter(orthogonal_updates([m for part in parts for m in part.values()], config))
    updated = [{name: next(flat) for name in part} for part in parts]
    return [u[""] if s is None else merge(u, s) for u, s in zip(updated, layouts)]


def apply_(weight: Tensor, update: Tensor, lr: float, weight_decay: float) -> None:
    """weight -= lr * (update + weight_decay * weight), in place; whole or a shard of both."""
    weight.mul_(1 - lr * weight_decay).sub_(update, alpha=lr)


class MuonClip(torch.optim.Optimizer):
    """Muon for matrices, AdamW for the rest, in one process. QK-Clip follows `step` (see `qk_clip`).

    Args:
        matrices: parameters [n, m], or stacks [N, n, m] of matrices, for Muon. Parameters or param groups.
        rest: parameters for AdamW: embeddings, head, norms, vectors.
        lr: learning rate of both; param groups may have their own.
        config: options of Muon; its weight decay is AdamW's too, unless a group has its own.
        layouts: how fused parameters split, by parameter.
        betas: of AdamW.
        adam_eps: of AdamW.

    Parameters must be float32 or float64: there are no master weights here.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor] | Iterable[dict[str, Any]],
        rest: Iterable[Tensor] | Iterable[dict[str, Any]] = (),
        lr: float = 1e-3,
        config: MuonClipConfig = MuonClipConfig(),
        layouts: Mapping[Tensor, Split] | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr must not be negative, got {lr}")
        self.config = config
        self._layouts = dict(layouts or {})
        groups = [{**g, "muon": True} for g in _groups(matrices)]
        groups += [{**g, "muon": False} for g in _groups(rest)]
        for group in groups:
            for p in group["params"]:
                _check(p, group["muon"], self._layouts.get(p))
        defaults = {"lr": lr, "weight_decay": config.weight_decay, "betas": betas, "eps": adam_eps}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update from the gradients; parameters without one are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            (self._muon if group["muon"] else self._adamw)(params, group)
        return loss

    def _muon(self, params: list[Tensor], group: dict[str, Any]) -> None:
        feeds = []
        for p in params:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            assert p.grad is not None
            feeds.append(feed_(state["momentum"], p.grad, self.config))
        updates = split_updates(feeds, [self._layouts.get(p) for p in params], self.config)
        for p, update in zip(params, updates):
            apply_(p, update, group["lr"], group["weight_decay"])

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            assert p.grad is not None
            state["step"] += 1
            state["exp_avg"].lerp_(p.grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            bias1, bias2 = (1 - beta ** state["step"] for beta in (beta1, beta2))
            size = (state["exp_avg_sq"] / bias2).sqrt_().add_(group["eps"])
            apply_(p, state["exp_avg"] / bias1 / size, group["lr"], group["weight_decay"])


def _groups(params: Iterable[Tensor] | Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    listed: list[Any] = list(params)
    if not listed:
        return []
    if not isinstance(listed[0], dict):
        return [{"params": listed}]
    return [
        {**g, "params": [g["params"]] if isinstance(g["params"], Tensor) else list(g["params"])}
        for g in listed
    ]


def _check(p: Tensor, muon: bool, layout: Split | None) -> None:
    if p.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"parameters must be float32 or float64, got {p.dtype}: keep float32 master weights")
    if muon and p.dim() not in (2, 3):
        raise ValueError(
            f"Muon takes matrices [n, m] or stacks of them, got {tuple(p.shape)}: pass it in rest"
        )
    if layout is not None and layout.shape != tuple(p.shape):
        raise ValueError(f"the layout of a parameter {tuple(p.shape)} has shape {layout.shape}")
