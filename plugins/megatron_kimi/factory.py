"""`get_megatron_muonclip_optimizer`: Megatron's own optimizer chain, with MuonClip inside its wrappers."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import compat
from .attention import QkClip, Slice, attention_layers
from .distributed import Exchange, Group, Matrix, Piece
from .inner import MuonClipInner
from .options import MuonClipOptions
from .weights import MuonWeight, is_expert, muon_weights

if TYPE_CHECKING:
    from .wrappers import MuonClipChain


def get_megatron_muonclip_optimizer(
    config: Any,
    model_chunks: Sequence[Any],
    config_overrides: Any = None,
    use_gloo_process_groups: bool = True,
    pg_collection: Any = None,
    dump_param_to_param_group_map: str | None = None,
    *,
    options: MuonClipOptions | None = None,
) -> MuonClipChain:
    """The MuonClip optimizer of a Megatron model; a drop-in for `megatron.core.optimizer.get_megatron_optimizer`.

    Learning rates, weight decay (groups and schedule), gradient clipping and loss scaling are Megatron's: `config`
    and `config_overrides` mean what they mean there, and the schedule's learning rate serves both kinds of weights.

    Args:
        config: OptimizerConfig with optimizer "adam".
        model_chunks: model chunks in Megatron's DistributedDataParallel.
        config_overrides: as in Megatron.
        use_gloo_process_groups: as in Megatron.
        pg_collection: as in Megatron.
        dump_param_to_param_group_map: as in Megatron.
        options: of MuonClip; Kimi K2's where None.

    Raises:
        ValueError: an option or a model that MuonClip does not serve; the message says what to change.
        RuntimeError: this Megatron lacks something that is needed; the message names it.
    """
    options = MuonClipOptions() if options is None else options
    compat.require()
    _refuse(config, model_chunks)

    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

    from .wrappers import MuonClipChain

    groups = ProcessGroupCollection.setup_process_groups_for_optimizer(
        pg_collection, list(model_chunks), use_gloo_process_groups
    )
    _refuse_groups(groups)
    tensor, expert_tensor = _tensor_groups(pg_collection)
    clip = _qk_clip(options, model_chunks, tensor.size, groups["dp_cp_group"])
    weights = [
        weight
        for chunk in model_chunks
        for weight in muon_weights(
            chunk, options.adamw, options.config.per_head, tensor.size, expert_tensor.size
        )
    ]
    with _inner_optimizer():
        chain = get_megatron_optimizer(
            config,
            list(model_chunks),
            config_overrides=config_overrides,
            use_gloo_process_groups=use_gloo_process_groups,
            pg_collection=pg_collection,
            dump_param_to_param_group_map=dump_param_to_param_group_map,
        )
    for wrapper in chain.chained_optimizers:
        if wrapper.optimizer is None:  # every weight of this rank is frozen
            continue
        _bind(wrapper, weights, options, groups, tensor, expert_tensor, clip)
    return MuonClipChain(chain.chained_optimizers, clip)


@contextlib.contextmanager
def _inner_optimizer() -> Iterator[None]:
    """Have Megatron build its wrappers around `MuonClipInner`.

    `get_megatron_optimizer` takes its Adam and its wrapper from its module's names, which it calls with the same
    arguments in all versions here; so all of its process groups and parameter groups come with it.
    """
    import megatron.core.optimizer as module

    from .wrappers import MuonClipDistributedOptimizer

    ours = {
        "Adam": MuonClipInner,
        "USING_PYTORCH_OPTIMIZER": False,  # else it takes torch.optim.AdamW, not `Adam`
        "DistributedOptimizer": MuonClipDistributedOptimizer,
    }
    theirs = {name: getattr(module, name) for name in ours}
    for name, value in ours.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in theirs.items():
            setattr(module, name, value)


def _refuse(config: Any, model_chunks: Sequence[Any]) -> None:
    if not model_chunks:
        raise ValueError("model_chunks must have at least one chunk, got none")
    ddp = getattr(model_chunks[0], "ddp_config", None)
    if ddp is None:
        raise ValueError(
            f"model_chunks must be in Megatron's DistributedDataParallel, got {type(model_chunks[0]).__name__}"
        )
    if config.optimizer != "adam":
        raise ValueError(
            f"config.optimizer must be 'adam', got {config.optimizer!r}: MuonClip takes its place"
        )
    if not getattr(config, "decoupled_weight_decay", True):
        raise ValueError("config.decoupled_weight_decay must be True: MuonClip's weight decay is decoupled")
    unsupported = {
        "Megatron FSDP": getattr(ddp, "use_megatron_fsdp", False) or getattr(ddp, "use_custom_fsdp", False),
        "fp8_param_gather": getattr(ddp, "fp8_param_gather", False),
        "fp4_param_gather": getattr(ddp, "fp4_param_gather", False),
        "num_distributed_optimizer_instances > 1": getattr(ddp, "num_distributed_optimizer_instances", 1) > 1,
        **{
            name: getattr(config, name, False)
            for name in (
                "optimizer_cpu_offload",
                "use_precision_aware_optimizer",
                "overlap_param_gather_with_optimizer_step",
                "optimizer_cuda_graph",
                "use_layer_wise_distributed_optimizer",
            )
        },
    }
    for name, on in unsupported.items():
        if on:
            raise ValueError(f"{name} does not work with MuonClip: turn it off")


def _refuse_groups(groups: dict[str, Any]) -> None:
    for name in ("gtp_remat_group", "expt_gtp_remat_group"):
        group = groups.get(name)
        if group is not None and torch.distributed.get_world_size(group) > 1:
            raise ValueError(
                f"generalised tensor parallelism ({name}) does not work with MuonClip: turn it off"
            )


def _tensor_groups(pg_collection: Any) -> tuple[Group, Group]:
    """Tensor-parallel groups of dense weights and of experts."""
    from megatron.core import parallel_state

    if pg_collection is not None and hasattr(pg_collection, "tp"):
        return Group.of(pg_collection.tp), Group.of(getattr(pg_collection, "expt_tp", pg_collection.tp))
    return (
        Group.of(parallel_state.get_tensor_model_parallel_group()),
        Group.of(parallel_state.get_expert_tensor_parallel_group(check_initialized=False)),
    )


def _qk_clip(
    options: MuonClipOptions, model_chunks: Sequence[Any], tensor_size: int, group: Any
) -> QkClip | None:
    if options.config.tau == float("inf"):
        return None
    context_size = getattr(model_chunks[0].config, "context_parallel_size", 1)
    layers = [layer for chunk in model_chunks for layer in attention_layers(chunk, tensor_size, context_size)]
    device = next(model_chunks[0].parameters()).device
    return QkClip(layers, options.config, group, device)


def _bind(
    wrapper: Any,
    weights: Sequence[MuonWeight],
    options: MuonClipOptions,
    groups: dict[str, Any],
    tensor: Group,
    expert_tensor: Group,
    clip: QkClip | None,
) -> None:
    """Tell the inner optimizer of `wrapper` which of its master weights are (parts of) which matrices."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if isinstance(wrapper, DistributedOptimizer):
        slices, pieces, data = _shards(wrapper)
    else:
        slices = _masters(wrapper)
        expert = any(is_expert(p) for p in slices)
        data = Group.of(groups["expt_dp_group"] if expert else groups["dp_cp_group"])
        pieces = {p: tuple(Piece(r, 0, p.numel()) for r in range(data.size)) for p in slices}
    matrices = {
        Matrix(w.name, tuple(w.parameter.shape), pieces[w.parameter], w.tensor_dim, w.layout): w
        for w in weights
        if w.parameter in pieces
    }
    exchanges = [
        Exchange([m for m, w in matrices.items() if w.expert == expert], data, group, options.once)
        for expert, group in ((False, tensor), (True, expert_tensor))
    ]
    wrapper.optimizer.bind(
        options.config,
        [e for e in exchanges if e.matrices],
        slices,
        {m: w.parameter for m, w in matrices.items()},
        clip,
    )
    # what Megatron calls to have a state before it reads a checkpoint; it is there since `bind`
    wrapper.init_state_fn = lambda optimizer, _config=None: optimizer.init_state()


def _masters(wrapper: Any) -> dict[nn.Parameter, Slice]:
    """Master weights of the plain mixed-precision or float32 wrapper: whole, the parameter itself in float32."""
    if not hasattr(wrapper, "float16_groups"):
        return {p: Slice(p, 0) for p in wrapper.get_parameters()}
    found = {p: Slice(p, 0) for group in wrapper.fp32_from_fp32_groups for p in group}
    for models, masters in zip(wrapper.float16_groups, wrapper.fp32_from_float16_groups, strict=True):
        found |= {p: Slice(master, 0) for p, master in zip(models, masters, strict=True)}
    return found


def _shards(wrapper: Any) -> tuple[dict[nn.Parameter, Slice], dict[nn.Parameter, tuple[Piece, ...]], Group]:
    """This rank's master shards, where all ranks' shards of every weight are, and the data-parallel group.

    A bucket of a buffer is cut into as many equal ranges as there are ranks, whatever the weights' borders.
    """
    slices = {}
    for parameter, (group, order) in wrapper.model_param_group_index_map.items():
        start = wrapper._get_model_param_range_map(parameter)["param"].start
        slices[parameter] = Slice(wrapper.optimizer.param_groups[group]["params"][order], start)
    pieces = {}
    data = Group.of(wrapper.data_parallel_group)
    for buffer in wrapper.buffers:
        for parameter, (start, stop, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            share = bucket.grad_data.numel() // data.size
            bounds = [bucket.offset + rank * share for rank in range(data.size + 1)]
            pieces[parameter] = tuple(
                Piece(rank, max(start, low) - start, min(stop, high) - start)
                for rank, (low, high) in enumerate(itertools.pairwise(bounds))
                if max(start, low) < min(stop, high)
            )
    return slices, pieces, data


def describe(chain: MuonClipChain) -> str:
    """One line on what takes what, for the log: counts of this rank."""
    inner = [o.optimizer for o in chain.chained_optimizers if o.optimizer is not None]
    parameters = [p for o in inner for g in o.param_groups for p in g["params"]]
    muon = sum(p.numel() for o in inner for g in o.param_groups for p in g["params"] if o.is_matrix(p))
    total = sum(p.numel() for p in parameters)
    layers = len(chain.clip.layers) if chain.clip is not None else 0
    clip = f"QK-Clip on {layers} attention layers" if chain.clip is not None else "no QK-Clip"
    return f"Muon for {muon:,} of {total:,} elements on this rank, AdamW for the rest, {clip}"
