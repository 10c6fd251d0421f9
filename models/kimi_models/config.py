"""The config of a Kimi Linear checkpoint: every published field, checked, with the unknown ones kept."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from kimi_models.validate import ConfigError, is_int, validate

CONFIG_NAME = "config.json"

# The norm of the MLA latent does not follow `rms_norm_eps`: the published modelling code leaves its default.
LATENT_NORM_EPS = 1e-6

# transformers writes its own spelling of some fields when it saves a config.
_ALIASES = {
    "max_position_embeddings": "model_max_length",
    "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
    "torch_dtype": "dtype",
}
# Fields of later Kimi models (K3) that change the computation: ignoring them would be silently wrong.
_UNSUPPORTED = (
    "routed_expert_hidden_size",
    "mla_use_output_gate",
    "latent_moe_use_norm",
    "activation_situ_beta",
)


@dataclass(frozen=True, kw_only=True)
class LinearAttnConfig:
    """The `linear_attn_config` section: the KDA layers and which layers they are.

    `kda_layers` and `full_attn_layers` count layers from 1. `gate_lower_bound` (natural log per token, in
    [-5, 0)) chooses the lower-bounded decay; None is the softplus decay of the published checkpoint.
    """

    num_heads: int
    head_dim: int
    kda_layers: tuple[int, ...]
    full_attn_layers: tuple[int, ...]
    short_conv_kernel_size: int = 4
    gate_lower_bound: float | None = None
    use_full_rank_gate: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def projection_size(self) -> int:
        """Channels of q, k or v over all heads."""
        return self.num_heads * self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; fields at a default that the published config omits are omitted."""
        out: dict[str, Any] = {
            "full_attn_layers": list(self.full_attn_layers),
            "head_dim": self.head_dim,
            "kda_layers": list(self.kda_layers),
            "num_heads": self.num_heads,
            "short_conv_kernel_size": self.short_conv_kernel_size,
        }
        if self.gate_lower_bound is not None:
            out["gate_lower_bound"] = self.gate_lower_bound
        if self.use_full_rank_gate:
            out["use_full_rank_gate"] = True
        return out | self.extra


@dataclass(frozen=True, kw_only=True)
class KimiLinearConfig:
    """Config of `KimiLinearForCausalLM`, with the field names of the published checkpoint.

    `attn_res_block_size` turns Block Attention Residuals on. Its unit is decoder layers, each of two
    sub-layers (attention and MLP), as in vLLM; the paper counts sub-layers, so its S is twice this number.
    `attn_res_full` turns on the full form, where every sub-layer is its own block. Unknown fields are kept
    in `extra`.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    linear_attn_config: LinearAttnConfig
    num_key_value_heads: int
    moe_intermediate_size: int = 0
    num_experts: int = 0
    num_experts_per_token: int = 0
    num_shared_experts: int = 0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    moe_renormalize: bool = True
    moe_router_activation_func: str = "sigmoid"
    use_grouped_topk: bool = True
    num_expert_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    q_lora_rank: int | None = None
    mla_use_nope: bool = True
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    model_max_length: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    num_nextn_predict_layers: int = 0
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = 0
    dtype: str = "bfloat16"
    attn_res_block_size: int | None = None
    attn_res_full: bool = False
    model_type: str = "kimi_linear"
    architectures: tuple[str, ...] = ("KimiLinearForCausalLM",)
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        validate(self)

    # layers
    def is_kda_layer(self, layer: int) -> bool:
        """Whether layer `layer` (counted from 0) is a KDA layer; otherwise it is MLA."""
        return layer + 1 in self.linear_attn_config.kda_layers

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (counted from 0) has routed experts; otherwise it has one dense MLP."""
        return (
            self.num_experts > 0 and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0
        )

    @property
    def qk_head_dim(self) -> int:
        """Channels of one MLA query head: the part from the latent and the part shared by all heads."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Elements of one MLA cache row: the latent and the shared key channels."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def use_attn_res(self) -> bool:
        """Whether the model mixes earlier blocks by Attention Residuals instead of adding a residual."""
        return self.attn_res_full or self.attn_res_block_size is not None

    @property
    def attn_res_sublayers(self) -> int | None:
        """Sub-layers in one AttnRes block (the paper's S): 1 for the full form, None without AttnRes."""
        if self.attn_res_full:
            return 1
        return None if self.attn_res_block_size is None else 2 * self.attn_res_block_size

    # reading and writing
    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> KimiLinearConfig:
        """Reads a config in the published form or in the form transformers writes. Raises ConfigError."""
        raw = dict(raw)
        if (model_type := raw.get("model_type", "kimi_linear")) != "kimi_linear":
            raise ConfigError(
                f"model_type must be 'kimi_linear', got {model_type!r}: this is not a Kimi Linear config"
            )
        for theirs, ours in _ALIASES.items():
            if theirs in raw:
                value = raw.pop(theirs)
                raw.setdefault(ours, value)
        for name in _UNSUPPORTED:
            if raw.get(name):
                raise ConfigError(
                    f"{name} is {raw[name]!r}: a field of a later Kimi model that is not computed here; "
                    "use a Kimi Linear checkpoint"
                )
        raw["linear_attn_config"] = _read_linear_attn(raw)
        # transformers and vLLM write null for a field that is off.
        for name in ("num_experts", "num_experts_per_token", "num_shared_experts", "moe_intermediate_size"):
            raw[name] = raw.get(name) or 0
        raw["num_key_value_heads"] = raw.get("num_key_value_heads") or raw.get("num_attention_heads")
        for name in ("architectures", "eos_token_id"):
            if isinstance(raw.get(name), list):
                raw[name] = tuple(raw[name])
        if raw.get("architectures") is None:
            raw.pop("architectures", None)
        if raw.get("dtype") is None:
            raw.pop("dtype", None)
        elif "dtype" in raw:
            raw["dtype"] = str(raw["dtype"]).removeprefix("torch.")
        fields = {f.name: f for f in dataclasses.fields(cls) if f.name != "extra"}
        missing = [
            n
            for n, f in fields.items()
            if f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
            and raw.get(n) is None
        ]
        if missing:
            raise ConfigError(
                f"config lacks {', '.join(missing)}: add them, or point at a Kimi Linear config.json"
            )
        known = {n: v for n, v in raw.items() if n in fields}
        extra = {n: v for n, v in raw.items() if n not in fields}
        return cls(**known, extra=extra)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> KimiLinearConfig:
        """Reads `folder/config.json`, or the file itself. Raises ConfigError with the path and the fix."""
        path = Path(folder)
        if not path.exists():
            raise ConfigError(f"no such folder: {path}; give a folder with {CONFIG_NAME}, or fetch one first")
        file = path / CONFIG_NAME if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(f"{path} has no {CONFIG_NAME}: it is not a model folder")
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as e:
            raise ConfigError(f"{file} is not JSON ({e}): restore the file") from e
        if not isinstance(raw, dict):
            raise ConfigError(f"{file} must hold a JSON object, got {type(raw).__name__}: restore the file")
        if "model_type" not in raw:
            raise ConfigError(f"{file} has no model_type: it is not a model config")
        return cls.from_dict(raw)

    def to_dict(self) -> dict[str, Any]:
        """The published JSON form, unknown fields included, so that reading and writing round-trips."""
        out: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            if f.name in ("extra", "linear_attn_config"):
                continue
            value = getattr(self, f.name)
            if value == f.default and f.name in ("attn_res_block_size", "attn_res_full", "head_dim"):
                continue
            out[f.name] = list(value) if isinstance(value, tuple) else value
        out["linear_attn_config"] = self.linear_attn_config.to_dict()
        return dict(sorted((out | self.extra).items()))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `folder/config.json` and returns its path; makes the folder."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        file = path / CONFIG_NAME
        file.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return file

    def replace(self, **changes: Any) -> KimiLinearConfig:
        """A checked copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def published_config() -> KimiLinearConfig:
    """The config of the published Kimi-Linear-48B-A3B checkpoints (Instruct and Base), read offline."""
    file = resources.files("kimi_models") / "resources" / "kimi-linear-48b-a3b.json"
    return KimiLinearConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))


def _read_linear_attn(raw: dict[str, Any]) -> LinearAttnConfig:
    section = raw.pop("linear_attn_config", None)
    if isinstance(section, LinearAttnConfig):
        return section
    if section is None:
        # transformers keeps the same facts in flat fields and names each layer's type.
        types = raw.get("layer_types")
        if not isinstance(types, list | tuple):
            raise ConfigError(
                "config lacks linear_attn_config: add it with num_heads, head_dim, short_conv_kernel_size, "
                "kda_layers and full_attn_layers (layers counted from 1)"
            )
        unknown = sorted(set(types) - {"linear_attention", "full_attention"})
        if unknown:
            raise ConfigError(
                f"layer_types has {unknown}: known are 'linear_attention' (KDA) and 'full_attention' (MLA)"
            )
        section = {
            "kda_layers": [i + 1 for i, t in enumerate(types) if t == "linear_attention"],
            "full_attn_layers": [i + 1 for i, t in enumerate(types) if t == "full_attention"],
            "num_heads": raw.get("linear_num_heads", 32),
            "head_dim": raw.get("linear_head_dim", 128),
            "short_conv_kernel_size": raw.get("linear_conv_kernel_dim", 4),
        }
    if not isinstance(section, dict):
        raise ConfigError(
            f"linear_attn_config must be an object, got {type(section).__name__}: see `kimi_models.tiny`"
        )
    section = dict(section)
    names = {f.name for f in dataclasses.fields(LinearAttnConfig)} - {"extra"}
    missing = sorted({"num_heads", "head_dim", "kda_layers", "full_attn_layers"} - section.keys())
    if missing:
        raise ConfigError(f"linear_attn_config lacks {', '.join(missing)}: add them")
    for name in ("kda_layers", "full_attn_layers"):
        value = section[name]
        if not isinstance(value, list | tuple) or not all(is_int(v) for v in value):
            raise ConfigError(
                f"linear_attn_config.{name} must be a list of layer numbers, got {value!r}: "
                "list the layers, counted from 1"
            )
        section[name] = tuple(value)
    known = {n: v for n, v in section.items() if n in names}
    return LinearAttnConfig(**known, extra={n: v for n, v in section.items() if n not in names})
