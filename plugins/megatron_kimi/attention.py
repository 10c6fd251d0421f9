"""The largest attention logits of Megatron's layers, and the rows that QK-Clip scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kimi_kernels import qk_max_logits

from . import splits
from .optimizer import MuonClipConfig
from .qk_clip import attention_factors, latent_factors, scale_flat_shard_
from .splits import Split
from .weights import plain_name

OFF = "turn QK-Clip off with --muonclip-tau inf"


class LayerLogits(NamedTuple):
    """What one layer did in a step: its largest logit, and how many of its heads were over tau."""

    layer: str
    largest: float
    clipped: int
    heads: int


@dataclass(frozen=True)
class Slice:
    """The flat part [start, start + len(tensor)) of a weight that this rank's optimizer owns, in float32."""

    tensor: Tensor
    start: int


@dataclass(eq=False)
class AttentionLayer:
    """A self-attention of this rank.

    Args:
        name: "layer 3", counted over the whole model, or "mtp layer 1".
        core: the module that gets queries and keys.
        heads: query heads on this tensor-parallel rank.
        groups: key heads on this rank; None for MLA.
        scale: factor on the products of queries and keys.
        rows: (parameter, layout of its rows on this rank) of the projections that a clip scales.
        largest: [heads] float32, the largest logits of this step so far.
        stale: what `core` reports of itself belongs to a step that is over.
    """

    name: str
    core: nn.Module
    heads: int
    groups: int | None
    scale: float
    rows: tuple[tuple[nn.Parameter, Split], ...]
    largest: Tensor | None = None
    stale: bool = False

    def record(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of `core`: queries [s, b, h, d] and keys [s, b, g, d], or packed [t, h, d]."""
        if not self.core.training:
            return
        if reports_itself(self.core):
            if self.stale:
                self.core.current_max_attn_logits, self.stale = None, False
            return
        query, key = (kwargs[n] if n in kwargs else args[i] for i, n in enumerate(("query", "key")))
        packed = kwargs.get("packed_seq_params")
        mask = kwargs.get("attn_mask_type") or self.core.attn_mask_type
        causal = "causal" in getattr(
            mask, "name", mask
        )  # Megatron's enumeration or Transformer Engine's word
        offsets: dict[str, Tensor] = {}
        if packed is not None and packed.qkv_format == "thd":
            offsets = {"cu_seqlens_q": packed.cu_seqlens_q, "cu_seqlens_k": packed.cu_seqlens_kv}
            query, key = (x.reshape(1, -1, *x.shape[-2:]) for x in (query, key))
        else:
            query, key = query.transpose(0, 1), key.transpose(0, 1)
        logits = qk_max_logits(query, key, self.scale, causal, **offsets)
        self.largest = logits if self.largest is None else torch.maximum(self.largest, logits)

    def take(self, device: torch.device) -> Tensor:
        """[heads] float32 largest logits of this step, -inf where none was recorded; ends the step."""
        largest = self.largest
        if reports_itself(self.core) and not self.stale:
            largest = self.core.current_max_attn_logits
        self.reset()
        if largest is None:
            return torch.full((self.heads,), float("-inf"), device=device)
        return largest.detach().float()

    def reset(self) -> None:
        """End the step. What `core` reports stays until the next forward pass: Megatron logs it after the step."""
        self.largest, self.stale = None, True


def reports_itself(core: nn.Module) -> bool:
    """Transformer Engine was told to return the largest logits (``--log-max-attention-logit``)."""
    return hasattr(core, "current_max_attn_logits")


def _scale(module: Any) -> float:
    """The factor on query-key products, with the layer's number in it where Megatron divides by that first."""
    core = module.core_attention
    scale = next(
        (m.softmax_scale for m in (core, module) if getattr(m, "softmax_scale", None) is not None), None
    )
    coefficient = getattr(getattr(core, "scale_mask_softmax", None), "scale", None)
    return float(module.config.kv_channels**-0.5 if scale is None else scale) * float(coefficient or 1.0)


def attention_layers(model: nn.Module, tensor_size: int, context_size: int) -> list[AttentionLayer]:
    """Every self-attention of `model`, multi-token-prediction layers included.

    Raises:
        ValueError: an attention whose logits cannot be clipped or seen; the message says what to do.
    """
    layers = []
    for path, module in model.named_modules():
        if not hasattr(module, "core_attention"):
            continue
        name = _layer_name(plain_name(path), module)
        config: Any = module.config
        if hasattr(module, "linear_kv_up_proj"):
            _check(name, module, config, context_size)
            layers.append(_latent_layer(name, module, config, tensor_size))
        elif hasattr(module, "linear_qkv"):
            _check(name, module, config, context_size)
            layers.append(_plain_layer(name, module, config, tensor_size))
        else:
            raise ValueError(
                f"{name} ({type(module).__name__}) has neither linear_qkv nor linear_kv_up_proj: {OFF}"
            )
    return layers


def _layer_name(path: str, module: Any) -> str:
    """ "layer 3" of the decoder; other stacks, such as a vision tower or "mtp", have their own numbers and name."""
    stack, _, rest = path.partition("layers.")
    stack = stack.strip(".")
    index = int(rest.split(".")[0]) + 1 if stack.startswith("mtp") else module.layer_number
    return f"layer {index}" if stack == "decoder" else f"{stack} layer {index}"


def _check(name: str, module: Any, config: Any, context_size: int) -> None:
    latent = hasattr(module, "linear_kv_up_proj")
    norm = type(getattr(module, "q_layernorm", None)).__name__
    if not latent and norm not in ("NoneType", "IdentityOp"):
        raise ValueError(
            f"{name} normalises its queries and keys, which bounds the logits and undoes any scaling: {OFF}"
        )
    if context_size > 1 and not reports_itself(module.core_attention):
        raise ValueError(
            f"context parallelism is {context_size}, so no rank sees all queries and keys of {name}: use Transformer "
            f"Engine with --log-max-attention-logit, or {OFF}"
        )
    if getattr(config, "window_size", None) is not None and not reports_itself(module.core_attention):
        raise ValueError(f"{name} attends within a window, which is not followed: {OFF}")
    if getattr(config, "cuda_graph_impl", "none") not in (None, "none"):
        raise ValueError(f"--cuda-graph-impl replays {name} without reading its logits: remove it, or {OFF}")
    if getattr(config, "experimental_attention_variant", None) == "dsa":
        raise ValueError(f"{name} selects its keys (dsa), which is not followed: {OFF}")


def _plain_layer(name: str, module: Any, config: Any, tensor_size: int) -> AttentionLayer:
    heads, groups = config.num_attention_heads, config.num_query_groups or config.num_attention_heads
    if groups % tensor_size:
        raise ValueError(
            f"--tensor-model-parallel-size {tensor_size} does not divide the {groups} query groups of {name}, so a "
            f"key is on several ranks: choose one that does, or {OFF}"
        )
    gate = getattr(config, "attention_output_gate", False)

    def layout(columns: int) -> Split:
        return splits.fused_qkv(
            groups // tensor_size, heads // tensor_size, config.kv_channels, columns, gate
        )

    rows = tuple((p, layout(p.numel() // p.shape[0])) for p in module.linear_qkv.parameters(recurse=False))
    return AttentionLayer(
        name, module.core_attention, heads // tensor_size, groups // tensor_size, _scale(module), rows
    )


def _latent_layer(name: str, module: Any, config: Any, tensor_size: int) -> AttentionLayer:
    heads, nope, rope = (
        config.num_attention_heads // tensor_size,
        config.qk_head_dim,
        config.qk_pos_emb_head_dim,
    )
    query = (module.linear_q_proj if config.q_lora_rank is None else module.linear_q_up_proj).weight
    key = module.linear_kv_up_proj.weight
    rows = (
        (query, splits.mla_query(heads, nope, rope, query.shape[1])),
        (key, splits.mla_key_value(heads, nope, config.v_head_dim, key.shape[1])),
    )
    return AttentionLayer(name, module.core_attention, heads, None, _scale(module), rows)


@dataclass
class QkClip:
    """QK-Clip of the layers of one rank (Kimi K2, algorithm 1): record, reduce once a step, scale.

    Args:
        layers: of all model chunks of this rank.
        config: tau, alpha and the rule for grouped-query attention.
        group: ranks that hold the same layers with other data, over data and context parallelism.
        device: of the weights.
    """

    layers: Sequence[AttentionLayer]
    config: MuonClipConfig
    group: dist.ProcessGroup | None
    device: torch.device
    largest: dict[str, Tensor] = field(default_factory=dict)
    _reduced: bool = False

    def __post_init__(self) -> None:
        for layer in self.layers:
            layer.core.register_forward_pre_hook(layer.record, with_kwargs=True)

    def reduce(self) -> dict[str, Tensor]:
        """[heads] float32 on the CPU for each layer: the largest logits over `group`. One collective a step."""
        if not self._reduced and self.layers:
            flat = torch.cat([layer.take(self.device) for layer in self.layers])
            if self.group is not None and dist.get_world_size(self.group) > 1:
                dist.all_reduce(flat, op=dist.ReduceOp.MAX, group=self.group)
            parts = flat.cpu().split([layer.heads for layer in self.layers])
            self.largest = {layer.name: part for layer, part in zip(self.layers, parts, strict=True)}
        self._reduced = True
        return self.largest

    def clip_(self, slices: Mapping[nn.Parameter, Slice]) -> None:
        """Scale what `slices` has of the rows of heads over tau; layers without such a head are not touched.

        Raises:
            ValueError: a layer recorded nothing, or a logit is not finite.
        """
        largest = self.reduce()
        for layer in self.layers:
            factors = self._factors(layer, largest[layer.name])
            if not (largest[layer.name] > self.config.tau).any():
                continue
            for parameter, layout in layer.rows:
                own = slices.get(parameter)
                if own is not None:
                    rows = splits.row_factors(layout, factors)
                    scale_flat_shard_(own.tensor.view(-1), own.start, rows, layout.other)

    def _factors(self, layer: AttentionLayer, largest: Tensor) -> dict[str, Tensor]:
        if layer.groups is None:
            return latent_factors(largest, self.config.tau, layer.name, self.config.alpha)
        return attention_factors(
            largest, self.config.tau, layer.name, layer.groups, self.config.alpha, self.config.gqa_rule
        )

    def finish(self) -> None:
        """End the step, whether it was applied or skipped."""
        if not self._reduced:
            self.largest = {}
        for layer in self.layers:
            layer.reset()
        self._reduced = False

    def summary(self) -> list[LayerLogits]:
        """The last step that was applied, of this rank's layers and heads; over all its data-parallel ranks."""
        return [
            LayerLogits(name, float(logits.max()), int((logits > self.config.tau).sum()), len(logits))
            for name, logits in self.largest.items()
        ]
