"""The step of Moonlight and Kimi K2 in float64, written from the papers; shares no code with the package."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HEADS, GROUPS, HEAD = 4, 2, 8  # of the small models (tiny.py)
NOPE, ROPE, VALUE, LATENT = 8, 4, 8, 16  # of the one with latent attention


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Moonlight, section 2.1: X = G / |G|, then `steps` times aX + b(XX')X + c(XX')^2 X."""
    x = g / (g.norm() + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x


def muon_update(gradient: Tensor, nesterov: bool = True) -> Tensor:
    """The first update of a matrix: momentum 0.95 from zero, 0.2 sqrt(max(n, m)) NS(...)."""
    momentum = gradient
    fed = gradient + 0.95 * momentum if nesterov else momentum
    return 0.2 * math.sqrt(max(gradient.shape)) * newton_schulz(fed)


def adamw_update(gradient: Tensor, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8) -> Tensor:
    """The first update of AdamW: its bias corrections cancel its moments' weights."""
    m, v = (1 - beta1) * gradient, (1 - beta2) * gradient**2
    return m / (1 - beta1) / ((v / (1 - beta2)).sqrt() + eps)


def matrices(name: str, rows: int, per_head: bool) -> list[list[int]]:
    """Which rows of a weight make each of its matrices."""
    if name.endswith("linear_qkv.weight"):
        heads = [[], [], []]  # q, k, v
        each = HEADS // GROUPS
        for group in range(GROUPS):
            start = group * (each + 2) * HEAD
            for n in range(each + 2):
                kind = 0 if n < each else n - each + 1
                heads[kind].append(list(range(start + n * HEAD, start + (n + 1) * HEAD)))
        return (
            [h for kind in heads for h in kind]
            if per_head
            else [[r for h in kind for r in h] for kind in heads]
        )
    if name.endswith(("linear_q_up_proj.weight", "linear_kv_up_proj.weight")):
        first, second = (NOPE, ROPE) if "q_up" in name else (NOPE, VALUE)
        parts: list[list[int]] = [[], []]
        for head in range(HEADS):
            start = head * (first + second)
            parts[0] += range(start, start + first)
            parts[1] += range(start + first, start + first + second)
        return parts
    if name.endswith("linear_kv_down_proj.weight"):
        return [list(range(LATENT)), list(range(LATENT, LATENT + ROPE))]
    if name.endswith("linear_fc1.weight"):
        return [list(range(rows // 2)), list(range(rows // 2, rows))]
    return [list(range(rows))]


def step(name: str, weight: Tensor, gradient: Tensor, lr: float, weight_decay: float, **kind: bool) -> Tensor:
    """The weight after one step from nothing, float64."""
    weight, gradient = weight.double(), gradient.double()
    if weight.dim() < 2 or "embedding" in name or "output_layer" in name:
        return weight - lr * (adamw_update(gradient) + weight_decay * weight)
    update = torch.zeros_like(weight)
    for rows in matrices(name, weight.shape[0], kind.get("per_head", False)):
        update[rows] = muon_update(gradient[rows], kind.get("nesterov", True))
    return weight - lr * (update + weight_decay * weight)
