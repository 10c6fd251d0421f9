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
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec

from kimi_kernels import MlaLayer
from kimi_models import KimiLinearConfig
from kimi_models.config import LATENT_NORM_EPS

# Cache pages hold a multiple of this many tokens; the kernels themselves take any number.
BLOCK_STEP = 16


@dataclass
class LatentMetadata:
    """One batch as the latent attention needs it: where new rows go, and each request's pages and lengths.

    `slots` is int64 [tokens], see `kimi_kernels.MlaLayer`; the others are int32 as in `mla_paged_attention`.
    """

    slots: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata]):
    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LatentMetadata:
        m = common_attn_metadata
        return LatentMetadata(
            slots=m.slot_mapping[: m.num_actual_tokens],
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
        self.tp_size = get_tensor_model_parallel_world_size()
        self.num_heads = config.num_attention_heads // self.tp_size
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
        self.in_proj = nn.Parameter(torch.empty(sum(self.splits), hidden), requires_grad=False)
        self.q_norm = self.q_up = None
        if self.q_rank is not None:
            self.q_norm = nn.Parameter(torch.empty(self.q_rank), requires_grad=False)
            self.q_up = nn.Parameter(torch.empty(query, self.q_rank), requires_grad=False)
        self.latent_norm = nn.Parameter(torch.empty(self.rank), requires_grad=False)
        self.kv_up = nn.Parameter(
            torch.empty(self.num_heads, self.nope_dim + self.v_dim, self.rank), requires_grad=False
        )
        self.layer: MlaLayer | None = None  # made at first use, and again for another cache
        self.o_proj = nn.Parameter(torch.empty(hidden, self.num_heads * self.v_dim), requires_grad=False)
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
        self.layer = None
        query, latent = self.in_proj.data.split(self.splits)
        if self.q_rank is None:
            yield "q_proj.weight", query
        else:
            yield "q_a_proj.weight", query
            yield "q_a_layernorm.weight", self.q_norm.data
            yield "q_b_proj.weight", self.q_up.data
        yield "kv_a_proj_with_mqa.weight", latent
        yield "kv_a_layernorm.weight", self.latent_norm.data
        yield "kv_b_proj.weight", self.kv_up.data
        yield "o_proj.weight", self.o_proj.data

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, hidden]. A dry run of the engine (no metadata) leaves the cache alone."""
        metadata: Any = get_forward_context().attn_metadata
        metadata = metadata.get(self.prefix) if isinstance(metadata, dict) else None
        if metadata is None:
            return torch.zeros_like(hidden_states)
        if self.layer is None or self.layer.cache.data_ptr() != self.kv_cache.data_ptr():
            self.layer = self._layer()
        out = self.layer(
            hidden_states, metadata.slots, metadata.block_table, metadata.seq_lens, metadata.cu_seqlens_q
        )
        return tensor_model_parallel_all_reduce(out) if self.tp_size > 1 else out

    def _layer(self) -> MlaLayer:
        return MlaLayer(
            self.in_proj,
            self.latent_norm,
            self.kv_up,
            self.o_proj,
            self.kv_cache.squeeze(1),
            nope_dim=self.nope_dim,
            scale=self.scale,
            q_norm=self.q_norm,
            q_up=self.q_up,
            norm_eps=LATENT_NORM_EPS,
        )
