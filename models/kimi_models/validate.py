"""Checks of a Kimi Linear config, called once when one is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kimi_models.config import KimiLinearConfig

# What the kernels take: a recurrent head, and a row of the latent cache, are read in whole vectors.
HEAD_DIM_STEP = 16
MAX_HEAD_DIM = 256

# Below this bound a 16-token tile of log decays leaves the range of bfloat16 (Kimi K3 report, 2.1).
MIN_GATE_LOWER_BOUND = -5.0


class ConfigError(ValueError):
    """A config that this package cannot run. The message names the field, its value and the fix."""


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(ok: bool, name: str, value: Any, want: str, fix: str) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {want}, got {value!r}: {fix}")


def validate(c: KimiLinearConfig) -> None:
    la = c.linear_attn_config
    positive = {
        n: getattr(c, n)
        for n in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "moe_layer_freq",
            "num_expert_group",
            "topk_group",
            "model_max_length",
        )
    }
    positive |= {f"linear_attn_config.{n}": getattr(la, n) for n in ("num_heads", "head_dim")}
    for name, value in positive.items():
        _require(
            is_int(value) and value > 0, name, value, "a positive integer", "correct the field in config.json"
        )
    for name in (
        "moe_intermediate_size",
        "num_experts",
        "num_experts_per_token",
        "num_shared_experts",
        "first_k_dense_replace",
        "num_nextn_predict_layers",
    ):
        value = getattr(c, name)
        _require(is_int(value) and value >= 0, name, value, "an integer of 0 or more", "correct config.json")
    for name in ("rms_norm_eps", "routed_scaling_factor"):
        value = getattr(c, name)
        ok = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        _require(ok, name, value, "a positive number", "correct config.json")
    _validate_layers(c)
    _validate_attention(c)
    _validate_experts(c)
    _require(
        c.hidden_act == "silu", "hidden_act", c.hidden_act, "'silu'", "no other activation is computed here"
    )
    _require(
        c.tie_word_embeddings is False,
        "tie_word_embeddings",
        c.tie_word_embeddings,
        "false",
        "Kimi Linear keeps a separate lm_head.weight; store it",
    )
    _require(
        c.num_nextn_predict_layers == 0,
        "num_nextn_predict_layers",
        c.num_nextn_predict_layers,
        "0",
        "multi-token prediction layers are not part of Kimi Linear; remove them",
    )
    _require(
        c.dtype in ("float64", "float32", "bfloat16", "float16"),
        "dtype",
        c.dtype,
        "float32, bfloat16, float16 or float64",
        "name a floating point type",
    )
    size = c.attn_res_block_size
    _require(
        size is None or (is_int(size) and 1 <= size <= c.num_hidden_layers),
        "attn_res_block_size",
        size,
        f"null or 1..{c.num_hidden_layers} (decoder layers)",
        "use a block of at most the whole depth",
    )
    _require(
        not (c.attn_res_full and size is not None),
        "attn_res_full",
        c.attn_res_full,
        "false when attn_res_block_size is set",
        "choose the full or the block form",
    )


def _validate_layers(c: KimiLinearConfig) -> None:
    la, n = c.linear_attn_config, c.num_hidden_layers
    for name in ("kda_layers", "full_attn_layers"):
        layers = getattr(la, name)
        outside = [x for x in layers if not 1 <= x <= n]
        if outside:
            raise ConfigError(
                f"linear_attn_config.{name} has layer {outside[0]}, outside 1..{n} (num_hidden_layers): "
                "layers are counted from 1"
            )
        double = sorted({x for x in layers if layers.count(x) > 1})
        if double:
            raise ConfigError(f"linear_attn_config.{name} has layer {double[0]} twice: name each layer once")
    both = sorted(set(la.kda_layers) & set(la.full_attn_layers))
    if both:
        raise ConfigError(
            f"layer {both[0]} is in both linear_attn_config.kda_layers and full_attn_layers: keep it in one "
            "(layers are counted from 1)"
        )
    neither = sorted(set(range(1, n + 1)) - set(la.kda_layers) - set(la.full_attn_layers))
    if neither:
        raise ConfigError(
            f"layer {neither[0]} is in neither linear_attn_config.kda_layers nor full_attn_layers: add it "
            "to one (layers are counted from 1)"
        )


def _validate_attention(c: KimiLinearConfig) -> None:
    la = c.linear_attn_config
    ok = la.head_dim % HEAD_DIM_STEP == 0 and la.head_dim <= MAX_HEAD_DIM
    _require(
        ok,
        "linear_attn_config.head_dim",
        la.head_dim,
        f"a multiple of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM}",
        "the KDA kernels take no other head size",
    )
    width = la.short_conv_kernel_size
    _require(
        is_int(width) and 2 <= width <= 8,
        "linear_attn_config.short_conv_kernel_size",
        width,
        "2..8",
        "the published kernel is 4",
    )
    bound = la.gate_lower_bound
    ok = bound is None or (isinstance(bound, int | float) and MIN_GATE_LOWER_BOUND <= bound < 0)
    _require(
        ok,
        "linear_attn_config.gate_lower_bound",
        bound,
        f"null or in [{MIN_GATE_LOWER_BOUND:g}, 0)",
        "it is the smallest log decay of one token",
    )
    _require(
        not la.use_full_rank_gate,
        "linear_attn_config.use_full_rank_gate",
        la.use_full_rank_gate,
        "false",
        "Kimi Linear has the low-rank gate (g_a_proj, g_b_proj); the full-rank one is a Kimi K3 layer",
    )
    _require(
        c.mla_use_nope is True,
        "mla_use_nope",
        c.mla_use_nope,
        "true",
        "full attention layers of Kimi Linear have no rotary embedding",
    )
    _require(
        c.num_key_value_heads == c.num_attention_heads,
        "num_key_value_heads",
        c.num_key_value_heads,
        f"num_attention_heads ({c.num_attention_heads})",
        "MLA has one latent for all heads",
    )
    _require(
        c.kv_lora_rank % HEAD_DIM_STEP == 0,
        "kv_lora_rank",
        c.kv_lora_rank,
        f"a multiple of {HEAD_DIM_STEP}",
        "the attention kernels read the latent in whole vectors",
    )
    _require(
        c.qk_rope_head_dim % HEAD_DIM_STEP == 0,
        "qk_rope_head_dim",
        c.qk_rope_head_dim,
        f"a multiple of {HEAD_DIM_STEP}",
        "the attention kernels read the cache row in whole vectors",
    )
    _require(
        c.q_lora_rank is None or (is_int(c.q_lora_rank) and c.q_lora_rank > 0),
        "q_lora_rank",
        c.q_lora_rank,
        "null or a positive integer",
        "null is the full-rank query projection",
    )


def _validate_experts(c: KimiLinearConfig) -> None:
    if c.num_experts == 0:
        return
    _require(
        c.first_k_dense_replace <= c.num_hidden_layers,
        "first_k_dense_replace",
        c.first_k_dense_replace,
        f"at most num_hidden_layers ({c.num_hidden_layers})",
        "it counts leading dense layers",
    )
    _require(
        c.moe_intermediate_size > 0,
        "moe_intermediate_size",
        c.moe_intermediate_size,
        "positive when num_experts is set",
        "give the width of one expert",
    )
    _require(
        1 <= c.num_experts_per_token <= c.num_experts,
        "num_experts_per_token",
        c.num_experts_per_token,
        f"1..num_experts ({c.num_experts})",
        "a token cannot choose more experts than there are",
    )
    _require(
        c.moe_router_activation_func == "sigmoid",
        "moe_router_activation_func",
        c.moe_router_activation_func,
        "'sigmoid'",
        "Kimi Linear routes by sigmoid scores",
    )
    groups = c.num_expert_group
    _require(
        c.num_experts % groups == 0 and (groups == 1 or c.num_experts // groups >= 2),
        "num_expert_group",
        groups,
        f"a divisor of num_experts ({c.num_experts}) that leaves two experts in a group",
        "use 1",
    )
    _require(
        c.topk_group <= groups, "topk_group", c.topk_group, f"at most num_expert_group ({groups})", "use 1"
    )
    reachable = c.topk_group * (c.num_experts // groups)
    _require(
        c.num_experts_per_token <= reachable,
        "num_experts_per_token",
        c.num_experts_per_token,
        f"at most the {reachable} experts of topk_group groups",
        "raise topk_group",
    )
