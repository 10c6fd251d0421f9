"""Which weights of a Megatron model Muon takes, and which matrices a fused weight consists of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from . import splits
from .splits import Split

Build = Callable[[int, int], Split]


@dataclass(frozen=True, eq=False)
class MuonWeight:
    """A weight that Muon updates.

    Args:
        name: in the model, without the names of wrappers.
        parameter: the model's parameter, [n, m] on this tensor-parallel rank.
        layout: its matrices when it is whole over the tensor-parallel group; None: it is one matrix.
        tensor_dim: the dimension cut over the tensor-parallel group, None where each rank has all of it.
        expert: it belongs to a routed expert, whose groups are its own.
    """

    name: str
    parameter: nn.Parameter
    layout: Split | None
    tensor_dim: int | None
    expert: bool


def plain_name(name: str) -> str:
    """`name` without the ``module.`` of Megatron's wrappers."""
    return re.sub(r"^(module\.)+", "", name)


def is_expert(parameter: nn.Parameter) -> bool:
    """It is cut over expert-parallel ranks; Megatron marks those so."""
    return not getattr(parameter, "allreduce", True)


def takes_adamw(name: str, parameter: nn.Parameter, patterns: Sequence[str]) -> bool:
    """Embeddings, the output head, anything that is no matrix, and what `patterns` name."""
    return (
        parameter.dim() != 2
        or getattr(parameter, "is_embedding_or_output_parameter", False)
        or any(part in ("embedding", "position_embeddings", "output_layer") for part in name.split("."))
        or _named(name, patterns)
    )


def _named(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def muon_weights(
    model: nn.Module, patterns: Sequence[str], per_head: bool, tensor_size: int, expert_tensor_size: int
) -> list[MuonWeight]:
    """The weights of `model` that Muon updates, in the model's order.

    Raises:
        ValueError: a fused weight whose matrices cannot be told apart when it is cut over so many ranks.
    """
    builders = {
        plain_name(f"{path}.{child}"): build
        for path, module in model.named_modules()
        for child, build in _fused_weights(module, per_head)
    }
    found, seen = [], set()
    for wrapped_name, parameter in model.named_parameters():
        name = plain_name(wrapped_name)
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        if takes_adamw(name, parameter, patterns):
            if parameter.dim() == 3 and "experts" in name.split(".") and not _named(name, patterns):
                raise ValueError(
                    f"{name} {tuple(parameter.shape)} holds several experts in one weight, which is not taken apart: "
                    f"use one weight an expert, or leave it to AdamW with --muonclip-adamw '{name}'"
                )
            continue
        seen.add(id(parameter))
        expert = is_expert(parameter)
        size = expert_tensor_size if expert else tensor_size
        dim = _tensor_dim(parameter, size)
        rows, columns = (length * (size if axis == dim else 1) for axis, length in enumerate(parameter.shape))
        layout = None
        if name in builders:
            try:
                layout = builders[name](rows, columns)
                if layout.shape != (rows, columns):
                    raise ValueError(f"its shape is {(rows, columns)}, that of its parts {layout.shape}")
                layout = layout if dim is None else layout.gathered(size, dim)
            except ValueError as error:
                raise ValueError(
                    f"{name} cannot be taken apart ({error}): leave it to AdamW with --muonclip-adamw '{name}'"
                ) from None
        found.append(MuonWeight(name, parameter, layout, dim, expert))
    return found


def _tensor_dim(parameter: nn.Parameter, size: int) -> int | None:
    dim = getattr(parameter, "partition_dim", -1)
    # Megatron may mark weights of experts as not tensor-parallel although they are cut
    cut = getattr(parameter, "tensor_model_parallel", False) or is_expert(parameter)
    return dim if size > 1 and cut and dim in (0, 1) else None


def _fused_weights(module: nn.Module, per_head: bool) -> Iterator[tuple[str, Build]]:
    """(name of a weight in `module`, its layout for a whole shape [n, m]) of each fused weight."""
    config: Any = getattr(module, "config", None)
    if config is None:
        return
    if hasattr(module, "linear_qkv"):
        heads, gate = config.num_attention_heads, getattr(config, "attention_output_gate", False)
        groups = config.num_query_groups or heads
        yield (
            "linear_qkv.weight",
            lambda _, m: splits.fused_qkv(groups, heads, config.kv_channels, m, gate, per_head),
        )
    if hasattr(module, "linear_kv_up_proj"):
        yield from _latent_weights(config, per_head)
    if hasattr(module, "linear_fc1") and config.gated_linear_unit:
        for name, _ in module.linear_fc1.named_parameters(recurse=False):
            if re.fullmatch(
                r"weight\d*", name
            ):  # Transformer Engine's grouped layer has weight0, weight1, ...
                yield f"linear_fc1.{name}", lambda n, m: splits.stacked({"gate": n // 2, "up": n // 2}, m)
    if hasattr(module, "weight1") and hasattr(module, "num_local_experts"):
        experts, gated = module.num_local_experts, config.gated_linear_unit
        yield (
            "weight1",
            lambda n, m: splits.grouped_fc1(experts, n, m // (experts * (2 if gated else 1)), gated),
        )
        yield "weight2", lambda n, m: splits.grouped_fc2(experts, n // experts, m)
    if hasattr(module, "in_proj") and hasattr(module, "qk_dim") and hasattr(module, "num_value_heads"):
        values = module.num_value_heads
        rows = {"q": module.qk_dim, "k": module.qk_dim, "v": module.v_dim, "gate": module.v_dim}
        rows |= {"beta": values, "alpha": values}
        yield "in_proj.weight", lambda _, m: splits.stacked(rows, m)


def _latent_weights(config: Any, per_head: bool) -> Iterator[tuple[str, Build]]:
    heads, nope, rope = config.num_attention_heads, config.qk_head_dim, config.qk_pos_emb_head_dim
    for name in ("linear_q_proj.weight", "linear_q_up_proj.weight"):
        yield name, lambda _, m: splits.mla_query(heads, nope, rope, m, per_head)
    yield (
        "linear_kv_up_proj.weight",
        lambda _, m: splits.mla_key_value(heads, nope, config.v_head_dim, m, per_head),
    )
    # Each rank has its share of the rows as they stand, whatever they mean, and gathers the whole output.
    down = {"latent": config.kv_lora_rank, "k_rope": rope}
    yield "linear_kv_down_proj.weight", lambda _, m: replace(splits.stacked(down, m), shards="blocks")
    fused = {"q": config.q_lora_rank or 0, **down}
    yield "linear_qkv_down_proj.weight", lambda _, m: replace(splits.stacked(fused, m), shards="blocks")
