"""`KimiLinearForCausalLM` for vLLM: KDA and NoPE MLA layers, routed experts, optional Attention Residuals."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, MambaStateCopyFuncCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsPP
from vllm.model_executor.models.utils import PPMissingLayer, make_layers, maybe_prefix
from vllm.sequence import IntermediateTensors

from kimi_kernels import attn_res
from kimi_models import KimiLinearConfig
from vllm_kimi import state_copy
from vllm_kimi.kda import KimiDeltaAttention, state_dtype, state_shape
from vllm_kimi.loading import Place, load_published
from vllm_kimi.mla import KimiLatentAttention
from vllm_kimi.moe import KimiMLP, KimiMoE
from vllm_kimi.norm import KimiRMSNorm
from vllm_kimi.settings import kimi_config


class DepthMix(nn.Module):
    """The mixture of earlier outputs that one sub-layer reads (Attention Residuals, section 3)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.norm_weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.eps = eps

    def places(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(suffix of the published name, local tensor) of both weights."""
        yield "_proj.weight", self.query.data
        yield "_norm.weight", self.norm_weight.data

    def forward(self, sources: list[torch.Tensor], output_norm: KimiRMSNorm | None = None) -> torch.Tensor:
        """Mixture of `sources`, each [tokens, hidden]; through `output_norm` where given."""
        weight = None if output_norm is None else output_norm.weight
        return attn_res(self.query, sources, self.norm_weight, weight, rms_eps=self.eps)


class KimiDecoderLayer(nn.Module):
    """Attention (KDA or MLA) and a feed-forward layer (dense or routed), each behind its norm."""

    def __init__(self, config: KimiLinearConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.index = int(prefix.rsplit(".", 1)[1])
        attention = KimiDeltaAttention if config.is_kda_layer(self.index) else KimiLatentAttention
        self.self_attn = attention(config, vllm_config, f"{prefix}.self_attn")
        self.is_moe = config.is_moe_layer(self.index)
        self.mlp: KimiMoE | KimiMLP
        if self.is_moe:
            self.mlp = KimiMoE(config)
        else:
            self.mlp = KimiMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = KimiRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = KimiRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.use_attn_res:
            self.self_attention_res = DepthMix(config.hidden_size, config.rms_norm_eps)
            self.mlp_res = DepthMix(config.hidden_size, config.rms_norm_eps)

    def places(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(published name below the layer, local tensor) of every weight."""
        parts: list[tuple[str, nn.Module]] = [
            ("self_attn.", self.self_attn),
            ("block_sparse_moe." if self.is_moe else "mlp.", self.mlp),
        ]
        parts += [(n, getattr(self, n)) for n in ("self_attention_res", "mlp_res") if hasattr(self, n)]
        for prefix, part in parts:
            for name, place in part.places():  # type: ignore[operator]
                yield prefix + name, place
        yield "input_layernorm.weight", self.input_layernorm.weight.data
        yield "post_attention_layernorm.weight", self.post_attention_layernorm.weight.data

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The additive form: (this layer's output, the sum before it)."""
        if residual is None:
            residual, hidden = hidden, self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(hidden)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual

    def mixed(self, blocks: list[torch.Tensor], partial: torch.Tensor, sublayers: int) -> torch.Tensor:
        """The Attention Residuals form: adds to `blocks` where a block ends, and returns the new partial sum."""
        steps = (
            (self.self_attention_res, self.input_layernorm, self.self_attn),
            (self.mlp_res, self.post_attention_layernorm, self.mlp),
        )
        for i, (mix, norm, sublayer) in enumerate(steps):
            out = sublayer(mix([*blocks, partial], norm))
            if (2 * self.index + i) % sublayers == 0:
                blocks.append(partial)
                partial = out
            else:
                partial = partial + out
        return partial


class KimiLinearModel(nn.Module):
    """Embedding, the decoder layers of this pipeline stage, and the final norm."""

    def __init__(self, config: KimiLinearConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.config = config
        group = get_pp_group()
        self.is_first, self.is_last = group.is_first_rank, group.is_last_rank
        self.embed_tokens = (
            VocabParallelEmbedding(config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens")
            if self.is_first
            else PPMissingLayer()
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: KimiDecoderLayer(config, vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        if self.is_last:
            self.norm = KimiRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            if config.use_attn_res:
                self.output_attn_res = DepthMix(config.hidden_size, config.rms_norm_eps)
        else:
            self.norm = PPMissingLayer()

    def places(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(published name, local tensor) of every weight of this stage."""
        if self.is_first:
            yield "model.embed_tokens.weight", self.embed_tokens.weight.data
        for layer in self.layers[self.start_layer : self.end_layer]:
            for name, place in layer.places():
                yield f"model.layers.{layer.index}.{name}", place
        if self.is_last:
            yield "model.norm.weight", self.norm.weight.data
            if self.config.use_attn_res:
                for name, place in self.output_attn_res.places():
                    yield f"model.output_attn_res{name}", place

    def blocks_before(self, layer: int) -> int:
        """Finished AttnRes blocks, the embedding among them, when decoder layer `layer` begins."""
        sublayers = self.config.attn_res_sublayers
        return 0 if sublayers is None else -(-2 * layer // sublayers)

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """What the stage before this one sends: the running sum and, with AttnRes, the finished blocks."""
        hidden = self.config.hidden_size
        shape: tuple[int, ...] = (batch_size, hidden)
        if self.config.use_attn_res:
            shape = (batch_size, self.blocks_before(self.start_layer), hidden)
        return IntermediateTensors(
            {
                "hidden_states": torch.zeros(batch_size, hidden, dtype=dtype, device=device),
                "residual": torch.zeros(shape, dtype=dtype, device=device),
            }
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor | IntermediateTensors:
        residual: torch.Tensor | None = None
        if self.is_first:
            hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        else:
            assert intermediate_tensors is not None
            hidden, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        layers = self.layers[self.start_layer : self.end_layer]

        sublayers = self.config.attn_res_sublayers
        if sublayers is None:
            for layer in layers:
                hidden, residual = layer(hidden, residual)
            if self.is_last:
                return self.norm(hidden, residual)[0]
            return IntermediateTensors({"hidden_states": hidden, "residual": residual})

        blocks = [] if residual is None else list(residual.unbind(1))
        for layer in layers:
            hidden = layer.mixed(blocks, hidden, sublayers)
        if self.is_last:
            return self.output_attn_res([*blocks, hidden], self.norm)
        return IntermediateTensors({"hidden_states": hidden, "residual": torch.stack(blocks, dim=1)})


class KimiLinearForCausalLM(nn.Module, HasInnerState, SupportsPP, IsHybrid):
    """Kimi Linear (48B-A3B and its relatives) with or without Attention Residuals."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        state_copy.install()
        self.config = vllm_config.model_config.hf_config
        self.kimi = kimi_config(vllm_config.model_config)
        self.model = KimiLinearModel(self.kimi, vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = (
            ParallelLMHead(
                self.kimi.vocab_size, self.kimi.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
            )
            if self.model.is_last
            else PPMissingLayer()
        )
        self.logits_processor = LogitsProcessor(self.kimi.vocab_size)

    # state of the KDA layers, asked for before the model exists
    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return state_shape(
            kimi_config(vllm_config.model_config),
            vllm_config.parallel_config.tensor_parallel_size,
            vllm_config.num_speculative_tokens,
        )

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return state_dtype(vllm_config)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        return MambaStateCopyFuncCalculator.kda_state_copy_func()

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        return self.model.make_empty_intermediate_tensors(batch_size, dtype, device)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """[tokens] -> [tokens, hidden], normed. `positions` is not used: the model has no position encoding."""
        return self.model(input_ids, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def places(self) -> dict[str, torch.Tensor]:
        """The local tensor of every published weight that this rank and stage hold."""
        places = dict(self.model.places())
        if self.model.is_last:
            places["lm_head.weight"] = self.lm_head.weight.data
        return places

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads a checkpoint in published names; raises WeightError where it does not fit the config."""
        places: dict[str, Place] = dict(self.places())
        for name, layer in (
            ("model.embed_tokens.weight", self.model.embed_tokens),
            ("lm_head.weight", self.lm_head),
        ):
            if name in places:
                # vLLM pads a vocabulary that does not divide evenly, so its layer knows its own rows.
                places[name] = functools.partial(layer.weight_loader, layer.weight)
        load_published(
            weights,
            places,
            self.kimi,
            get_tensor_model_parallel_world_size(),
            get_tensor_model_parallel_rank(),
        )
        return {name for name, _ in self.named_parameters()}

