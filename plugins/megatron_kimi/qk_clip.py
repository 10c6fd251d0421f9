"""QK-Clip: heads whose largest logit passed tau have their query and key rows shrunk (Kimi K2, section 2.1).

Pure functions: largest logits -> factors of heads -> factors of rows (`splits.row_factors`) -> scaled weights or
flat shards of them. They hold for logits that are bilinear in the weights: a norm between projection and product
(qk-layernorm on the heads) undoes the scaling.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

GqaRule = Literal["group", "head"]
GQA_RULES: tuple[GqaRule, ...] = ("group", "head")


def clip_gammas(max_logits: Tensor, tau: float, layer: str) -> Tensor:
    """[H] min(1, tau / S) of each head: 1 for S <= tau, whatever its sign.

    Args:
        max_logits: [H], the largest scaled logit of each head in this step, over all its tokens and ranks.
        tau: the threshold, positive.
        layer: name for errors.

    Raises:
        ValueError: a logit is NaN or infinite, or was never recorded (-inf).
    """
    bad = (~max_logits.isfinite()).nonzero().flatten()
    if bad.numel():
        head = int(bad[0])
        value = max_logits[head].item()
        if value == float("-inf"):
            raise ValueError(
                f"no attention logit was recorded for {layer}, head {head}: its attention must report the largest "
                "logits of every training step"
            )
        raise ValueError(
            f"the largest attention logit of {layer}, head {head} is {value}: the forward pass overflowed"
        )
    return torch.where(max_logits > tau, tau / max_logits, 1.0)


def attention_factors(
    max_logits: Tensor,
    tau: float,
    layer: str,
    groups: int | None = None,
    alpha: float = 0.5,
    rule: GqaRule = "group",
) -> dict[str, Tensor]:
    """Factors of the heads of multi-head or grouped-query attention: {"q": [H], "k": [groups]}.

    MHA (groups None or H): q by gamma^alpha, k by gamma^(1 - alpha). GQA: a key is shared by H / groups heads.
    rule "group": the group's largest logit clips all its heads and the key, as Megatron does. rule "head": the
    key stays, each query head takes its own gamma, so that only heads over tau change.
    """
    heads = max_logits.shape[0]
    groups = heads if groups is None else groups
    if groups < 1 or heads % groups:
        raise ValueError(f"{layer}: {heads} heads are not a multiple of the {groups} query groups")
    if rule not in GQA_RULES:
        raise ValueError(f"rule must be one of {', '.join(GQA_RULES)}, got {rule!r}")
    gamma = clip_gammas(max_logits, tau, layer)
    if groups < heads and rule == "head":
        return {"q": gamma, "k": torch.ones_like(gamma[:groups])}
    gamma = gamma.view(groups, -1).amin(1)
    return {"q": (gamma**alpha).repeat_interleave(heads // groups), "k": gamma ** (1 - alpha)}


def latent_factors(max_logits: Tensor, tau: float, layer: str, alpha: float = 0.5) -> dict[str, Tensor]:
    """Factors of the heads of MLA: {"q_nope", "q_rope", "k_nope"}, each [H]. The shared rotary key stays."""
    gamma = clip_gammas(max_logits, tau, layer)
    return {"q_nope": gamma**alpha, "q_rope": gamma, "k_nope": gamma ** (1 - alpha)}


def scale_rows_(weight: Tensor, factors: Tensor) -> None:
    """weight[i] *= factors[i] in place; weight [rows, ...] (a matrix, or a bias), factors [rows]."""
    if weight.shape[:1] != factors.shape:
        raise ValueError(f"weight must have {factors.shape[0]} rows, one a factor, got {tuple(weight.shape)}")
    weight.mul_(factors.to(weight.device).view(-1, *[1] * (weight.dim() - 1)))


def scale_flat_shard_(shard: Tensor, start: int, factors: Tensor, columns: int) -> None:
    """Scale elements [start, start + len(shard)) of a flattened weight [rows, columns] by their rows' factors.

    What a rank of the distributed optimizer owns: any range, which may begin and end inside a row.
    """
    end = start + shard.numel()
    if shard.dim() != 1 or start < 0 or end > factors.shape[0] * columns:
        raise ValueError(
            f"shard must be 1-D within the {factors.shape[0] * columns} elements of the weight, "
            f"got shape {tuple(shard.shape)} at {start}"
        )
    factors = factors.to(shard.device)
    first = min(-(-start // columns) * columns, end)  # where the first whole row begins
    last = max(end // columns * columns, first)  # where the last whole row ends
    if first > start:
        shard[: first - start].mul_(factors[start // columns])
    if last > first:
        rows = shard[first - start : last - start].view(-1, columns)
        rows.mul_(factors[first // columns : last // columns, None])
    if end > last:
        shard[last - start :].mul_(factors[last // columns])
