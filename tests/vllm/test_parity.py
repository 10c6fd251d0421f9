"""The served model computes what transformers and the reference compute, token for token."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

# Float32 sums in different orders: differences measured on these models are near 1e-5.
LOGPROB_TOLERANCE = 1e-4

CHECKPOINTS = Path(__file__).parents[2] / "models" / "checkpoints"


# Two experts whose scores differ by less than this, in float64, are a tie to float32 sums of a few hundred terms.
TIE = 2e-6


def first_tie(folder: Path, ids: list[int]) -> int:
    """Index of the first token whose choice of experts is a tie anywhere in the model; len(ids) if none is.

    Which expert wins a tie is decided by the order of a sum, so no two implementations need agree after it.
    """
    from kimi_models import KimiLinearConfig
    from kimi_models.reference import KimiLinearForCausalLM, Router
    from kimi_models.weights import load_weights

    config = KimiLinearConfig.from_pretrained(folder)
    model = KimiLinearForCausalLM(config, dtype=torch.float64)
    load_weights(model, folder, config)
    tied = torch.zeros(len(ids), dtype=torch.bool)

    def gaps(values: torch.Tensor, kept: int) -> torch.Tensor:
        best = values.sort(dim=-1, descending=True).values
        return best[:, kept - 1] - best[:, kept] if kept < values.shape[1] else torch.full_like(best[:, 0], 1.0)

    def watch(router: Any, inputs: tuple[torch.Tensor], output: Any) -> None:
        choice = (inputs[0] @ router.weight.T).sigmoid() + router.e_score_correction_bias
        if config.num_expert_group > 1:
            groups = choice.unflatten(-1, (config.num_expert_group, -1))
            strength = groups.topk(2, dim=-1).values.sum(-1)
            tied.logical_or_(gaps(strength, config.topk_group) < TIE)
            open_ = torch.zeros_like(strength, dtype=torch.bool)
            open_.scatter_(1, strength.topk(config.topk_group, dim=-1).indices, True)
            choice = groups.masked_fill(~open_.unsqueeze(-1), -9.0).flatten(1)
        tied.logical_or_(gaps(choice, config.num_experts_per_token) < TIE)

    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(watch)
    with torch.no_grad():
        model.eval()(torch.tensor([ids]))
    return int(tied.nonzero()[0]) if tied.any() else len(ids)


def assert_same(
    folder: Path,
    round_: dict[str, Any],
    prompts: list[list[int]],
    logits: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Teacher-forced on the served tokens, every next token is the argmax, with the same log-probability.

    By induction over the tokens that is the same as equal greedy generation. At least 95 % of the tokens must
    be compared; the others follow a tie between experts.
    """
    compared = total = 0
    for prompt, tokens, logprobs in zip(prompts, round_["tokens"], round_["logprobs"]):
        ids = prompt + tokens[:-1]
        with torch.no_grad():
            out = logits(torch.tensor([ids]))[0].log_softmax(-1).float()
        out = out[len(prompt) - 1 :]
        theirs = out.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        wrong = (out.argmax(-1) != torch.tensor(tokens)) | ((theirs - torch.tensor(logprobs)).abs() > LOGPROB_TOLERANCE)
        first = int(wrong.nonzero()[0]) if wrong.any() else len(tokens)
        if first < len(tokens):
            position = len(prompt) - 1 + first
            assert first_tie(folder, ids) <= position, (
                f"prompt of {len(prompt)} tokens, output token {first}: "
                f"{tokens[first]} at {logprobs[first]}, expected {int(out[first].argmax())} at {float(theirs[first])}"
            )
        compared += first
        total += len(tokens)
    assert compared >= 0.95 * total


def theirs(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """transformers' own KimiLinearForCausalLM on `folder`, in float32."""
    from transformers.models.kimi_linear import KimiLinearForCausalLM

    model = KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lambda ids: model(ids, use_cache=False).logits


@pytest.mark.parametrize("changes", [{}, {"num_expert_group": 2, "topk_group": 1, "num_shared_experts": 2}])
def test_equals_transformers(
    engine: Any, checkpoint: Callable[..., Path], prompts: list[list[int]], changes: dict[str, Any]
) -> None:
    folder = checkpoint(**changes)
    answer = engine(folder, prompts)
    assert "error" not in answer, answer.get("traceback")
    assert_same(folder, answer["rounds"][0], prompts, theirs(folder))


def test_serves_a_checkpoint_that_transformers_wrote(
    engine: Any, prompts: list[list[int]], tmp_path: Path
) -> None:
    """Its config spells fields its own way, and its dense layer's weights carry the wrong name."""
    from safetensors import safe_open
    from transformers.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM

    torch.manual_seed(0)
    config = KimiLinearConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, kv_lora_rank=64, qk_rope_head_dim=16,
        qk_nope_head_dim=32, v_head_dim=32, num_experts_per_tok=2, num_local_experts=8, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, max_position_embeddings=4096, first_k_dense_replace=1, mla_use_nope=True,
        linear_attn_config={
            "kda_layers": [1, 2, 3], "full_attn_layers": [4], "head_dim": 32, "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
    )  # fmt: skip
    model = KimiLinearForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "conv" not in name:
                parameter.normal_(0, 0.08)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert "model.layers.0.block_sparse_moe.gate_proj.weight" in names, "transformers has mended its naming"
    few = prompts[::4]
    answer = engine(tmp_path, few, tokens=16)
    assert "error" not in answer, answer.get("traceback")
    assert_same(tmp_path, answer["rounds"][0], few, lambda ids: model(ids, use_cache=False).logits)


@pytest.mark.parametrize("name", ["tiny-linear", "tiny-attnres"])
def test_committed_checkpoints_equal_the_reference(
    engine: Any, reference: Callable[[Path], Any], prompts: list[list[int]], name: str
) -> None:
    answer = engine(CHECKPOINTS / name, prompts)
    assert "error" not in answer, answer.get("traceback")
    logits = theirs(CHECKPOINTS / name) if name == "tiny-linear" else reference(CHECKPOINTS / name)
    assert_same(CHECKPOINTS / name, answer["rounds"][0], prompts, logits)


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_res_block_size": 2},
        {"attn_res_block_size": 3, "layers": 8, "gate_lower_bound": -5.0},
        {"attn_res_full": True},
    ],
    ids=["block of 2", "block of 3, the last one short, bounded gate", "full"],
)
def test_attention_residuals_equal_the_reference(
    engine: Any,
    checkpoint: Callable[..., Path],
    reference: Callable[[Path], Any],
    prompts: list[list[int]],
    changes: dict[str, Any],
) -> None:
    folder = checkpoint(**changes)
    answer = engine(folder, prompts)
    assert "error" not in answer, answer.get("traceback")
    assert_same(folder, answer["rounds"][0], prompts, reference(folder))


def test_a_model_without_kda_layers(
    engine: Any, checkpoint: Callable[..., Path], reference: Callable[[Path], Any], prompts: list[list[int]]
) -> None:
    """Every layer MLA: the class is hybrid, the model is not; long prompts come in pieces, and come twice."""
    folder = checkpoint(layers=2, kda_layers=[], full_attn_layers=[1, 2])
    few = prompts[::4]
    answer = engine(folder, few, few, tokens=16, max_num_batched_tokens=48)
    assert "error" not in answer, answer.get("traceback")
    for round_ in answer["rounds"]:
        assert_same(folder, round_, few, reference(folder))


@pytest.mark.parametrize("seed", range(3))
def test_random_configs_equal_the_reference(
    engine: Any,
    checkpoint: Callable[..., Path],
    reference: Callable[[Path], Any],
    prompts: list[list[int]],
    seed: int,
) -> None:
    """Layers, heads, experts, widths and the gate drawn anew; the softplus ones against transformers too."""
    draw = random.Random(seed)
    layers = draw.randint(3, 7)
    full = sorted(draw.sample(range(1, layers + 1), draw.randint(1, layers // 2)))
    heads = draw.choice([1, 2, 4, 6])
    changes = {
        "layers": layers,
        "full_attn_layers": full,
        "kda_layers": [i for i in range(1, layers + 1) if i not in full],
        "num_heads": draw.choice([1, 2, 5]),
        "head_dim": draw.choice([16, 48, 64]),
        "short_conv_kernel_size": draw.choice([3, 4]),
        "hidden_size": draw.choice([96, 160]),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "kv_lora_rank": draw.choice([32, 80]),
        "qk_nope_head_dim": draw.choice([16, 40]),
        "qk_rope_head_dim": draw.choice([16, 32]),
        "v_head_dim": draw.choice([16, 24]),
        "q_lora_rank": draw.choice([None, 48]),
        "num_experts": draw.choice([4, 10]),
        "num_experts_per_token": draw.randint(1, 4),
        "num_shared_experts": draw.randint(1, 2),
        "moe_intermediate_size": draw.choice([32, 72]),
        "first_k_dense_replace": draw.randint(0, 2),
        "gate_lower_bound": [None, -5.0, -1.5][seed],
        "vocab_size": 500,
    }
    folder = checkpoint(**changes)
    some = [[t % 497 + 3 for t in prompt] for prompt in prompts[::2]]
    answer = engine(folder, some, tokens=24)
    assert "error" not in answer, answer.get("traceback")
    assert_same(folder, answer["rounds"][0], some, reference(folder))
    if changes["gate_lower_bound"] is None and changes["short_conv_kernel_size"] == 4:
        assert_same(folder, answer["rounds"][0], some, theirs(folder))
