"""The ``--muonclip-*`` flags: from a command line, a YAML file's namespace, or keyword arguments."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from dataclasses import dataclass, field
from typing import Any

from kimi_kernels.muon import COEFFICIENTS

from .optimizer import DTYPES, MuonClipConfig, flag
from .qk_clip import GQA_RULES

ENVIRONMENT = "MEGATRON_KIMI"
SWITCH = "--use-muonclip"
# Megatron's defaults that differ from Kimi K2's training (Moonlight, section 3; K2, section 2.5). A flag still wins.
PAPER_DEFAULTS = {"weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95}


@dataclass(frozen=True)
class MuonClipOptions:
    """What ``--use-muonclip`` is told.

    Args:
        config: the maths. Its `weight_decay` is not used here: Megatron's own ``--weight-decay`` and its schedule are.
        adamw: patterns (fnmatch) of names of matrices that AdamW takes too, besides embeddings, head and vectors.
        once: one rank orthogonalises each matrix and sends the result; otherwise every rank that holds a part does.
    """

    config: MuonClipConfig = field(default_factory=MuonClipConfig)
    adamw: tuple[str, ...] = ()
    once: bool = True


_HELP = {
    "momentum": "momentum of Muon",
    "nesterov": "orthogonalise the Nesterov form of the momentum",
    "steps": "Newton-Schulz iterations",
    "coefficients": "coefficients of Newton-Schulz",
    "update_rms": "root mean square of an update before the learning rate: an [n, m] update is "
    "update-rms * sqrt(max(n, m)) times an orthogonal matrix, so learning rates of AdamW carry over",
    "eps": "added to the norm that Newton-Schulz divides by",
    "dtype": "arithmetic of Newton-Schulz, and what matrices are sent as",
    "per_head": "orthogonalise queries, keys and values head by head",
    "tau": "QK-Clip: largest attention logit that is let pass; inf turns clipping off",
    "alpha": "QK-Clip: the query's share of a clip",
    "gqa_rule": "QK-Clip with grouped-query attention: clip a group with its key by its largest logit (group), or "
    "leave the shared key and clip each query head on its own (head)",
}
_CHOICES = {"coefficients": tuple(COEFFICIENTS), "dtype": tuple(DTYPES), "gqa_rule": GQA_RULES}


def _fields() -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(MuonClipConfig) if f.name in _HELP]


def asked_for() -> bool:
    """MuonClip was asked for on the command line or in the environment."""
    return SWITCH in sys.argv or os.environ.get(ENVIRONMENT) == "1"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our flags to Megatron's parser and, where MuonClip is asked for, set the paper's defaults."""
    group = parser.add_argument_group(
        "MuonClip",
        "The optimizer of Kimi K2: Muon for matrices, AdamW for embeddings, head, norms and vectors, and QK-Clip. "
        f"With it the defaults of {', '.join('--' + n.replace('_', '-') for n in PAPER_DEFAULTS)} are "
        f"{', '.join(str(v) for v in PAPER_DEFAULTS.values())}.",
    )
    group.add_argument(
        SWITCH,
        action="store_true",
        default=os.environ.get(ENVIRONMENT) == "1",
        help=f"train with MuonClip; leave --optimizer at adam (also: {ENVIRONMENT}=1)",
    )
    for option in _fields():
        name, default = flag(option.name), option.default
        text = f"{_HELP[option.name]} (default: {default})"
        if isinstance(default, bool):
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=text)
        else:
            group.add_argument(
                name, type=type(default), default=default, choices=_CHOICES.get(option.name), help=text
            )
    group.add_argument(
        flag("adamw"),
        nargs="*",
        default=[],
        metavar="PATTERN",
        help="names of matrices that AdamW takes too, e.g. '*.router.weight' (default: none)",
    )
    group.add_argument(
        flag("once"),
        action=argparse.BooleanOptionalAction,
        default=True,
        help="one rank orthogonalises each matrix and sends the result; otherwise every rank that holds a part of "
        "it fetches and orthogonalises it (default: True)",
    )
    if asked_for():
        parser.set_defaults(**PAPER_DEFAULTS)
    return parser


def is_on(args: Any) -> bool:
    """MuonClip is on for these arguments; a YAML file has its own `use_muonclip`, or the environment says so."""
    return bool(getattr(args, "use_muonclip", os.environ.get(ENVIRONMENT) == "1"))


def from_arguments(args: Any) -> MuonClipOptions:
    """The options in Megatron's argument namespace; a missing one has its default.

    Raises:
        ValueError: a value out of range; the message names the flag.
    """
    config = MuonClipConfig(
        **{
            f.name: getattr(args, f"muonclip_{f.name}")
            for f in _fields()
            if hasattr(args, f"muonclip_{f.name}")
        }
    )
    adamw = getattr(args, "muonclip_adamw", None) or ()
    if isinstance(adamw, str):
        adamw = (adamw,)
    return MuonClipOptions(config, tuple(adamw), bool(getattr(args, "muonclip_once", True)))


def check_arguments(args: Any) -> None:
    """Refuse values and combinations that a look at the arguments can tell, before anything is built.

    Raises:
        ValueError: what is wrong and which flag to change.
    """
    from_arguments(args)
    optimizer = getattr(args, "optimizer", "adam")
    if optimizer != "adam":
        raise ValueError(f"--optimizer must be adam with {SWITCH}, got {optimizer}: remove one of the two")
    if getattr(args, "qk_clip", False):
        raise ValueError(f"--qk-clip is Megatron's own, {SWITCH} has QK-Clip in it: remove --qk-clip")
    for name, text in (
        ("use_megatron_fsdp", "--use-megatron-fsdp"),
        ("use_torch_fsdp2", "--use-torch-fsdp2"),
        ("optimizer_cpu_offload", "--optimizer-cpu-offload"),
        ("use_precision_aware_optimizer", "--use-precision-aware-optimizer"),
        ("fp8_param_gather", "--fp8-param-gather"),
        ("overlap_param_gather_with_optimizer_step", "--overlap-param-gather-with-optimizer-step"),
        ("optimizer_cuda_graph", "--optimizer-cuda-graph"),
        ("use_layer_wise_distributed_optimizer", "--use-layer-wise-distributed-optimizer"),
    ):
        if getattr(args, name, False):
            raise ValueError(f"{text} does not work with {SWITCH}: remove one of the two")
    if getattr(args, "num_distributed_optimizer_instances", 1) not in (None, 1):
        raise ValueError(
            f"--num-distributed-optimizer-instances must be 1 with {SWITCH}, "
            f"got {args.num_distributed_optimizer_instances}"
        )
