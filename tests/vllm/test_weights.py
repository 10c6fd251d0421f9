"""Loading: every published weight has its place at every tensor-parallel size, and nothing wrong gets in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kimi_models import KimiLinearConfig
from kimi_models.names import weight_table
from kimi_models.tiny import tiny_config
from vllm_kimi.loading import WeightError, load_published

# Builds our class on the meta device for each tensor-parallel size and prints the shape of each weight's place.
PLACES = """
import json, sys
from pathlib import Path
import torch
from unittest import mock
from vllm.engine.arg_utils import EngineArgs
from vllm.config import set_current_vllm_config
import vllm.distributed.parallel_state as state

config = EngineArgs(model=sys.argv[1], skip_tokenizer_init=True, dtype="bfloat16").create_engine_config()
group = lambda size: mock.Mock(
    world_size=size, rank_in_group=size - 1, is_first_rank=True, is_last_rank=True, local_rank=0, rank=size - 1
)
torch.set_default_dtype(torch.bfloat16)
out = {}
for size in (1, 2, 4, 8):
    stage = group(1)
    stage.rank_in_group = 0
    with mock.patch.object(state, "_TP", group(size)), mock.patch.object(state, "_PP", stage):
        with set_current_vllm_config(config), torch.device("meta"):
            config.compilation_config.static_forward_context.clear()
            from vllm_kimi.model import KimiLinearForCausalLM
            model = KimiLinearForCausalLM(vllm_config=config)
        places = model.places()
        held = sum(p.numel() for p in model.parameters())
        out[size] = {
            "shapes": {name: list(place.shape) for name, place in places.items()},
            "elements": sum(place.numel() for place in places.values()),
            "held": held,
        }
print("RESULT " + json.dumps(out))
"""


@pytest.mark.slow
@pytest.mark.parametrize("attn_res", [None, 3])
def test_published_checkpoint_has_a_place_for_every_weight(tmp_path: Path, attn_res: int | None) -> None:
    """The 48B config on the meta device at tensor-parallel sizes 1, 2, 4 and 8, last rank; none left over."""
    from kimi_models import published_config

    config = published_config().replace(attn_res_block_size=attn_res)
    config.save(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", PLACES, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert "RESULT" in run.stdout, run.stderr[-4000:]
    result = json.loads(run.stdout.split("RESULT ", 1)[1])
    table = weight_table(config)
    for size, found in result.items():
        assert found["shapes"].keys() == table.keys()
        assert found["elements"] == found["held"], "a parameter that no published weight fills, or fills twice"
        for name, shape in found["shapes"].items():
            local = table[name].shard_shape(int(size))
            assert torch.Size(shape).numel() == torch.Size(local).numel(), (name, size, shape, local)


@pytest.fixture
def config() -> KimiLinearConfig:
    return tiny_config(2, full_attn_layers=[2], kda_layers=[1])


@pytest.fixture
def weights(config: KimiLinearConfig) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {name: torch.randn(w.shape, generator=rng) for name, w in weight_table(config).items()}


def load(config: KimiLinearConfig, weights: dict[str, torch.Tensor], tp_size: int = 1) -> list[dict[str, torch.Tensor]]:
    ranks = []
    for rank in range(tp_size):
        places: dict[str, Any] = {n: torch.zeros(w.shard_shape(tp_size)) for n, w in weight_table(config).items()}
        load_published(weights.items(), places, config, tp_size, rank)
        ranks.append(places)
    return ranks


def test_ranks_hold_the_pieces_of_the_whole(config: KimiLinearConfig, weights: dict[str, torch.Tensor]) -> None:
    ranks = load(config, weights, tp_size=2)
    for name, weight in weight_table(config).items():
        pieces = [places[name] for places in ranks]
        whole = pieces[0] if weight.split_dim is None else torch.cat(pieces, dim=weight.split_dim)
        assert torch.equal(whole, weights[name]), name


def test_takes_the_names_transformers_writes(config: KimiLinearConfig, weights: dict[str, torch.Tensor]) -> None:
    renamed = {n.replace("layers.0.mlp.", "layers.0.block_sparse_moe."): t for n, t in weights.items()}
    assert renamed.keys() != weights.keys()
    renamed["model.layers.0.self_attn.A_log"] = weights["model.layers.0.self_attn.A_log"].flatten()
    places = load(config, renamed)[0]
    assert all(torch.equal(places[n], t) for n, t in weights.items())


NAME = "model.layers.0.self_attn.q_proj.weight"


def broken(weights: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    bad = dict(weights)
    if how == "missing":
        del bad[NAME]
    elif how == "extra":
        bad["model.layers.7.self_attn.q_proj.weight"] = bad[NAME]
    elif how == "shape":
        bad[NAME] = bad[NAME][:-1]
    elif how == "nan":
        bad[NAME] = bad[NAME].clone()
        bad[NAME][3, 5] = float("nan")
    elif how == "quantised":
        bad[NAME] = bad[NAME].to(torch.int8)
    return bad


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", rf"lacks 1 tensors .*\({NAME}\): download it again"),
        ("extra", r"model\.layers\.7\.self_attn\.q_proj\.weight has no place in this config: use the config\.json"),
        ("shape", rf"{NAME} has shape \[127, 128\], the config asks for \[128, 128\]: the weights belong to another"),
        ("nan", rf"{NAME} has 1 NaN or infinite values: the checkpoint is damaged; fetch it again"),
        ("quantised", rf"{NAME} has dtype torch\.int8: quantised weights are not read .*; use the bfloat16"),
    ],
)
def test_refuses_weights_that_do_not_fit(
    config: KimiLinearConfig, weights: dict[str, torch.Tensor], how: str, message: str
) -> None:
    with pytest.raises(WeightError, match=message):
        load(config, broken(weights, how))


def test_refuses_a_weight_given_twice(config: KimiLinearConfig, weights: dict[str, torch.Tensor]) -> None:
    places: dict[str, Any] = {n: torch.zeros(w.shape) for n, w in weight_table(config).items()}
    with pytest.raises(WeightError, match="is in the checkpoint twice"):
        load_published([*weights.items(), (NAME, weights[NAME])], places, config, 1, 0)


def rewrite_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


def copied(source: Path, target: Path) -> Path:
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def without_layer(raw: dict[str, Any]) -> None:
    raw["linear_attn_config"]["kda_layers"].remove(2)


def layer_twice(raw: dict[str, Any]) -> None:
    raw["linear_attn_config"]["full_attn_layers"].append(2)


def odd_head(raw: dict[str, Any]) -> None:
    raw["linear_attn_config"]["head_dim"] = 20


BAD_ENGINES: list[tuple[str, Any, dict[str, Any], str]] = [
    ("layer in neither list", without_layer, {}, "layer 2 is in neither linear_attn_config.kda_layers nor"),
    ("layer in both lists", layer_twice, {}, "layer 2 is in both linear_attn_config.kda_layers and"),
    ("head size", odd_head, {}, "linear_attn_config.head_dim must be a multiple of 16 up to 256, got 20"),
    ("context", None, {"max_model_len": 9999}, "max_model_len (9999) is greater than the derived max_model_len"),
    ("tensor parallel", None, {"tensor_parallel_size": 3}, "tensor_parallel_size is 3, which does not divide"),
    (
        "drafter",
        None,
        {"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2}},
        "speculative method is 'ngram_gpu': with Kimi Linear our class takes ngram, suffix, custom_class",
    ),
    ("cache dtype", None, {"kv_cache_dtype": "fp8"}, "kv_cache_dtype is 'fp8"),
    ("expert parallel", None, {"enable_expert_parallel": True}, "enable_expert_parallel is set"),
    ("option", None, {"additional_config": {"kimi_stack": {"model": "mine"}}}, "must be one of auto, ours, upstream"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "engine_options", "message"), [b[1:] for b in BAD_ENGINES], ids=[b[0] for b in BAD_ENGINES]
)
def test_engine_refuses(
    engine: Any,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    change: Any,
    engine_options: dict[str, Any],
    message: str,
) -> None:
    folder = copied(checkpoint(), tmp_path)
    if change is not None:
        rewrite_config(folder, change)
    answer = engine(folder, [[5, 6]], tokens=1, **engine_options)
    assert "error" in answer
    assert message in answer["error"], answer["error"]


@pytest.mark.slow
def test_engine_refuses_a_damaged_checkpoint(engine: Any, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(checkpoint(), tmp_path)
    file = folder / "model.safetensors"
    save_file(broken(load_file(file), "nan"), file, metadata={"format": "pt"})
    answer = engine(folder, [[5, 6]], tokens=1)
    assert "1 NaN or infinite values" in answer["error"], answer["error"]
    assert NAME in answer["error"]


@pytest.mark.slow
def test_a_forced_backend_that_cannot_run_is_named(
    new_host: Callable[..., Any], checkpoint: Callable[..., Path]
) -> None:
    host = new_host(KIMI_KERNELS_BACKEND="triton")
    answer = host(checkpoint(), [[5, 6]], tokens=1)
    host.close()
    assert "KIMI_KERNELS_BACKEND=triton" in answer["error"] and "cannot run" in answer["error"], answer["error"]
