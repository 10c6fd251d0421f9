"""The table of published names against our model, against tensor-parallel splits, and against transformers."""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch

from kimi_models import published_config
from kimi_models.names import canonical_name, weight_table
from kimi_models.reference import KimiLinearForCausalLM
from kimi_models.tiny import tiny_config
from kimi_models.weights import param_slice


@pytest.fixture(scope="module")
def published():
    config = published_config()
    model = KimiLinearForCausalLM(config, dtype=torch.bfloat16, device="meta")
    return config, dict(model.named_parameters()) | dict(model.named_buffers())


def test_every_published_weight_finds_its_parameter_and_none_is_left(published):
    config, params = published
    covered: Counter[str] = Counter()
    for w in weight_table(config).values():
        assert [n for n in param_slice(params, w).shape if n != 1] == [n for n in w.shape if n != 1], w.name
        covered[w.param] += w.numel
    persistent = {n: p for n, p in params.items() if not n.endswith(".load")}
    assert covered == {n: p.numel() for n, p in persistent.items()}


def test_published_names_are_those_of_the_published_index(published):
    """Counts per kind, from the known tensors of a layer: 15 of KDA, 5 of MLA, 3 x 256 experts, and so on."""
    config, _ = published
    names = weight_table(config)
    kinds = Counter(n.split("self_attn.")[-1] for n in names if "self_attn." in n)
    kda = ["A_log", "dt_bias", *(f"{x}_proj.weight" for x in ("k", "v", "b", "f_a", "f_b", "g_a", "g_b"))]
    kda += ["o_norm.weight", *(f"{x}_conv1d.weight" for x in "qkv")]
    mla = ["kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight", "kv_b_proj.weight"]
    both = ["q_proj.weight", "o_proj.weight"]
    assert kinds == {**dict.fromkeys(kda, 20), **dict.fromkeys(mla, 7), **dict.fromkeys(both, 27)}
    assert sum(".block_sparse_moe.experts." in n for n in names) == 26 * 256 * 3
    assert sum(".block_sparse_moe.shared_experts." in n for n in names) == 26 * 3
    assert sum(".block_sparse_moe.gate." in n for n in names) == 26 * 2
    assert [n for n in names if ".mlp." in n] == [
        f"model.layers.0.mlp.{x}_proj.weight" for x in ("gate", "up", "down")
    ]
    assert len(names) == 3 + 27 * 2 + 20 * 15 + 7 * 5 + 26 * (256 * 3 + 3 + 2) + 3
    assert names["model.layers.0.self_attn.A_log"].shape == (1, 1, 32, 1)
    assert names["model.layers.0.self_attn.q_conv1d.weight"].shape == (4096, 1, 4)
    assert names["model.layers.3.self_attn.kv_b_proj.weight"].shape == (32 * 256, 512)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_tensor_parallel_shards_tile_every_weight(published, tp):
    config, _ = published
    for w in weight_table(config).values():
        shards = [w.shard(tp, rank) for rank in range(tp)]
        assert all(
            math.prod(s.stop - s.start for s in shard) == math.prod(w.shard_shape(tp)) for shard in shards
        )
        if w.split_dim is None:
            assert w.shard_shape(tp) == w.shape
        else:
            edges = [(s[w.split_dim].start, s[w.split_dim].stop) for s in shards]
            assert edges[0][0] == 0 and edges[-1][1] == w.shape[w.split_dim]
            assert all(a[1] == b[0] for a, b in pairwise(edges))


def test_a_split_that_does_not_divide_is_refused():
    w = weight_table(tiny_config())["model.layers.0.self_attn.A_log"]
    with pytest.raises(ValueError, match=r"A_log has 4 in dimension 2, not divisible"):
        w.shard(3)
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.1, got 2"):
        w.shard(2, 2)


def test_total_parameters_equal_transformers_on_the_meta_device(published):
    transformers = pytest.importorskip("transformers")
    config, _ = published
    raw = {k: v for k, v in config.to_dict().items() if k not in ("rope_theta", "rope_scaling", "auto_map")}
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    total = sum(p.numel() for p in theirs.parameters()) + sum(
        b.numel() for n, b in theirs.named_buffers() if n.endswith("e_score_correction_bias")
    )
    assert total == sum(w.numel for w in weight_table(config).values())


def test_names_and_shapes_equal_what_transformers_saves(tmp_path):
    """The published pattern of 27 layers with small widths, written by transformers' own save."""
    transformers = pytest.importorskip("transformers")
    from safetensors import safe_open

    raw = published_config().to_dict() | {
        "hidden_size": 32, "vocab_size": 64, "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 4,
        "num_experts_per_token": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 16,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, "dtype": "float32",
    }  # fmt: skip
    raw["linear_attn_config"] |= {"num_heads": 2, "head_dim": 16}
    config = type(published_config()).from_dict(raw)
    theirs = {k: v for k, v in raw.items() if k not in ("rope_theta", "rope_scaling", "auto_map")}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**theirs))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as f:
        saved = {canonical_name(n, config): tuple(f.get_slice(n).get_shape()) for n in f.keys()}  # noqa: SIM118
    assert saved == {n: w.shape for n, w in weight_table(config).items()}


def test_attn_res_names_are_upstreams():
    names = weight_table(tiny_config(attn_res_block_size=2))
    extra = [n for n in names if "_res_" in n and (".layers." not in n or ".layers.2." in n)]
    assert sorted(extra) == [
        "model.layers.2.mlp_res_norm.weight",
        "model.layers.2.mlp_res_proj.weight",
        "model.layers.2.self_attention_res_norm.weight",
        "model.layers.2.self_attention_res_proj.weight",
        "model.output_attn_res_norm.weight",
        "model.output_attn_res_proj.weight",
    ]
    assert names["model.output_attn_res_proj.weight"].shape == (1, 128)


def test_only_the_misnamed_dense_mlp_is_renamed():
    config = tiny_config()
    wrong = "model.layers.0.block_sparse_moe.up_proj.weight"
    assert canonical_name(wrong, config) == "model.layers.0.mlp.up_proj.weight"
    for right in (
        "model.layers.1.block_sparse_moe.gate.weight",
        "model.layers.9.block_sparse_moe.up_proj.weight",
    ):
        assert canonical_name(right, config) == right
