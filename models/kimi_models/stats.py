"""What a config costs: parameters, and bytes of cache a token and a sequence. Computed from the config alone."""

from __future__ import annotations

from dataclasses import dataclass

from kimi_models.config import KimiLinearConfig
from kimi_models.names import weight_table

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Servers keep the recurrent state in float32 whatever the model's dtype.
STATE_BYTES = 4


@dataclass(frozen=True)
class LayerCost:
    """One decoder layer, counted from 1 as in the config."""

    number: int
    attention: str
    mlp: str
    parameters: int
    active: int
    cache_bytes_per_token: int
    state_bytes_per_sequence: int


@dataclass(frozen=True)
class ModelCost:
    """Parameters in elements; caches in bytes for the config's dtype, recurrent states in float32.

    `active` counts what one token uses: all of it but the experts it is not routed to. `all_mla_bytes_per_token`
    is the cache of the same model with an MLA layer in place of every KDA layer.
    """

    layers: tuple[LayerCost, ...]
    parameters: int
    active: int
    embedding: int
    cache_bytes_per_token: int
    all_mla_bytes_per_token: int
    recurrent_bytes_per_sequence: int
    conv_bytes_per_sequence: int

    @property
    def state_bytes_per_sequence(self) -> int:
        """Bytes a sequence holds whatever its length: recurrent states and the tails of the convolutions."""
        return self.recurrent_bytes_per_sequence + self.conv_bytes_per_sequence

    @property
    def cache_saving(self) -> float:
        """The part of an all-MLA model's per-token cache that this one does without."""
        return 1 - self.cache_bytes_per_token / self.all_mla_bytes_per_token


def model_cost(config: KimiLinearConfig) -> ModelCost:
    """Counts a model of this config."""
    c, la = config, config.linear_attn_config
    size = _BYTES[c.dtype]
    row = c.latent_dim * size
    recurrent = la.num_heads * la.head_dim**2 * STATE_BYTES
    conv = (la.short_conv_kernel_size - 1) * 3 * la.projection_size * size
    total = [0] * c.num_hidden_layers
    active = [0.0] * c.num_hidden_layers
    outside = embedding = 0
    for w in weight_table(c).values():
        parts = w.param.split(".")
        if parts[0] == "layers":
            total[int(parts[1])] += w.numel
            active[int(parts[1])] += w.numel * w.active
        else:
            outside += w.numel
            embedding += w.numel if w.split_dim is not None else 0
    layers = tuple(
        LayerCost(
            i + 1,
            "KDA" if c.is_kda_layer(i) else "MLA",
            f"{c.num_experts_per_token}/{c.num_experts}+{c.num_shared_experts}"
            if c.is_moe_layer(i)
            else "dense",
            total[i],
            round(active[i]),
            0 if c.is_kda_layer(i) else row,
            recurrent + conv if c.is_kda_layer(i) else 0,
        )
        for i in range(c.num_hidden_layers)
    )
    kda = len(la.kda_layers)
    return ModelCost(
        layers=layers,
        parameters=sum(total) + outside,
        active=round(sum(active)) + outside,
        embedding=embedding,
        cache_bytes_per_token=row * (c.num_hidden_layers - kda),
        all_mla_bytes_per_token=row * c.num_hidden_layers,
        recurrent_bytes_per_sequence=recurrent * kda,
        conv_bytes_per_sequence=conv * kda,
    )
