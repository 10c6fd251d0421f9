"""A config is read whole, written back unchanged, and refused with the field, the value and the fix."""

import json
from importlib import resources

import pytest

from kimi_models import ConfigError, KimiLinearConfig, published_config
from kimi_models.stats import model_cost
from kimi_models.tiny import tiny_config


def published_json():
    return json.loads((resources.files("kimi_models") / "resources" / "kimi-linear-48b-a3b.json").read_text())


def test_published_config_round_trips_field_for_field(tmp_path):
    config = published_config()
    assert config.to_dict() == published_json()
    config.save(tmp_path)
    assert KimiLinearConfig.from_pretrained(tmp_path) == config


def test_layers_are_counted_from_one_in_the_lists():
    config = published_config()
    mla = [i for i in range(config.num_hidden_layers) if not config.is_kda_layer(i)]
    assert mla == [3, 7, 11, 15, 19, 23, 26]
    assert not config.is_moe_layer(0) and config.is_moe_layer(1)


def test_unknown_fields_are_kept():
    raw = published_json() | {"new_field": {"a": 1}}
    raw["linear_attn_config"]["new_gate"] = 3
    assert KimiLinearConfig.from_dict(raw).to_dict() == raw


def test_attn_res_and_lower_bound_round_trip():
    config = tiny_config(8, attn_res_block_size=2, gate_lower_bound=-5.0)
    again = KimiLinearConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.attn_res_sublayers == 4


def test_costs_of_the_published_model():
    """41.4 MiB of state a sequence, 74 % less KV cache than all-MLA: 20 of 27 layers, 2,170,880 bytes each."""
    cost = model_cost(published_config())
    assert cost.state_bytes_per_sequence == 20 * 2_170_880
    assert round(cost.state_bytes_per_sequence / 2**20, 1) == 41.4
    assert cost.cache_bytes_per_token == 7 * 576 * 2
    assert round(cost.cache_saving, 2) == 0.74
    assert 48e9 < cost.parameters < 50e9 and 3e9 < cost.active < 4e9


def broken(**changes):
    raw = tiny_config().to_dict()
    raw["linear_attn_config"] |= changes.pop("linear_attn_config", {})
    return raw | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_attn_config": {"kda_layers": [1, 2]}}, "layer 3 is in neither .* counted from 1"),
        ({"linear_attn_config": {"kda_layers": [1, 2, 3, 4]}}, "layer 4 is in both .* keep it in one"),
        ({"linear_attn_config": {"kda_layers": [0, 1, 2]}}, "kda_layers has layer 0, outside 1..4 .* from 1"),
        ({"linear_attn_config": {"kda_layers": [1, 2, 3, 5]}}, "kda_layers has layer 5, outside 1..4"),
        ({"linear_attn_config": {"kda_layers": [1, 1, 2, 3]}}, "layer 1 twice"),
        (
            {"linear_attn_config": {"kda_layers": "all"}},
            "kda_layers must be a list of layer numbers, got 'all'",
        ),
        ({"linear_attn_config": {"head_dim": 40}}, "head_dim must be a multiple of 16 up to 256, got 40"),
        ({"linear_attn_config": {"head_dim": 512}}, "head_dim must be a multiple of 16 up to 256, got 512"),
        ({"linear_attn_config": {"gate_lower_bound": -6.0}}, r"gate_lower_bound must be .*\[-5, 0\), got -6"),
        ({"linear_attn_config": {"gate_lower_bound": 0.5}}, "gate_lower_bound must be .* got 0.5"),
        ({"linear_attn_config": {"use_full_rank_gate": True}}, "use_full_rank_gate must be false, got True"),
        ({"linear_attn_config": {"short_conv_kernel_size": 1}}, "short_conv_kernel_size must be 2..8, got 1"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ({"hidden_size": "128"}, "hidden_size must be a positive integer, got '128'"),
        ({"num_experts_per_token": 9}, r"num_experts_per_token must be 1..num_experts \(8\), got 9"),
        ({"num_expert_group": 3}, "num_expert_group must be a divisor of num_experts"),
        (
            {"num_expert_group": 4, "topk_group": 1, "num_experts_per_token": 3},
            "num_experts_per_token must be at",
        ),
        (
            {"moe_router_activation_func": "softmax"},
            "moe_router_activation_func must be 'sigmoid', got 'softmax'",
        ),
        ({"mla_use_nope": False}, "mla_use_nope must be true, got False"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads must be num_attention_heads \(4\), got 2"),
        ({"kv_lora_rank": 72}, "kv_lora_rank must be a multiple of 16, got 72"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be false"),
        ({"hidden_act": "situ"}, "hidden_act must be 'silu', got 'situ'"),
        ({"attn_res_block_size": 9}, "attn_res_block_size must be null or 1..4 .decoder layers., got 9"),
        ({"attn_res_block_size": 1, "attn_res_full": True}, "attn_res_full must be false when"),
        ({"routed_expert_hidden_size": 64}, "routed_expert_hidden_size is 64: a field of a later Kimi model"),
        ({"model_type": "llama"}, "model_type must be 'kimi_linear', got 'llama'"),
        ({"vocab_size": None}, "config lacks vocab_size"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers must be 0, got 1"),
        ({"dtype": "int8"}, "dtype must be .* got 'int8'"),
    ],
)
def test_bad_config_names_field_value_and_fix(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        KimiLinearConfig.from_dict(broken(**changes))
    assert ":" in str(error.value)


def test_missing_linear_attn_config_says_what_to_add():
    raw = tiny_config().to_dict()
    del raw["linear_attn_config"]
    with pytest.raises(ConfigError, match="lacks linear_attn_config: add it with num_heads"):
        KimiLinearConfig.from_dict(raw)


def test_bad_folders(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        KimiLinearConfig.from_pretrained(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        KimiLinearConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        KimiLinearConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        KimiLinearConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no model_type"):
        KimiLinearConfig.from_pretrained(tmp_path)


def test_the_form_transformers_saves_reads_as_the_same_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = tiny_config(8, dtype="float32")
    theirs = transformers.AutoConfig.for_model(
        **{k: v for k, v in ours.to_dict().items() if k != "rope_theta"}
    )
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["linear_attn_config"]  # what a config made in transformers, not read from a checkpoint, lacks
    again = KimiLinearConfig.from_dict(raw)
    assert again.linear_attn_config == ours.linear_attn_config
    # head_dim is a field nobody reads; transformers fills it.
    assert again.replace(extra={}, architectures=ours.architectures, head_dim=None) == ours.replace(extra={})
