"""Small Megatron models that train on a CPU, the same weights and data in every layout. For the tests' workers.

Import after `cpu_platform.install()`.
"""

from __future__ import annotations

import io
import itertools
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

VOCABULARY, TOKENS, SEQUENCES = 64, 16, 2
MICROBATCHES = 4  # over all data-parallel ranks
HEADS, LAYERS, HIDDEN, FFN, EXPERTS = 4, 2, 32, 64, 4


@dataclass(frozen=True)
class Case:
    """A model and how it is spread over the processes.

    Args:
        model: "gpt" (grouped-query attention, SwiGLU), "mla", "moe" or "mtp".
        vpp: model chunks on each pipeline rank (the interleaved schedule); None is one, without it.
        distributed: Megatron's distributed optimizer.
        fp16: float16 weights with loss scaling.
        overlap: overlap gradient reduction (and, with `distributed`, parameter gathering) with computation.
        bucket: elements of a gradient bucket; None is one bucket.
    """

    model: str = "gpt"
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    layers: int = LAYERS
    distributed: bool = False
    bf16: bool = False
    fp16: bool = False
    overlap: bool = False
    bucket: int | None = None
    init_scale: float = 0.08
    lr: float = 0.02
    clip_grad: float = 1.0

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


class LocalLatentAttention(DotProductAttention):
    """Megatron's own torch attention, for MLA: values may be narrower than keys."""

    def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if v_channels:  # Megatron makes one without them first, and throws it away
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


def start(case: Case) -> None:
    """Make the process groups of `case`, after those of an earlier one."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()  # forgets the groups, whose threads live on
        for group in list(torch.distributed.distributed_c10d._world.pg_map):
            if group is not torch.distributed.group.WORLD:
                torch.distributed.destroy_process_group(group)
    parallel_state.initialize_model_parallel(case.tp, case.pp, case.vpp, expert_model_parallel_size=case.ep)
    tensor_parallel.random.initialize_rng_tracker(force_reset=True)
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def model_config(case: Case, **changes: Any) -> TransformerConfig:
    options: dict[str, Any] = {
        "num_layers": case.layers,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "ffn_hidden_size": FFN,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "bf16": case.bf16,
        "fp16": case.fp16,
        "params_dtype": case.dtype,
        "pipeline_dtype": case.dtype,
        "tensor_model_parallel_size": case.tp,
        "pipeline_model_parallel_size": case.pp,
        "virtual_pipeline_model_parallel_size": case.vpp,
        # Two stages are each other's next and previous one, so batched messages of the interleaved schedule swap
        # gradients and activations; Megatron's arguments refuse that, and have this by default.
        "overlap_p2p_comm": case.vpp is not None,
        "batch_p2p_comm": case.vpp is None,
        "expert_model_parallel_size": case.ep,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "bias_activation_fusion": False,
        "persist_layer_norm": False,
        "deallocate_pipeline_outputs": False,
    }
    if case.model == "moe":
        options |= {
            "num_moe_experts": EXPERTS,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": FFN // 2,
            "moe_token_dispatcher_type": "allgather",
            "moe_router_load_balancing_type": "none",
            "moe_grouped_gemm": False,
        }
    if case.model == "mtp":
        options |= {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.3}
    if case.model == "mla":
        options |= {
            "multi_latent_attention": True,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_head_dim": 8,
            "qk_pos_emb_head_dim": 4,
            "v_head_dim": 8,
            "rope_type": "rope",
        }
        return MLATransformerConfig(**options | changes)
    return TransformerConfig(**{"num_query_groups": 2} | options | changes)


def build_model(case: Case, **changes: Any) -> Any:
    """The model of this rank, in Megatron's data-parallel wrapper, initialised by the names of its weights.

    With the interleaved schedule a list of its chunks.
    """
    config = model_config(case, **changes)
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        multi_latent_attention=config.multi_latent_attention,
        normalization="RMSNorm",
    )
    if case.model == "mla":
        import megatron.core.transformer.multi_latent_attention as mla

        mla.HAVE_TE = False  # 0.16.1 believes in Transformer Engine where only its import guard is present
        spec.submodules.self_attention.submodules.core_attention = LocalLatentAttention
    if case.model == "moe":
        import megatron.core.transformer.moe.moe_utils as moe_utils

        moe_utils.te_general_gemm = None  # 0.16.1 leaves the name undefined without Transformer Engine
    extra: dict[str, Any] = {}
    if case.model == "mtp":
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

        extra["mtp_block_spec"] = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    built = []
    for chunk in range(case.vpp or 1):
        place = {"ignore_virtual": False, "vp_stage": None if case.vpp is None else chunk}
        model = GPTModel(
            config,
            spec,
            vocab_size=VOCABULARY,
            max_sequence_length=TOKENS,
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            vp_stage=place["vp_stage"],
            **extra,
        )
        built.append(wrap(model, config, case, chunk))
    return built[0] if case.vpp is None else built


def chunks(model: Any) -> list[Any]:
    return model if isinstance(model, list) else [model]


def wrap(model: Any, config: TransformerConfig, case: Case, chunk: int = 0) -> Any:
    """`model`, initialised, in Megatron's wrappers for precision and data parallelism."""
    initialise(model, case, chunk)
    if case.bf16 or case.fp16:
        model = Float16Module(config, model)
    wrapped = DistributedDataParallel(
        config=config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=case.distributed,
            overlap_grad_reduce=case.overlap,
            overlap_param_gather=case.overlap and case.distributed,
            bucket_size=case.bucket,
        ),
        module=model,
    )
    config.finalize_model_grads_func = finalize_model_grads
    if case.overlap:
        config.no_sync_func = wrapped.no_sync
        config.grad_sync_func = None
    return wrapped


def build_hybrid(case: Case) -> Any:
    """Attention and MLP layers of their own in Megatron's HybridModel (0.19): '*' attention, '-' MLP."""
    import megatron.core.models.hybrid.hybrid_block as hybrid_block
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    hybrid_block.TENorm = WrappedTorchNorm  # its final norm is Transformer Engine's in any spec
    parts = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=parts.input_layernorm,
        self_attention=parts.self_attention,
        self_attn_bda=parts.self_attn_bda,
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=parts.pre_mlp_layernorm, mlp=parts.mlp, mlp_bda=parts.mlp_bda
    )
    stack = HybridStackSubmodules(
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(module=TransformerLayer, submodules=mlp),
    )
    config = model_config(case, num_layers=4, is_hybrid_model=True)
    model = HybridModel(
        config,
        hybrid_stack_spec=ModuleSpec(module=HybridStack, submodules=stack),
        vocab_size=VOCABULARY,
        max_sequence_length=TOKENS,
        hybrid_layer_pattern="*-*-",
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    return wrap(model, config, case)


def optimizer_config(case: Case, **changes: Any) -> OptimizerConfig:
    return OptimizerConfig(
        **{
            "optimizer": "adam",
            "lr": case.lr,
            "min_lr": 0.0,
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
            "bf16": case.bf16,
            "fp16": case.fp16,
            "params_dtype": case.dtype,
            "use_distributed_optimizer": case.distributed,
            "overlap_param_gather": case.overlap and case.distributed,
            "clip_grad": case.clip_grad,
        }
        | changes
    )


def plain(name: str) -> str:
    """`name` without Megatron's wrappers."""
    return re.sub(r"^(module\.)+", "", name)


def global_name(name: str, case: Case, chunk: int = 0) -> str:
    """`name` as it is called in a model that is not cut over pipeline stages or expert ranks."""
    name = plain(name)
    stage = chunk * case.pp + parallel_state.get_pipeline_model_parallel_rank()
    before = stage * (case.layers // case.pp // (case.vpp or 1))
    name = re.sub(r"^decoder\.layers\.(\d+)", lambda m: f"decoder.layers.{int(m[1]) + before}", name)
    first = parallel_state.get_expert_model_parallel_rank() * (EXPERTS // case.ep)
    return re.sub(r"local_experts\.(\d+)", lambda m: f"local_experts.{int(m[1]) + first}", name)


def cut_dim(name: str, parameter: torch.Tensor) -> int | None:
    """Dimension that is cut over the tensor-parallel group."""
    if not getattr(parameter, "tensor_model_parallel", False) and "experts" not in name:
        return None
    dim = getattr(parameter, "partition_dim", -1)
    return dim if dim >= 0 else None


def _halves(name: str) -> int:
    """A SwiGLU projection is [gate; up], each cut on its own."""
    return 2 if "linear_fc1" in name else 1


def initialise(model: Any, case: Case, chunk: int) -> None:
    for local, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            name = global_name(local, case, chunk)
            full = _by_name(name, parameter, name, case) * case.init_scale
            parameter.data.copy_(_own_part(full, parameter, name, case))


def _by_name(seed: str, parameter: torch.Tensor, name: str, case: Case) -> torch.Tensor:
    """Standard normal numbers that depend on `seed` alone, in the shape of the whole parameter."""
    dim, shape = cut_dim(name, parameter), list(parameter.shape)
    if dim is not None:
        shape[dim] *= _cut_size(parameter, case)
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(seed.encode())))


def _own_part(full: torch.Tensor, parameter: torch.Tensor, name: str, case: Case) -> torch.Tensor:
    dim, size = cut_dim(name, parameter), _cut_size(parameter, case)
    if dim is None or size == 1:
        return full
    rank = parallel_state.get_tensor_model_parallel_rank()
    return torch.cat([half.chunk(size, dim)[rank] for half in full.chunk(_halves(name), dim)], dim)


def _cut_size(parameter: torch.Tensor, case: Case) -> int:
    # experts are not cut: their tensor-parallel size is that of the dense layers divided among expert ranks
    return (
        case.tp
        if getattr(parameter, "allreduce", True)
        else parallel_state.get_expert_tensor_parallel_world_size()
    )


def batches() -> Iterator[torch.Tensor]:
    """Micro-batches of this data-parallel rank, [SEQUENCES, TOKENS + 1]; all ranks together see the same data."""
    generator = torch.Generator().manual_seed(5)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    while True:
        step = torch.randint(0, VOCABULARY, (MICROBATCHES, SEQUENCES, TOKENS + 1), generator=generator)
        yield from step[rank * MICROBATCHES // size : (rank + 1) * MICROBATCHES // size]


def forward_step(data: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Callable]:
    tokens = next(data)
    positions = torch.arange(TOKENS)[None].expand(SEQUENCES, TOKENS)
    mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).triu(1)
    labels = tokens[:, 1:].contiguous()
    extra = {"loss_mask": torch.ones_like(labels, dtype=torch.float32)}
    output = model(tokens[:, :-1].contiguous(), positions, mask, labels=labels, **extra)

    def loss(out: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        value = out.float().mean()
        return value, {"loss": value.detach().clone()}

    return output, loss


def backward(model: Any, optimizer: Any, data: Iterator[torch.Tensor]) -> float:
    """Gradients of one global batch; its mean loss, on every rank."""
    parts = chunks(model)
    for chunk in parts:
        chunk.zero_grad_buffer()
        chunk.config.grad_scale_func = optimizer.scale_loss
    optimizer.zero_grad()
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=list(itertools.tee(data, len(parts))) if len(parts) > 1 else data,
        model=parts,
        num_microbatches=MICROBATCHES // data_ranks(),
        seq_length=TOKENS,
        micro_batch_size=SEQUENCES,
        forward_only=False,
    )
    total = torch.tensor([sum(float(o["loss"]) for o in outputs or [])], dtype=torch.float64)
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(total, op=dist.ReduceOp.MAX, group=parallel_state.get_pipeline_model_parallel_group())
    return float(total) / MICROBATCHES


def train(model: Any, optimizer: Any, data: Iterator[torch.Tensor], steps: int) -> list[dict[str, float]]:
    """Train and return loss, gradient norm and whether the step was applied, of each step."""
    history = []
    for _ in range(steps):
        loss = backward(model, optimizer, data)
        updated, norm, _ = optimizer.step()
        history.append({"loss": loss, "norm": float(norm or 0.0), "updated": float(updated)})
    return history


def data_ranks() -> int:
    return parallel_state.get_data_parallel_world_size()


def scramble(model: Any) -> None:
    """Weights that a checkpoint must replace."""
    for parameter in model.parameters():
        parameter.data.fill_(0.5)


def in_memory(value: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def set_gradients(model: Any, case: Case) -> dict[str, torch.Tensor]:
    """Set this rank's part of gradients that depend on the names alone; those of matrices, whole."""
    gradients = {}
    for local, parameter in model.named_parameters():
        name = global_name(local, case)
        full = _by_name(f"gradient of {name}", parameter, name, case)
        gradients[name] = full
        parameter.main_grad.copy_(_own_part(full, parameter, name, case))
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, gradients)
    return {name: value for part in everything for name, value in part.items()}


def full_weights(model: Any, case: Case) -> dict[str, torch.Tensor]:
    """All weights of the whole model in float32, put together from all ranks; on every rank."""
    if case.overlap and case.distributed:
        model.start_param_sync(force_sync=True)
    named = [
        (global_name(local, case, number), parameter)
        for number, chunk in enumerate(chunks(model))
        for local, parameter in chunk.named_parameters()
    ]
    pieces = {}
    for name, parameter in named:
        dim = cut_dim(name, parameter)
        cut = dim is not None and _cut_size(parameter, case) > 1
        rank = parallel_state.get_tensor_model_parallel_rank() if cut else 0
        pieces[name, rank] = (parameter.detach().float().clone(), dim if cut else None)
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, pieces)
    parts: dict[str, dict[int, Any]] = {}
    for rank_pieces in everything:
        for (name, rank), value in rank_pieces.items():
            parts.setdefault(name, {})[rank] = value
    weights = {}
    for name, by_rank in parts.items():
        dim = by_rank[0][1]
        if dim is None:
            weights[name] = by_rank[0][0]
            continue
        halves = [by_rank[r][0].chunk(_halves(name), dim) for r in sorted(by_rank)]
        weights[name] = torch.cat([torch.cat(column, dim) for column in zip(*halves, strict=True)], dim)
    return weights
