"""The one table of published weight names: where each tensor lives here, its shape, and how it is split.

Loading, saving, the parameter count and the tensor-parallel plan are all read from this table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from kimi_models.config import KimiLinearConfig


@dataclass(frozen=True)
class Weight:
    """One published tensor.

    `name` and `shape` are as published. `param` is the parameter of the reference model that holds it: the
    whole of it, or its rows `rows` (start, stop), or those of its expert `expert`.
    `fp32` marks the tensors that stay in float32 whatever the model's dtype.
    `split_dim` is the dimension of which a tensor-parallel rank takes a contiguous piece; None means that
    every rank has the whole tensor.
    `active` is the part of the tensor that one token uses, which is below 1 for routed experts.
    """

    name: str
    shape: tuple[int, ...]
    param: str
    rows: tuple[int, int] | None = None
    expert: int | None = None
    fp32: bool = False
    split_dim: int | None = None
    active: float = 1.0

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    def shard(self, tp_size: int, rank: int = 0) -> tuple[slice, ...]:
        """The slices of the published tensor that rank `rank` of `tp_size` holds.

        Raises ValueError where `split_dim` does not divide by `tp_size`.
        """
        if not 0 <= rank < tp_size:
            raise ValueError(f"rank must be in 0..{tp_size - 1}, got {rank}: ranks are counted from 0")
        slices = [slice(0, n) for n in self.shape]
        if self.split_dim is not None:
            size = self.shape[self.split_dim]
            if size % tp_size:
                raise ValueError(
                    f"{self.name} has {size} in dimension {self.split_dim}, not divisible by the "
                    f"tensor-parallel size {tp_size}: use one that divides the heads and the widths"
                )
            part = size // tp_size
            slices[self.split_dim] = slice(rank * part, (rank + 1) * part)
        return tuple(slices)

    def shard_shape(self, tp_size: int) -> tuple[int, ...]:
        """The shape that each of `tp_size` ranks holds."""
        return tuple(s.stop - s.start for s in self.shard(tp_size))


def weight_table(config: KimiLinearConfig) -> dict[str, Weight]:
    """Every tensor of a published checkpoint of this config, by name, in checkpoint order."""
    return {w.name: w for w in _weights(config)}


def canonical_name(name: str, config: KimiLinearConfig) -> str:
    """The published form of a name found in a file.

    transformers 5.19 to 5.23 saves the MLP of a dense layer under `block_sparse_moe`, which no published
    checkpoint does.
    """
    parts = name.split(".")
    if len(parts) == 6 and parts[:2] == ["model", "layers"] and parts[3] == "block_sparse_moe":
        layer = parts[2]
        dense = (
            layer.isdecimal()
            and int(layer) < config.num_hidden_layers
            and not config.is_moe_layer(int(layer))
        )
        if dense and parts[4] in ("gate_proj", "up_proj", "down_proj"):
            parts[3] = "mlp"
    return ".".join(parts)


def _weights(c: KimiLinearConfig) -> Iterator[Weight]:
    d = c.hidden_size
    yield Weight("model.embed_tokens.weight", (c.vocab_size, d), "embed_tokens.weight", split_dim=0)
    for i in range(c.num_hidden_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        yield Weight(f"{theirs}input_layernorm.weight", (d,), f"{ours}input_layernorm.weight")
        yield from _kda(c, ours, theirs) if c.is_kda_layer(i) else _mla(c, ours, theirs)
        norm = "post_attention_layernorm.weight"
        yield Weight(theirs + norm, (d,), ours + norm)
        if c.is_moe_layer(i):
            yield from _moe(c, ours, theirs)
        else:
            yield from _mlp(d, c.intermediate_size, f"{ours}mlp.", f"{theirs}mlp.")
        if c.use_attn_res:
            yield from _attn_res(d, f"{ours}self_attention_res", f"{theirs}self_attention_res")
            yield from _attn_res(d, f"{ours}mlp_res", f"{theirs}mlp_res")
    if c.use_attn_res:
        yield from _attn_res(d, "output_attn_res", "model.output_attn_res")
    yield Weight("model.norm.weight", (d,), "norm.weight")
    yield Weight("lm_head.weight", (c.vocab_size, d), "lm_head.weight", split_dim=0)


def _kda(c: KimiLinearConfig, ours: str, theirs: str) -> Iterator[Weight]:
    la, d = c.linear_attn_config, c.hidden_size
    p, k, width = la.projection_size, la.head_dim, la.short_conv_kernel_size
    ours, theirs = f"{ours}self_attn.", f"{theirs}self_attn."
    for j, x in enumerate("qkv"):
        yield Weight(
            f"{theirs}{x}_proj.weight", (p, d), f"{ours}qkv_proj.weight", (j * p, j * p + p), split_dim=0
        )
    for j, x in enumerate("qkv"):
        name = f"{theirs}{x}_conv1d.weight"
        yield Weight(name, (p, 1, width), f"{ours}conv_weight", (j * p, j * p + p), split_dim=0)
    yield Weight(f"{theirs}A_log", (1, 1, la.num_heads, 1), f"{ours}A_log", fp32=True, split_dim=2)
    yield Weight(f"{theirs}dt_bias", (p,), f"{ours}dt_bias", fp32=True, split_dim=0)
    for x in "fg":
        yield Weight(f"{theirs}{x}_a_proj.weight", (k, d), f"{ours}{x}_a_proj.weight")
        yield Weight(f"{theirs}{x}_b_proj.weight", (p, k), f"{ours}{x}_b_proj.weight", split_dim=0)
    yield Weight(f"{theirs}b_proj.weight", (la.num_heads, d), f"{ours}b_proj.weight", split_dim=0)
    yield Weight(f"{theirs}o_norm.weight", (k,), f"{ours}o_norm_weight")
    yield Weight(f"{theirs}o_proj.weight", (d, p), f"{ours}o_proj.weight", split_dim=1)


def _mla(c: KimiLinearConfig, ours: str, theirs: str) -> Iterator[Weight]:
    d, heads = c.hidden_size, c.num_attention_heads
    ours, theirs = f"{ours}self_attn.", f"{theirs}self_attn."

    def weight(name: str, shape: tuple[int, ...], split_dim: int | None = None) -> Weight:
        return Weight(f"{theirs}{name}.weight", shape, f"{ours}{name}.weight", split_dim=split_dim)

    if c.q_lora_rank is None:
        yield weight("q_proj", (heads * c.qk_head_dim, d), 0)
    else:
        yield weight("q_a_proj", (c.q_lora_rank, d))
        yield weight("q_a_layernorm", (c.q_lora_rank,))
        yield weight("q_b_proj", (heads * c.qk_head_dim, c.q_lora_rank), 0)
    yield weight("kv_a_proj_with_mqa", (c.latent_dim, d))
    yield weight("kv_a_layernorm", (c.kv_lora_rank,))
    yield weight("kv_b_proj", (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank), 0)
    yield weight("o_proj", (d, heads * c.v_head_dim), 1)


def _mlp(d: int, width: int, ours: str, theirs: str) -> Iterator[Weight]:
    for j, x in enumerate(("gate", "up")):
        rows = (j * width, j * width + width)
        yield Weight(f"{theirs}{x}_proj.weight", (width, d), f"{ours}gate_up_proj.weight", rows, split_dim=0)
    yield Weight(f"{theirs}down_proj.weight", (d, width), f"{ours}down_proj.weight", split_dim=1)


def _moe(c: KimiLinearConfig, ours: str, theirs: str) -> Iterator[Weight]:
    d, width, n = c.hidden_size, c.moe_intermediate_size, c.num_experts
    ours, theirs = f"{ours}mlp.", f"{theirs}block_sparse_moe."
    yield Weight(f"{theirs}gate.weight", (n, d), f"{ours}gate.weight")
    bias = "gate.e_score_correction_bias"
    yield Weight(theirs + bias, (n,), ours + bias, fp32=True)
    used = c.num_experts_per_token / n
    for e in range(n):
        for j, x in enumerate(("w1", "w3")):
            name, rows = f"{theirs}experts.{e}.{x}.weight", (j * width, j * width + width)
            yield Weight(name, (width, d), f"{ours}experts_gate_up", rows, e, split_dim=0, active=used)
        name = f"{theirs}experts.{e}.w2.weight"
        yield Weight(name, (d, width), f"{ours}experts_down", None, e, split_dim=1, active=used)
    if c.num_shared_experts:
        width *= c.num_shared_experts
        yield from _mlp(d, width, f"{ours}shared_experts.", f"{theirs}shared_experts.")


def _attn_res(d: int, ours: str, theirs: str) -> Iterator[Weight]:
    yield Weight(f"{theirs}_norm.weight", (d,), f"{ours}.norm_weight")
    yield Weight(f"{theirs}_proj.weight", (1, d), f"{ours}.query")
