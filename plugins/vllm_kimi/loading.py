"""Strict loading: every published tensor once, with its shape and finite values, into its local piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from kimi_models import KimiLinearConfig
from kimi_models.names import Weight, canonical_name, weight_table

# Buffers of rotary embeddings that some old checkpoints carry; NoPE attention has no use for them.
_IGNORED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


# Where a published tensor goes: the local tensor that takes this rank's piece, or a function given the whole.
Place = torch.Tensor | Callable[[torch.Tensor], object]


class WeightError(ValueError):
    """A checkpoint that does not fit its config. The message names the tensor, what is wrong and the fix."""


def load_published(
    weights: Iterable[tuple[str, torch.Tensor]],
    places: Mapping[str, Place],
    config: KimiLinearConfig,
    tp_size: int,
    tp_rank: int,
) -> set[str]:
    """Copy published tensors into the pieces this rank holds and return the names that were used.

    Args:
        weights: (name, tensor) of a checkpoint, as published or as transformers writes them.
        places: where each published tensor held here goes; names of other pipeline stages are absent.
        config: the checkpoint's config; it decides which names and shapes there must be.
        tp_size: tensor-parallel size.
        tp_rank: this rank, from 0.

    Raises:
        WeightError: a tensor that is unknown, double, of another shape, quantised, not finite, or missing.
    """
    table = weight_table(config)
    seen: set[str] = set()
    for raw, tensor in weights:
        if raw.endswith(_IGNORED):
            continue
        name = canonical_name(raw, config)
        if name not in table:
            raise WeightError(f"{raw} has no place in this config: use the config.json the weights came with")
        if name in seen:
            raise WeightError(f"{name} is in the checkpoint twice: remove one of the two")
        seen.add(name)
        weight = table[name]
        _check(weight, tensor)
        place = places.get(name)
        if isinstance(place, torch.Tensor):
            piece = tensor.reshape(weight.shape)[weight.shard(tp_size, tp_rank)]
            place.copy_(piece.reshape(place.shape))
        elif place is not None:
            place(tensor)
    missing = [name for name in places if name not in seen]
    if missing:
        more = f", and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise WeightError(
            f"the checkpoint lacks {len(missing)} tensors the config asks for ({', '.join(missing[:4])}{more}): "
            "download it again, or use the config.json the weights came with"
        )
    return seen


def _check(weight: Weight, tensor: torch.Tensor) -> None:
    shape = tuple(tensor.shape)
    same = shape == weight.shape
    if not same and weight.name.endswith((".A_log", "_conv1d.weight")):
        # Stored with and without the dimensions of size 1, depending on who wrote the file.
        same = [n for n in shape if n != 1] == [n for n in weight.shape if n != 1]
    if not same:
        raise WeightError(
            f"{weight.name} has shape {list(shape)}, the config asks for {list(weight.shape)}: "
            "the weights belong to another config"
        )
    if not tensor.is_floating_point():
        raise WeightError(
            f"{weight.name} has dtype {tensor.dtype}: quantised weights are not read by this class; "
            "use the bfloat16 checkpoint"
        )
    if not tensor.is_meta and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise WeightError(f"{weight.name} has {bad} NaN or infinite values: the checkpoint is damaged; fetch it again")
