"""What the import hook does to Megatron's training modules: flags, checks, the optimizer, and its log lines."""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import compat, options

if TYPE_CHECKING:
    from .attention import LayerLogits
    from .wrappers import MuonClipChain

_DONE = "_kimi_hooked"


def _functions(module: ModuleType, names: tuple[str, ...]) -> list[Callable[..., Any]]:
    """The functions to replace in `module`. Raises RuntimeError where this Megatron has none of that name."""
    lacking = [name for name in names if not callable(getattr(module, name, None))]
    if lacking:
        raise RuntimeError(
            f"{options.SWITCH} cannot hook {module.__name__}: it has no {', '.join(lacking)}. This Megatron "
            f"({module.__file__}) is not one of {', '.join(f'{s}.x' for s in compat.TESTED)}; use "
            "megatron_kimi.get_megatron_muonclip_optimizer in your own script"
        )
    return [getattr(module, name) for name in names]


def hook_arguments(module: Any) -> None:
    """``megatron.training.arguments``: our flags in its parser, our checks after its own."""
    if getattr(module, _DONE, False):
        return
    add, validate = _functions(module, ("add_megatron_arguments", "validate_args"))

    @functools.wraps(add)
    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return options.add_arguments(add(parser))

    @functools.wraps(validate)
    def validate_args(args: Any, *rest: Any, **named: Any) -> Any:
        if options.is_on(args):
            options.check_arguments(args)
        return validate(args, *rest, **named)

    module.add_megatron_arguments, module.validate_args = add_megatron_arguments, validate_args
    setattr(module, _DONE, True)


def hook_training(module: Any) -> None:
    """``megatron.training.training``: the optimizer that its `setup_model_and_optimizer` asks for."""
    if getattr(module, _DONE, False):
        return
    build, get_args = _functions(module, ("get_megatron_optimizer", "get_args"))

    @functools.wraps(build)
    def get_megatron_optimizer(config: Any, model_chunks: Any, *rest: Any, **named: Any) -> Any:
        args = get_args()
        if not options.is_on(args):
            return build(config, model_chunks, *rest, **named)
        from .factory import describe, get_megatron_muonclip_optimizer

        options.check_arguments(args)
        chain = get_megatron_muonclip_optimizer(
            config, model_chunks, *rest, **named, options=options.from_arguments(args)
        )
        _print_once(f"MuonClip: {describe(chain)}")
        chain.after_step = _reporter(chain, args)
        return chain

    module.get_megatron_optimizer = get_megatron_optimizer
    setattr(module, _DONE, True)


def _print_once(text: str) -> None:
    import torch.distributed as dist

    if dist.get_rank() == 0:
        print(text, flush=True)


def _reporter(chain: MuonClipChain, args: Any) -> Callable[[bool], None] | None:
    """Reports QK-Clip every ``--log-interval`` steps, on standard output and to TensorBoard and W&B if they are on."""
    if chain.clip is None:
        return None
    clip, interval = chain.clip, max(1, getattr(args, "log_interval", 100))
    steps = itertools.count(1)

    def report(successful: bool) -> None:
        # where a loaded checkpoint starts is known only after the optimizer has been built
        step = int(getattr(args, "iteration", 0) or 0) + next(steps)
        if step % interval:
            return
        layers = _over_model(clip.summary() if successful else [])
        if not layers:
            return
        largest = max(layer.largest for layer in layers)
        clipped, heads = sum(layer.clipped for layer in layers), sum(layer.heads for layer in layers)
        _print_once(
            f" [MuonClip] iteration {step}: largest attention logit {largest:.4g}, {clipped} of {heads} heads "
            f"clipped | " + ", ".join(f"{layer.layer} {layer.largest:.4g}" for layer in layers)
        )
        values = {"max": largest, "clipped-heads": clipped / heads}
        _write(values | {layer.layer: layer.largest for layer in layers}, step)

    return report


def _over_model(own: list[LayerLogits]) -> list[LayerLogits]:
    """All layers of the model, from all pipeline stages and the heads of all tensor-parallel ranks."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from .attention import LayerLogits

    group = parallel_state.get_model_parallel_group()
    everything: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everything, own, group=group)
    merged: dict[str, LayerLogits] = {}
    for row in (row for part in everything for row in part):
        known = merged.get(row.layer, LayerLogits(row.layer, float("-inf"), 0, 0))
        merged[row.layer] = LayerLogits(
            row.layer, max(known.largest, row.largest), known.clipped + row.clipped, known.heads + row.heads
        )

    def place(row: LayerLogits) -> tuple[str, int]:
        stack, _, number = row.layer.rpartition("layer ")
        return stack, int(number)

    return sorted(merged.values(), key=place)


def _write(values: dict[str, float], step: int) -> None:
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    tagged = {f"muonclip/{name.replace(' ', '-')}": value for name, value in values.items()}
    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    if writer is not None:
        for tag, value in tagged.items():
            writer.add_scalar(tag, value, step)
    if wandb is not None:
        wandb.log(tagged, step)
