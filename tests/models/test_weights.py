"""Weights come in and go out under the published names; a bad file is refused by the name of the tensor."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_models.reference import KimiLinearForCausalLM
from kimi_models.tiny import tiny_config, write_tiny
from kimi_models.weights import INDEX_NAME, SINGLE_NAME, WeightError, load_weights, read_weights, save_weights

CONFIG = tiny_config(
    hidden_size=32, head_dim=16, num_heads=2, num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=16,
    v_head_dim=16, intermediate_size=32, moe_intermediate_size=16, num_experts=4, dtype="float32",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return write_tiny(tmp_path / "model", CONFIG, seed=1)


def load(folder, config=CONFIG, dtype=torch.float32):
    model = KimiLinearForCausalLM(config, dtype=dtype)
    load_weights(model, folder, config)
    return model


def rewrite(folder, change):
    tensors = load_file(folder / SINGLE_NAME)
    change(tensors)
    save_file(tensors, folder / SINGLE_NAME)


def test_saving_and_loading_is_exact(folder, tmp_path):
    model = load(folder)
    save_weights(model, tmp_path / "again", CONFIG)
    first, again = load_file(folder / SINGLE_NAME), load_file(tmp_path / "again" / SINGLE_NAME)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_large_checkpoints_are_split_with_an_index(folder, tmp_path):
    model = load(folder)
    files = save_weights(model, tmp_path / "split", CONFIG, max_file_bytes=100_000)
    assert len(files) > 2 and all(f.stat().st_size < 110_000 for f in files)
    index = json.loads((tmp_path / "split" / INDEX_NAME).read_text())
    assert set(index["weight_map"].values()) == {f.name for f in files}
    again = load(tmp_path / "split")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_bfloat16_checkpoints_keep_the_gates_in_float32(tmp_path):
    write_tiny(tmp_path, CONFIG.replace(dtype="bfloat16"))
    tensors = load_file(tmp_path / SINGLE_NAME)
    wide = {n.split(".")[-1] for n, t in tensors.items() if t.dtype == torch.float32}
    assert wide == {"A_log", "dt_bias", "e_score_correction_bias"}


def test_a_log_may_be_stored_flat_and_the_dense_mlp_misnamed(folder):
    want = load(folder)

    def as_others_save(tensors):
        for name in [n for n in tensors if n.endswith("A_log")]:
            tensors[name] = tensors[name].flatten()
        for x in ("gate", "up", "down"):
            tensors[f"model.layers.0.block_sparse_moe.{x}_proj.weight"] = tensors.pop(
                f"model.layers.0.mlp.{x}_proj.weight"
            )

    rewrite(folder, as_others_save)
    got = load(folder)
    assert all(torch.equal(a, b) for a, b in zip(want.state_dict().values(), got.state_dict().values()))


def test_missing_and_extra_weights_are_listed(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # ignored
        tensors["model.layers.0.surprise.weight"] = torch.ones(4)

    rewrite(folder, change)
    with pytest.raises(WeightError, match=r"lack 1 .*\(model\.norm\.weight\) and have 1 .*surprise") as error:
        load(folder)
    assert "use the config.json they came with" in str(error.value)


def test_wrong_shape_names_the_tensor_and_both_shapes(folder):
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(33)}))
    with pytest.raises(WeightError, match=r"model\.norm\.weight has shape \[33\] .* asks for \[32\]"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_by_name(folder, value):
    def change(tensors):
        tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"][3, 4] = value

    rewrite(folder, change)
    with pytest.raises(
        WeightError, match=r"layers\.1\.block_sparse_moe\.experts\.2\.w2\.weight has 1 NaN or inf"
    ):
        load(folder)


def test_integer_weights_are_refused(folder):
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(WeightError, match=r"model\.norm\.weight has dtype I8 .* quantised"):
        load(folder)


def test_damaged_and_missing_files(folder, tmp_path):
    with pytest.raises(WeightError, match="no such folder"):
        list(read_weights(tmp_path / "none", CONFIG))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "pytorch_model.bin").touch()
    with pytest.raises(WeightError, match=r"neither .* nor .*pytorch_model\.bin is a pickle"):
        list(read_weights(tmp_path / "empty", CONFIG))
    whole = (folder / SINGLE_NAME).read_bytes()
    (folder / SINGLE_NAME).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightError, match="is damaged"):
        load(folder)
    (folder / SINGLE_NAME).write_bytes(b"\xff" * 64)
    with pytest.raises(WeightError, match="is damaged"):
        load(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "model.bin", 3])
def test_an_index_cannot_name_files_elsewhere(folder, name):
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(WeightError, match=r"only plain \*\.safetensors names are read|is not an index"):
        load(folder)


def test_an_index_must_name_files_that_exist(folder):
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-2.safetensors"}}))
    with pytest.raises(WeightError, match=r"lacks model-2\.safetensors"):
        load(folder)


def test_saving_nan_is_refused(folder, tmp_path):
    model = load(folder)
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(WeightError, match=r"model\.norm\.weight has 1 NaN"):
        save_weights(model, tmp_path / "bad", CONFIG)
