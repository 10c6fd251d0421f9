"""NoPE multi-head latent attention over vLLM's paged cache: one row of latent and shared key channels per token.

The layer reports plain attention with one head of the latent's width to vLLM, not MLA: the CPU platform turns
chunked prefill and prefix caching off for models it knows as MLA, because of limits of its own MLA kernel that
ours does not have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import ReplicatedLinear, RowParallelLinear
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec

from kimi_kernels import batched_linear, mla_paged_attention
from kimi_models import KimiLinearConfig
from kimi_models.config import LATENT_NORM_EPS
from vllm_kimi.norm import KimiRMSNorm

# Cache pages hold a multiple of this many tokens; the kernels themselves take any number.
BLOCK_STEP = 16


@dataclass
class LatentMetadata:
    """One batch as the latent attention needs it: where new rows go, and each request's pages and lengths.

    `block` and `offset` are int64 [tokens]; the others are int32 as in `kimi_kernels.mla_paged_attention`.
    """

    num_tokens: int
    block: torch.Tensor
    offset: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata]):
    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size = kv_cache_spec.block_size

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LatentMetadata:
        m = common_attn_metadata
        slots = m.slot_mapping[: m.num_actual_tokens]
        return LatentMetadata(
            num_tokens=m.num_actual_tokens,
            block=slots // self.block_size,
            offset=slots % self.block_size,
            block_table=m.block_table_tensor[: m.num_reqs],
            seq_lens=m.seq_lens[: m.num_reqs],
            cu_seqlens_q=m.query_start_loc[: m.num_reqs + 1],
        )


class LatentBackend(AttentionBackend):
    """Names the metadata builder and the shape of the cache to vLLM; the layer itself computes."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "KIMI_LATENT"

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        return LatentMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_STEP)]

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """One row per token for all heads, and no value beside it."""
        return replace(spec, num_kv_heads=1, head_size_v=0)


class KimiLatentAttention(nn.Module, AttentionLayerBase):
    """MLA of Kimi Linear without rotary embedding, computed over the latent (absorbed) form.

    Heads are split over tensor-parallel ranks; the latent and its cache are held by each rank whole.
    """

    def __init__(self, config: KimiLinearConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.num_heads = config.num_attention_heads // get_tensor_model_parallel_world_size()
        self.nope_dim = config.qk_nope_head_dim
        self.qk_dim = config.qk_head_dim
        self.v_dim = config.v_head_dim
        self.rank = config.kv_lora_rank
        self.latent_dim = config.latent_dim
        self.scale = config.qk_head_dim**-0.5
        self.dtype = vllm_config.model_config.dtype
        self.q_rank = config.q_lora_rank
        hidden = config.hidden_size

        query = self.num_heads * self.qk_dim
        # One matrix product for all that reads the hidden state; with a query latent that is its down projection.
        self.splits = (query if self.q_rank is None else self.q_rank, self.latent_dim)
        self.in_proj = ReplicatedLinear(
            hidden, sum(self.splits), bias=False, prefix=f"{prefix}.in_proj", return_bias=False
        )
        if self.q_rank is not None:
            self.q_norm = KimiRMSNorm(self.q_rank, eps=LATENT_NORM_EPS)
            self.q_up = ReplicatedLinear(
                self.q_rank, query, bias=False, prefix=f"{prefix}.q_up", return_bias=False
            )
        self.latent_norm = KimiRMSNorm(self.rank, eps=LATENT_NORM_EPS)
        # Not a linear layer: the absorbed form reads the weight itself, which CPU linear layers give up.
        self.kv_up = nn.Parameter(
            torch.empty(self.num_heads, self.nope_dim + self.v_dim, self.rank), requires_grad=False
        )
        self.key_up: torch.Tensor | None = None  # the key rows of kv_up by latent channel, made at first use
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.v_dim,
            hidden,
            bias=False,
            prefix=f"{prefix}.o_proj",
            return_bias=False,
        )
        self.kv_cache = torch.tensor([])
        context = vllm_config.compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"layer name {prefix} is taken: build one model per engine")
        context[prefix] = self

    # vLLM's attention-layer interface
    def get_attn_backend(self) -> type[AttentionBackend]:
        return LatentBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return LatentBackend.customize_spec(
            FullAttentionSpec(
                block_size=vllm_config.cache_config.block_size,
                num_kv_heads=1,
                head_size=self.latent_dim,
                dtype=self.dtype,
            )
        )

    def places(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(published name below the layer, local tensor) of every weight. They are about to be written."""
        self.key_up = None
        query, latent = self.in_proj.weight.data.split(self.splits)
        if self.q_rank is None:
            yield "q_proj.weight", query
        else:
            yield "q_a_proj.weight", query
            yield "q_a_layernorm.weight", self.q_norm.weight.data
            yield "q_b_proj.weight", self.q_up.weight.data
        yield "kv_a_proj_with_mqa.weight", latent
        yield "kv_a_layernorm.weight", self.latent_norm.weight.data
        yield "kv_b_proj.weight", self.kv_up.data
        yield "o_proj.weight", self.o_proj.weight.data

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, hidden]. A dry run of the engine (no metadata) leaves the cache alone."""
        tokens = hidden_states.shape[0]
        query, latent = self.in_proj(hidden_states).split(self.splits, dim=-1)
        if self.q_rank is not None:
            query = self.q_up(self.q_norm(query.contiguous()))
        query = query.unflatten(-1, (self.num_heads, self.qk_dim))
        metadata: Any = get_forward_context().attn_metadata
        metadata = metadata.get(self.prefix) if isinstance(metadata, dict) else None
        if metadata is None:
            return self.o_proj(hidden_states.new_zeros(tokens, self.num_heads * self.v_dim))

        cache = self.kv_cache.squeeze(1)
        row = torch.cat((self.latent_norm(latent[:, : self.rank].contiguous()), latent[:, self.rank :]), dim=-1)
        cache.index_put_((metadata.block, metadata.offset), row)

        if self.key_up is None:
            self.key_up = self.kv_up[:, : self.nope_dim].transpose(1, 2).contiguous()
        nope = batched_linear(query[..., : self.nope_dim].transpose(0, 1), self.key_up)
        absorbed = torch.cat((nope.transpose(0, 1), query[..., self.nope_dim :]), dim=-1)
        mixed = mla_paged_attention(
            absorbed,
            cache,
            metadata.block_table,
            metadata.seq_lens,
            metadata.cu_seqlens_q,
            self.scale,
            self.rank,
        )
        values = batched_linear(mixed.transpose(0, 1), self.kv_up[:, self.nope_dim :])
        return self.o_proj(values.transpose(0, 1).reshape(tokens, -1))
