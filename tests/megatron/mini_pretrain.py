"""A pretraining script on `megatron.training` 0.19 as a user writes one: it does not know of MuonClip.

Two lines are for these tests alone: the CPU platform, and a name of `typing` that Megatron 0.19 wants Python 3.12 for.
"""

from __future__ import annotations

import sys
import typing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import cpu_platform
import typing_extensions

cpu_platform.install()
typing.override = typing_extensions.override  # type: ignore[attr-defined]

import torch  # noqa: E402
from megatron.core.datasets import utils as dataset_utils  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402

dataset_utils.compile_helpers = lambda: None  # the wheel has no Makefile for it, and this data needs none

from megatron.training import get_args, pretrain  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args  # noqa: E402


def model_provider(pre_process: bool = True, post_process: bool = True, **_: Any) -> GPTModel:
    args = get_args()
    return GPTModel(
        core_transformer_config_from_args(args),
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=64,
        max_sequence_length=args.seq_length,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type="rope",
    )


class Counting(torch.utils.data.Dataset):
    """Sequences that count upwards, each from its own start."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"tokens": (torch.arange(17) * (1 + index % 3) + index) % 64}


def datasets(_: Any, *__: Any, **___: Any) -> tuple[Counting, None, None]:
    return Counting(), None, None


def forward_step(data: Any, model: Any) -> tuple[torch.Tensor, Any]:
    tokens = next(data)["tokens"]
    positions = torch.arange(16)[None].expand(len(tokens), 16)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
    output = model(tokens[:, :-1].contiguous(), positions, mask, labels=tokens[:, 1:].contiguous())

    def loss(out: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        value = out.float().mean()
        return value, {"lm loss": value.detach().clone().view(1)}

    return output, loss


if __name__ == "__main__":
    arguments = parse_and_validate_args()
    pretrain(
        pretrain_cfg_container_from_args(arguments),
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider,
    )
