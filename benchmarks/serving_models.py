"""The models that the serving benchmark measures: the committed one and random ones made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from kimi_models.config import KimiLinearConfig
from kimi_models.stats import model_cost
from kimi_models.tiny import write_tiny

CHECKPOINT = Path(__file__).parent.parent / "models" / "checkpoints" / "tiny-linear"


def hybrid_config(
    layers: int, hidden: int, heads: int, *, kda: bool = True, **fields: object
) -> KimiLinearConfig:
    """Kimi Linear at a small size, three KDA layers to one MLA layer as published; all MLA with `kda=False`."""
    full = [layer for layer in range(1, layers + 1) if layer % 4 == 0 or not kda]
    raw = {
        "model_type": "kimi_linear",
        "vocab_size": 8192,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": 4 * hidden,
        "moe_intermediate_size": hidden // 2,
        "num_experts": 16,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.446,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "mla_use_nope": True,
        "model_max_length": 65536,
        "linear_attn_config": {
            "kda_layers": [layer for layer in range(1, layers + 1) if layer not in full],
            "full_attn_layers": full,
            "num_heads": heads,
            "head_dim": 128,
            "short_conv_kernel_size": 4,
        },
        **fields,
    }
    return KimiLinearConfig.from_dict(raw)


def hybrid_60m(work: Path) -> Path:
    """A random hybrid of about 60 M parameters."""
    folder = work / "hybrid-60m"
    write_tiny(folder, hybrid_config(layers=8, hidden=512, heads=4, num_experts=14), seed=0)
    return folder


def llama_like(model: Path, folder: Path) -> Path:
    """The config of a Llama with the parameter count (within 2 %) and the vocabulary of `model`.

    Width and depth are those of `model`; the MLP takes what is left of the parameters.
    """
    config = KimiLinearConfig.from_pretrained(model)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    left = model_cost(config).parameters - 2 * config.vocab_size * hidden - layers * 4 * hidden * hidden
    intermediate = max(32, round(left / (3 * hidden * layers) / 32) * 32)
    folder.mkdir(parents=True, exist_ok=True)
    body = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(body, indent=1))
    return folder


def long_context_pair(work: Path) -> tuple[Path, Path, Callable[[str, int], int]]:
    """A 3:1 hybrid, an all-MLA model of the same width and depth, and bytes of cache per sequence of either.

    The cache function takes ``"hybrid"`` or ``"all-mla"`` and the context in tokens.
    """
    configs = {
        "hybrid": hybrid_config(layers=4, hidden=256, heads=4),
        "all-mla": hybrid_config(layers=4, hidden=256, heads=4, kda=False),
    }
    folders = {}
    for name, config in configs.items():
        folders[name] = work / name
        write_tiny(folders[name], config, seed=0)

    def cache_bytes(kind: str, context: int) -> int:
        cost = model_cost(configs[kind])
        return cost.state_bytes_per_sequence + context * cost.cache_bytes_per_token

    return folders["hybrid"], folders["all-mla"], cache_bytes
