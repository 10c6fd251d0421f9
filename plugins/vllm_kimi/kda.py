"""The KDA layer: projections, the paged state of vLLM's Mamba interface, and one kernel call for a batch part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
    is_conv_state_dim_first,
)
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

from kimi_kernels import KdaDecodeLayer, batched_linear, kda_decode, kda_prefill, linear
from kimi_models import KimiLinearConfig


def state_shape(config: KimiLinearConfig, tp_size: int, num_speculative: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of one sequence's (conv history, recurrent state) on one of `tp_size` ranks.

    The conv history is [width - 1 + num_speculative, 3 * heads * head_dim], or transposed where
    VLLM_SSM_CONV_STATE_LAYOUT is DS; the state is [heads, V, K].
    """
    la = config.linear_attn_config
    return MambaStateShapeCalculator.kda_state_shape(
        tp_size,
        la.num_heads,
        la.head_dim,
        conv_kernel_size=la.short_conv_kernel_size,
        num_spec=num_speculative,
    )


def state_dtype(vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
    """Dtypes of (conv history, recurrent state): the model's, and float32 as the kernels keep it."""
    return MambaStateDtypeCalculator.kda_state_dtype(
        vllm_config.model_config.dtype, vllm_config.cache_config.mamba_cache_dtype
    )


@dataclass
class KDAPart:
    """A run of tokens that one kernel call serves, or a scattered set of them when `tokens` is a tensor.

    `rows` are its requests in the batch. `states` is int32, [N] or, for speculative rows, [N, S + 1].
    `fresh` [N] marks speculative rows whose slots still hold another sequence's state.
    """

    tokens: slice | torch.Tensor
    rows: slice | torch.Tensor
    states: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    has_state: torch.Tensor | None = None
    num_accepted: torch.Tensor | None = None
    fresh: torch.Tensor | None = None

    def is_plain_decode(self, tokens: int) -> bool:
        """Whether this part is all `tokens` tokens of a batch, and continues every sequence of it."""
        return self.has_state is None and self.fresh is None and self.tokens == slice(0, tokens)


@dataclass
class KDAMetadata:
    """What the KDA layers of one cache group need to know of a batch: its parts, at most one of each kind.

    `columns` [requests, S + 1] are the entries of the block table that hold running states; None: all of it.
    """

    parts: list[KDAPart]
    columns: torch.Tensor | None


class KDABackend(AttentionBackend):
    """Names the metadata builder to vLLM; the layer itself computes."""

    @staticmethod
    def get_name() -> str:
        return "KIMI_KDA"

    @staticmethod
    def get_builder_cls() -> type[KDAMetadataBuilder]:
        return KDAMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class KDAMetadataBuilder(GDNAttentionMetadataBuilder):
    """Splits a batch into decodes, prefills and speculative rows.

    Of its base it keeps only the type: vLLM's runner hands accepted and drafted token counts to builders of
    that type.
    """

    # Groups of KDA layers differ in their block tables only.
    supports_update_block_table: ClassVar[bool] = True
    kv_cache_spec: MambaSpec

    def __init__(
        self, kv_cache_spec: MambaSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, vllm_config, device)
        self.speculative = vllm_config.num_speculative_tokens
        self.by_position = vllm_config.cache_config.mamba_cache_mode == "align"
        self._init_reorder_batch_threshold(1, self.speculative > 0)

    def build(  # type: ignore[override]
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        num_accepted_tokens: torch.Tensor | None = None,
        num_decode_draft_tokens_cpu: torch.Tensor | None = None,
        fast_build: bool = False,
    ) -> Any:
        m = common_attn_metadata
        columns = None
        if self.by_position:
            columns = ((m.seq_lens - 1) // self.kv_cache_spec.block_size).clamp_(min=0).unsqueeze(1)
            if self.speculative:
                columns = columns + torch.arange(1 + self.speculative, device=columns.device)
        table = _state_table(m.block_table_tensor, columns)
        if self.speculative and num_decode_draft_tokens_cpu is not None and num_accepted_tokens is not None:
            drafted = num_decode_draft_tokens_cpu[: m.num_reqs] >= 0
            if drafted.any():
                return KDAMetadata(self._speculative_parts(m, table, drafted, num_accepted_tokens), columns)
        return KDAMetadata(self._parts(m, table[:, 0]), columns)

    def update_block_table(
        self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> Any:
        """The same batch for another group of layers."""
        table = _state_table(blk_table, metadata.columns)
        first = metadata.parts[0]
        if len(metadata.parts) == 1 and first.num_accepted is None:  # all requests, one state each: the common step
            return KDAMetadata([replace(first, states=table[: len(first.states), 0].contiguous())], metadata.columns)
        parts = [
            replace(p, states=(table if p.states.dim() == 2 else table[:, 0])[p.rows].contiguous())
            for p in metadata.parts
        ]
        return KDAMetadata(parts, metadata.columns)

    def _parts(self, m: CommonAttentionMetadata, states: torch.Tensor) -> list[KDAPart]:
        known = _host_seq_lens(m)
        if m.max_query_len == 1 and m.num_actual_tokens == m.num_reqs and int(known.min()) > 1:
            every = slice(0, m.num_reqs)
            return [KDAPart(every, every, states.contiguous())]
        lengths = m.query_start_loc_cpu.diff()
        context = known - lengths
        # The runner puts decodes first. A prompt of one token is no decode: its slot holds another's state.
        decodes = int(((lengths == 1) & (context > 0)).long().cumprod(0).sum())
        first, rest = slice(0, decodes), slice(decodes, m.num_reqs)
        parts = []
        if decodes:
            parts.append(KDAPart(first, first, states[first].contiguous()))
        if decodes < m.num_reqs:
            parts.append(
                KDAPart(
                    slice(decodes, m.num_actual_tokens),
                    rest,
                    states[rest].contiguous(),
                    cu_seqlens=(m.query_start_loc[decodes:] - decodes).int(),
                    has_state=(context[rest] > 0).to(self.device),
                )
            )
        return parts

    def _speculative_parts(
        self,
        m: CommonAttentionMetadata,
        table: torch.Tensor,
        drafted: torch.Tensor,
        num_accepted: torch.Tensor,
    ) -> list[KDAPart]:
        lengths = m.query_start_loc_cpu.diff()
        context = _host_seq_lens(m) - lengths
        owner = torch.repeat_interleave(drafted, lengths)
        parts = []
        for chosen, speculative in ((drafted, True), (~drafted, False)):
            if not chosen.any():
                continue
            # What only the host knows is worked out there: a question to a GPU would wait for it.
            rows = chosen.nonzero().squeeze(1).to(self.device)
            cu_seqlens = nn.functional.pad(lengths[chosen].cumsum(0), (1, 0)).int().to(self.device)
            own = (owner == speculative).nonzero().squeeze(1)
            first, count = int(own[0]), own.numel()
            together = int(own[-1]) - first + 1 == count
            tokens = slice(first, first + count) if together else own.to(self.device)
            if speculative:
                # vLLM pads a new prompt of one token with empty drafts, so that it looks like a decode.
                new = context[chosen] == 0
                fresh = new.to(self.device)
                accepted = num_accepted[rows].int().masked_fill(fresh, 1)
                part = KDAPart(tokens, rows, table[rows].contiguous(), cu_seqlens, num_accepted=accepted)
                parts.append(replace(part, fresh=fresh) if new.any() else part)
            else:
                states = table[rows, 0].contiguous()
                has_state = (context[chosen] > 0).to(self.device)
                parts.append(KDAPart(tokens, rows, states, cu_seqlens, has_state))
        return parts


def _host_seq_lens(m: CommonAttentionMetadata) -> torch.Tensor:
    """Lengths of the requests, on the host. vLLM's bound is exact but for drafts of decodes, which it counts as kept:
    whether a request has context does not depend on them."""
    bound = m.seq_lens_cpu_upper_bound
    return m.seq_lens[: m.num_reqs].cpu() if bound is None else bound[: m.num_reqs]


def _state_table(block_table: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
    """[requests, S + 1] blocks of the running states."""
    return block_table if columns is None else block_table.gather(1, columns)


class KimiDeltaAttention(nn.Module, MambaBase):
    """KDA of Kimi Linear (paper section 4) with the low-rank decay and output gates.

    Heads are split over tensor-parallel ranks; the gates' down projections, whose output all heads read, are
    held by each rank whole. All projections from the hidden state are one matrix product.
    """

    def __init__(self, config: KimiLinearConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        la = config.linear_attn_config
        self.config = config
        self.vllm_config = vllm_config
        self.prefix = prefix
        self.tp_size = get_tensor_model_parallel_world_size()
        self.head_dim = la.head_dim
        self.num_heads = la.num_heads // self.tp_size
        self.lower_bound = la.gate_lower_bound
        self.norm_eps = config.rms_norm_eps
        self.width = self.num_heads * self.head_dim
        # Rows of the merged projection: q, k, v, decay down, gate down, beta.
        self.splits = (3 * self.width, 2 * self.head_dim, self.num_heads)
        self.in_proj = nn.Parameter(torch.empty(sum(self.splits), config.hidden_size), requires_grad=False)
        self.gate_up = nn.Parameter(torch.empty(2, self.width, self.head_dim), requires_grad=False)
        self.conv_weight = nn.Parameter(
            torch.empty(3 * self.width, la.short_conv_kernel_size, dtype=torch.float32), requires_grad=False
        )
        self.A_log = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32), requires_grad=False)
        self.dt_bias = nn.Parameter(torch.empty(self.width, dtype=torch.float32), requires_grad=False)
        self.norm_weight = nn.Parameter(torch.empty(self.head_dim, dtype=torch.float32), requires_grad=False)
        self.o_proj = nn.Parameter(torch.empty(config.hidden_size, self.width), requires_grad=False)
        self.decode_layer: KdaDecodeLayer | None = None  # made at first use, and again for other pools
        context = vllm_config.compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"layer name {prefix} is taken: build one model per engine")
        context[prefix] = self

    # vLLM's Mamba interface
    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.GDN_ATTN

    def get_attn_backend(self) -> type[AttentionBackend]:
        return KDABackend

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return state_shape(self.config, self.tp_size, self.vllm_config.num_speculative_tokens)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return state_dtype(self.vllm_config)

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        if is_conv_state_dim_first():  # as NixlConnector asks for; the kernels take any strides
            conv_state, state = self.kv_cache
            self.kv_cache = (conv_state.transpose(1, 2), state)

    def places(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(published name below the layer, local tensor) of every weight."""
        w, d = self.width, self.head_dim
        rows = self.in_proj.data.split([w, w, w, d, d, self.num_heads])
        for name, piece in zip(("q", "k", "v", "f_a", "g_a", "b"), rows):
            yield f"{name}_proj.weight", piece
        for name, piece in zip("qkv", self.conv_weight.data.split(w)):
            yield f"{name}_conv1d.weight", piece
        yield "f_b_proj.weight", self.gate_up.data[0]
        yield "g_b_proj.weight", self.gate_up.data[1]
        yield "A_log", self.A_log.data
        yield "dt_bias", self.dt_bias.data
        yield "o_norm.weight", self.norm_weight.data
        yield "o_proj.weight", self.o_proj.data

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, hidden]. A dry run of the engine (no metadata) leaves the state alone."""
        out = self._local(hidden_states, self._metadata())
        return tensor_model_parallel_all_reduce(out) if self.tp_size > 1 else out

    def _local(self, hidden: torch.Tensor, metadata: KDAMetadata | None) -> torch.Tensor:
        """This rank's heads."""
        tokens = hidden.shape[0]
        if metadata is not None and len(metadata.parts) == 1 and metadata.parts[0].is_plain_decode(tokens):
            part = metadata.parts[0]
            if self.decode_layer is None or self.decode_layer.state.data_ptr() != self.kv_cache[1].data_ptr():
                self.decode_layer = self._decode_layer()
            return self.decode_layer(hidden, part.states, part.cu_seqlens, part.num_accepted)
        qkv, down, beta = linear(hidden, self.in_proj).split(self.splits, dim=-1)
        down = down.unflatten(-1, (2, self.head_dim)).transpose(0, 1)
        gates = batched_linear(down, self.gate_up).unflatten(-1, (self.num_heads, self.head_dim))
        make = hidden.new_zeros if metadata is None else hidden.new_empty
        core = make((tokens, self.width))
        if metadata is not None:
            conv_state, state = self.kv_cache
            for part in metadata.parts:
                self._run(part, qkv, gates[0], beta, gates[1], conv_state, state, core)
        return linear(core, self.o_proj)

    def _decode_layer(self) -> KdaDecodeLayer:
        return KdaDecodeLayer(
            self.in_proj,
            self.gate_up,
            self.o_proj,
            self.conv_weight,
            *self.kv_cache,
            self.A_log,
            self.dt_bias,
            self.norm_weight,
            num_heads=self.num_heads,
            lower_bound=self.lower_bound,
            norm_eps=self.norm_eps,
        )

    def _metadata(self) -> KDAMetadata | None:
        metadata = get_forward_context().attn_metadata
        return metadata.get(self.prefix) if isinstance(metadata, dict) else None

    def _run(
        self,
        part: KDAPart,
        qkv: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        gate: torch.Tensor,
        conv_state: torch.Tensor,
        state: torch.Tensor,
        core: torch.Tensor,
    ) -> None:
        if part.fresh is not None:
            slots = part.states[part.fresh, 0].long()
            conv_state[slots] = 0
            state[slots] = 0
        t = part.tokens
        contiguous = isinstance(t, slice)
        shared: dict[str, Any] = {
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "lower_bound": self.lower_bound,
            "norm_eps": self.norm_eps,
            "out": core[t] if contiguous else None,
        }
        inputs = (qkv[t], decay[t], beta[t], gate[t], self.conv_weight, conv_state, state, part.states)
        parameters = (self.A_log, self.dt_bias, self.norm_weight)
        if part.has_state is not None:
            result = kda_prefill(*inputs, part.cu_seqlens, part.has_state, *parameters, **shared)
        elif part.num_accepted is not None:
            result = kda_decode(
                *inputs, *parameters, cu_seqlens=part.cu_seqlens, num_accepted_tokens=part.num_accepted, **shared
            )
        else:
            result = kda_decode(*inputs, *parameters, **shared)
        if not contiguous:
            core[t] = result
