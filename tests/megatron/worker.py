"""What one Megatron process does for the tests: `torchrun worker.py FOLDER` runs the jobs listed in FOLDER/jobs.json.

A start of Megatron takes longer than any of these jobs, so one start serves many. Rank 0 writes FOLDER/results.pt:
for each job its result, or the error that all ranks raised.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
warnings.filterwarnings("ignore")

import cpu_platform  # noqa: E402

cpu_platform.install()

import tiny  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.optimizer import get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer.qk_clip import clip_qk  # noqa: E402
from tiny import Case  # noqa: E402

from megatron_kimi import get_megatron_muonclip_optimizer  # noqa: E402
from megatron_kimi.optimizer import MuonClipConfig  # noqa: E402
from megatron_kimi.options import MuonClipOptions  # noqa: E402

JOBS: dict[str, Callable[..., Any]] = {}


def job(function: Callable[..., Any]) -> Callable[..., Any]:
    JOBS[function.__name__] = function
    return function


def options(once: bool = True, adamw: tuple[str, ...] = (), **config: Any) -> MuonClipOptions:
    """Newton-Schulz in float32 unless told otherwise, so that layouts can be compared."""
    return MuonClipOptions(MuonClipConfig(**{"dtype": "float32", **config}), tuple(adamw), once)


def prepare(
    case: dict[str, Any],
    muon: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    later: dict[str, Any] | None = None,
) -> tuple[Case, Any, Any]:
    """(case, model, MuonClip optimizer) in the layout of `case`; `later` is set in the built model's configuration."""
    built = Case(**case)
    tiny.start(built)
    made = tiny.build_model(built, **model or {})
    chunks = tiny.chunks(made)
    for name, value in (later or {}).items():
        setattr(chunks[0].config, name, value)
    config = tiny.optimizer_config(built, **optimizer or {})
    return built, made, get_megatron_muonclip_optimizer(config, chunks, options=options(**muon or {}))


def snapshot(model: Any, optimizer: Any) -> list[torch.Tensor]:
    """Copies of all that a step may change: weights, master weights, and the optimizer's states and counters."""
    found = [p.detach().clone() for p in model.parameters()]
    for wrapper in optimizer.chained_optimizers:
        inner = wrapper.optimizer
        for group in inner.param_groups:
            found.append(torch.tensor(group["step"]))
            for p in group["params"]:
                found += [p.detach().clone(), *(value.clone() for value in inner.state[p].values())]
    return found


def same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@job
def train(steps: int = 3, **setup: Any) -> dict[str, Any]:
    case, model, optimizer = prepare(**setup)
    history = tiny.train(model, optimizer, tiny.batches(), steps)
    clip = optimizer.clip.summary() if optimizer.clip else []
    return {
        "history": history,
        "weights": tiny.full_weights(model, case),
        "clip": [tuple(row) for row in clip],
    }


@job
def states(**setup: Any) -> dict[str, list[tuple[str, int, int]]]:
    """(name, elements, bytes of optimizer state) of this rank's master weights, by the optimizer that has them."""
    _, model, optimizer = prepare(**setup)
    names = {id(p): tiny.plain(n) for n, p in model.named_parameters()}
    found: dict[str, list[tuple[str, int, int]]] = {"muon": [], "adamw": []}
    for wrapper in optimizer.chained_optimizers:
        inner = wrapper.optimizer
        for parameter, own in inner._slices.items():
            state = inner.state[own.tensor]
            size = sum(value.nbytes for key, value in state.items() if key != "step")
            kind = "muon" if inner.is_matrix(own.tensor) else "adamw"
            found[kind].append((names[id(parameter)], own.tensor.numel(), size))
    return found


@job
def one_step(weight_decay: float = 0.1, lr: float = 0.02, **setup: Any) -> dict[str, Any]:
    """A step from gradients that are made from the weights' names: (weights before, gradients, weights after)."""
    case, model, optimizer = prepare(
        optimizer={"lr": lr, "weight_decay": weight_decay, "clip_grad": 0.0}, **setup
    )
    before = tiny.full_weights(model, case)
    gradients = tiny.set_gradients(model, case)
    optimizer.step()
    return {"before": before, "gradients": gradients, "after": tiny.full_weights(model, case)}


def checkpoint(folder: str, case: Case, model: Any, optimizer: Any, sharding: str, load: bool) -> None:
    """Save or load with Megatron's distributed checkpoints, the way its training loop does."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {
        "distrib_optim_sharding_type": sharding,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": group,
    }
    unwrapped = model.module.module if case.bf16 else model.module
    try:
        weights = unwrapped.sharded_state_dict(metadata=metadata)
    except TypeError:
        weights = unwrapped.sharded_state_dict()
    state = {"model": weights}
    state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=load, metadata=metadata)
    if not load:
        if dist.get_rank() == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
        dist.barrier()
        dist_checkpointing.save(state, folder)
        return
    loaded = dist_checkpointing.load(state, folder)
    unwrapped.load_state_dict(loaded["model"], strict=False)
    optimizer.load_state_dict(loaded["optimizer"])


@job
def save(
    folder: str, steps: int = 2, sharding: str = "fully_reshardable", plain: bool = False, **setup: Any
) -> Any:
    """Train, save, train on: what the steps after the checkpoint give. `plain` saves Megatron's AdamW instead."""
    if plain:
        case = Case(**setup["case"])
        tiny.start(case)
        model = tiny.build_model(case)
        optimizer = get_megatron_optimizer(tiny.optimizer_config(case), [model])
    else:
        case, model, optimizer = prepare(**setup)
    data = tiny.batches()
    tiny.train(model, optimizer, data, steps)
    checkpoint(folder, case, model, optimizer, sharding, load=False)
    history = tiny.train(model, optimizer, data, steps)
    return {"history": history, "weights": tiny.full_weights(model, case)}


@job
def resume(folder: str, steps: int = 2, sharding: str = "fully_reshardable", **setup: Any) -> Any:
    """Load what `save` saved into a fresh model and go on with the data after it."""
    case, model, optimizer = prepare(**setup)
    tiny.scramble(model)
    checkpoint(folder, case, model, optimizer, sharding, load=True)
    data = tiny.batches()
    for _ in range(steps * tiny.MICROBATCHES // tiny.data_ranks()):
        next(data)
    history = tiny.train(model, optimizer, data, steps)
    return {"history": history, "weights": tiny.full_weights(model, case)}


@job
def plain_state_dict(**setup: Any) -> Any:
    """`state_dict` and `load_state_dict` of the optimizer without sharding, mid-training."""
    case, model, optimizer = prepare(**setup)
    data = tiny.batches()
    tiny.train(model, optimizer, data, 2)
    saved = torch.load(
        tiny.in_memory({"m": model.state_dict(), "o": optimizer.state_dict()}), weights_only=False
    )
    expected = tiny.train(model, optimizer, data, 2), tiny.full_weights(model, case)

    case, model, optimizer = prepare(**setup)
    model.load_state_dict(saved["m"])
    optimizer.load_state_dict(saved["o"])
    data = tiny.batches()
    for _ in range(2 * tiny.MICROBATCHES // tiny.data_ranks()):
        next(data)
    return {
        "expected": expected,
        "got": (tiny.train(model, optimizer, data, 2), tiny.full_weights(model, case)),
    }


@job
def clip_like_upstream(tau: float, alpha: float, **setup: Any) -> dict[str, Any]:
    """Ours and Megatron's `clip_qk` on the same weights and logits: model and master weights of both."""
    upstream = {"qk_clip": True, "qk_clip_threshold": tau, "qk_clip_alpha": alpha}
    results = {}
    for who in ("theirs", "ours"):
        case, model, optimizer = prepare(model=upstream, muon={"tau": tau, "alpha": alpha}, **setup)
        layers = optimizer.clip.layers
        for n, layer in enumerate(layers):
            logits = tau * torch.linspace(0.5, 2.0 + n, layer.heads)
            layer.core.current_max_attn_logits = logits.clone()
        if who == "theirs":
            clip_qk([model])
        else:
            for wrapper in optimizer.chained_optimizers:
                optimizer.clip.clip_(wrapper.optimizer._slices)
                wrapper._copy_main_params_to_model_params()
            optimizer.clip.finish()
        masters = {n: p.main_param.clone() for n, p in model.named_parameters() if hasattr(p, "main_param")}
        results[who] = {"weights": tiny.full_weights(model, case), "masters": masters}
    return results


@job
def upstream_clip(tau: float, **setup: Any) -> None:
    """Megatron's `clip_qk` after a step, with logits over the threshold."""
    upstream = {"qk_clip": True, "qk_clip_threshold": tau}
    _, model, optimizer = prepare(model=upstream, muon={"tau": float("inf")}, **setup)
    tiny.train(model, optimizer, tiny.batches(), 1)
    for module in model.modules():
        if hasattr(module, "core_attention"):
            module.core_attention.current_max_attn_logits = torch.full((tiny.HEADS,), 2 * tau)
    clip_qk([model])


@job
def clip_holds(tau: float, **setup: Any) -> list[float]:
    """Largest logits of one batch before and after a step with learning rate 0: only the clip moves weights."""
    _, model, optimizer = prepare(muon={"tau": tau}, optimizer={"lr": 0.0, "weight_decay": 0.0}, **setup)
    largest = []
    for _ in range(2):
        tiny.train(model, optimizer, tiny.batches(), 1)
        largest.append(max(row.largest for row in optimizer.clip.summary()))
    return largest


@job
def skipped(tau: float, **setup: Any) -> dict[str, Any]:
    """A step whose gradients overflow is skipped: nothing changes, and its logits are forgotten."""
    case, model, optimizer = prepare(muon={"tau": tau}, optimizer={"loss_scale": 1.0}, **setup)
    before, weights = snapshot(model, optimizer), tiny.full_weights(model, case)
    tiny.backward(model, optimizer, tiny.batches())
    for p in model.parameters():
        p.main_grad.fill_(float("inf"))
    updated, _, _ = optimizer.step()
    unchanged = same(before, snapshot(model, optimizer))
    recorded = any(layer.largest is not None for layer in optimizer.clip.layers)
    history = tiny.train(model, optimizer, tiny.batches(), 1)
    return {
        "updated": updated,
        "before": weights,
        "unchanged": unchanged,
        "recorded": recorded,
        "after": history[0]["updated"],
        "final": tiny.full_weights(model, case),
    }


@job
def loss_scaling(**setup: Any) -> dict[str, Any]:
    """Float16 with a loss scale that starts far too high, on one batch until three steps were applied; and those
    three steps with the scale they had, set by hand."""
    scaling = {"initial_loss_scale": 2.0**28, "hysteresis": 1, "min_loss_scale": 1.0}
    case, model, optimizer = prepare(optimizer=scaling, **setup)
    steps = []
    while sum(updated for updated, _, _ in steps) < 3 and len(steps) < 40:
        before = snapshot(model, optimizer)
        scale = float(optimizer.get_loss_scale())
        (step,) = tiny.train(model, optimizer, tiny.batches(), 1)
        steps.append((step["updated"], scale, same(before, snapshot(model, optimizer))))
    got = tiny.full_weights(model, case)
    case, model, optimizer = prepare(optimizer={"loss_scale": steps[-1][1]}, **setup)
    for _ in range(3):
        tiny.train(model, optimizer, tiny.batches(), 1)
    return {"steps": steps, "got": got, "expected": tiny.full_weights(model, case)}


@job
def learning_rates(**setup: Any) -> dict[str, Any]:
    """Megatron's scheduler drives the learning rate and weight decay of MuonClip's groups."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    case, model, optimizer = prepare(**setup)
    scheduler = OptimizerParamScheduler(
        optimizer, 0.0, 0.02, 0.0, 2, 10, "linear", 0.1, 0.3, 10, "linear",
        use_checkpoint_opt_param_scheduler=False, override_opt_param_scheduler=True,
    )  # fmt: skip
    before = tiny.full_weights(model, case)
    scheduler.step(0)
    tiny.train(model, optimizer, tiny.batches(), 1)  # at learning rate 0 nothing moves
    still = tiny.full_weights(model, case)
    scheduler.step(1)
    tiny.train(model, optimizer, tiny.batches(), 1)
    groups = [(g["lr"], g["weight_decay"], g["wd_mult"]) for g in optimizer.param_groups if g["params"]]
    return {"before": before, "still": still, "moved": tiny.full_weights(model, case), "groups": groups}


@job
def hybrid(**setup: Any) -> Any:
    """A HybridModel with attention, MLP and attention-free layers (Megatron 0.19)."""
    case = Case(**setup["case"])
    tiny.start(case)
    model = tiny.build_hybrid(case)
    optimizer = get_megatron_muonclip_optimizer(
        tiny.optimizer_config(case), [model], options=options(tau=0.05)
    )
    history = tiny.train(model, optimizer, tiny.batches(), 3)
    return {"history": history, "layers": [row.layer for row in optimizer.clip.summary()]}


@job
def self_reported(**setup: Any) -> Any:
    """An attention that reports its own largest logits, as Transformer Engine does when told to."""
    _, model, optimizer = prepare(**setup)
    for layer in optimizer.clip.layers:
        layer.core.current_max_attn_logits = torch.arange(1.0, layer.heads + 1)
    tiny.train(model, optimizer, tiny.batches(), 1)
    summary = [tuple(row) for row in optimizer.clip.summary()]
    kept = [layer.core.current_max_attn_logits is not None for layer in optimizer.clip.layers]
    tiny.backward(model, optimizer, tiny.batches())
    cleared = [layer.core.current_max_attn_logits is None for layer in optimizer.clip.layers]
    return {"summary": summary, "kept": kept, "cleared": cleared}


@job
def bytes_sent(steps: int = 1, **setup: Any) -> dict[str, int]:
    """Bytes that MuonClip's own exchange puts on the wire in a step, this rank's share."""
    from megatron_kimi import distributed

    _, model, optimizer = prepare(**setup)
    sent = {"calls": 0, "bytes": 0}
    real = dist.all_to_all_single

    def counted(output: torch.Tensor, given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent["calls"] += 1
        sent["bytes"] += given.nbytes
        return real(output, given, *args, **kwargs)

    distributed.dist.all_to_all_single = counted
    try:
        tiny.train(model, optimizer, tiny.batches(), steps)
    finally:
        distributed.dist.all_to_all_single = real
    total = torch.tensor([sent["bytes"]])
    dist.all_reduce(total)
    return {
        **sent,
        "all_bytes": int(total),
        "elements": sum(m.numel for e in _exchanges(optimizer) for m in e.matrices),
    }


def _exchanges(optimizer: Any) -> list[Any]:
    return [e for wrapper in optimizer.chained_optimizers for e in wrapper.optimizer._exchanges]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    for name, (kind, arguments) in json.loads((folder / "jobs.json").read_text()).items():
        try:
            results[name] = JOBS[kind](**arguments)
        except BaseException as error:  # a job may be there to fail; a CheckpointException is no Exception
            results[name] = {
                "error": type(error).__name__,
                "message": str(error),
                "trace": traceback.format_exc(),
            }
        dist.barrier()
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
