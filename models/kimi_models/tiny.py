"""Small checkpoints with random weights, for tests and benchmarks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from kimi_models.config import KimiLinearConfig, LinearAttnConfig
from kimi_models.tokenizer import BOS_ID, EOS_ID, PAD_ID, byte_tokenizer, save_tokenizer

# Depths that keep the published pattern: three KDA layers, then one MLA layer.
KDA_PER_MLA = 3


def tiny_config(layers: int = 4, **changes: Any) -> KimiLinearConfig:
    """A small config of the published shape: 3 KDA layers to 1 MLA, one dense layer, then shared and routed experts.

    `changes` are config fields, or fields of `linear_attn_config` by their names there.
    """
    full = [i for i in range(1, layers + 1) if i % (KDA_PER_MLA + 1) == 0]
    linear: dict[str, Any] = {
        "num_heads": 4,
        "head_dim": 32,
        "full_attn_layers": tuple(full),
        "kda_layers": tuple(i for i in range(1, layers + 1) if i not in full),
    }
    for name in [n for n in changes if n in LinearAttnConfig.__dataclass_fields__ and n != "head_dim"]:
        linear[name] = changes.pop(name)
    if "head_dim" in changes:
        linear["head_dim"] = changes.pop("head_dim")
    fields: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.446,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }
    fields |= changes
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    return KimiLinearConfig(linear_attn_config=LinearAttnConfig(**linear), **fields)


def write_tiny(
    folder: str | os.PathLike[str],
    config: KimiLinearConfig | None = None,
    seed: int = 0,
    weight_std: float = 0.06,
) -> Path:
    """Writes a random checkpoint (config, safetensors, byte tokenizer) and returns its path.

    The tokenizer is left out where `vocab_size` does not hold the 256 bytes and the special tokens.
    Every part is made to matter: weights are spread by `weight_std` rather than the usual 0.02, and AttnRes
    queries, norm gains and the routers' biases are random instead of at their neutral start.
    """
    from kimi_models.reference import KimiLinearForCausalLM, MoE
    from kimi_models.weights import save_weights

    config = config or tiny_config()
    path = Path(folder)
    model = KimiLinearForCausalLM(config.replace(initializer_range=weight_std), dtype=torch.float32)
    model.init_weights(seed, query_std=1.0)
    rng = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MoE):
                module.gate.e_score_correction_bias.normal_(0, 0.01, generator=rng)
        for name, p in model.named_parameters():
            if p.ndim == 1 and name.endswith("weight"):
                p.uniform_(0.7, 1.3, generator=rng)
            elif name.endswith("A_log") and config.linear_attn_config.gate_lower_bound is not None:
                p.uniform_(-0.5, 0.5, generator=rng)
    config.save(path)
    save_weights(model, path, config)
    tokenizer = byte_tokenizer()
    if config.vocab_size >= tokenizer.get_vocab_size():
        save_tokenizer(tokenizer, path, config.model_max_length)
    return path
