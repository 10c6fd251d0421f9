"""Kimi Linear in plain torch: what the model computes, small enough to read, in any dtype including float64.

KDA and NoPE-MLA layers, a sigmoid-routed mixture of experts with a shared one, and Full or Block Attention
Residuals. It trains and it generates with a cache; the fast operations come from `kimi_kernels`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_kernels import attn_res, causal_conv1d, chunk_kda, fused_recurrent_kda, rmsnorm_gated
from kimi_models.config import LATENT_NORM_EPS, KimiLinearConfig


@dataclass
class KdaCache:
    """What a KDA layer remembers: the last inputs of its short convolution and its recurrent state."""

    conv: Tensor | None = None
    state: Tensor | None = None


@dataclass
class LatentCache:
    """What an MLA layer remembers: one row of `latent_dim` elements a token, [B, T, latent_dim]."""

    rows: Tensor | None = None


@dataclass
class Cache:
    """The memory of one batch of sequences of equal length, filled by `KimiLinearForCausalLM.forward`."""

    config: KimiLinearConfig
    layers: list[KdaCache | LatentCache] = field(default_factory=list)
    length: int = 0

    def __post_init__(self) -> None:
        kinds = (self.config.is_kda_layer(i) for i in range(self.config.num_hidden_layers))
        self.layers = [KdaCache() if kda else LatentCache() for kda in kinds]


def _at_least_float32(kw: dict[str, Any]) -> dict[str, Any]:
    dtype = kw.get("dtype") or torch.get_default_dtype()
    return kw | {"dtype": torch.promote_types(dtype, torch.float32)}


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in at least float32."""

    def __init__(self, size: int, eps: float, **kw: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, **kw))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight


class KimiDeltaAttention(nn.Module):
    """The KDA layer (Kimi Linear report, section 4): short convolutions, gated delta rule, gated output norm."""

    def __init__(self, c: KimiLinearConfig, **kw: Any) -> None:
        super().__init__()
        la = c.linear_attn_config
        self.heads, self.head_dim = la.num_heads, la.head_dim
        self.lower_bound, self.eps = la.gate_lower_bound, c.rms_norm_eps
        d, p = c.hidden_size, la.projection_size
        wide = _at_least_float32(kw)
        self.qkv_proj = nn.Linear(d, 3 * p, bias=False, **kw)
        self.conv_weight = nn.Parameter(torch.empty(3 * p, la.short_conv_kernel_size, **kw))
        self.f_a_proj = nn.Linear(d, la.head_dim, bias=False, **kw)
        self.f_b_proj = nn.Linear(la.head_dim, p, bias=False, **kw)
        self.g_a_proj = nn.Linear(d, la.head_dim, bias=False, **kw)
        self.g_b_proj = nn.Linear(la.head_dim, p, bias=False, **kw)
        self.b_proj = nn.Linear(d, la.num_heads, bias=False, **kw)
        self.A_log = nn.Parameter(torch.empty(la.num_heads, **wide))
        self.dt_bias = nn.Parameter(torch.empty(p, **wide))
        self.o_norm_weight = nn.Parameter(torch.ones(la.head_dim, **kw))
        self.o_proj = nn.Linear(p, d, bias=False, **kw)

    def forward(self, x: Tensor, cache: KdaCache | None = None) -> Tensor:
        batch, length = x.shape[:2]
        keep = cache is not None
        qkv, conv = causal_conv1d(
            self.qkv_proj(x),
            self.conv_weight,
            activation="silu",
            initial_state=cache.conv if cache else None,
            output_final_state=keep,
        )
        q, k, v = qkv.view(batch, length, 3, self.heads, self.head_dim).unbind(2)
        decay = self.f_b_proj(self.f_a_proj(x)).view(v.shape)
        rule = fused_recurrent_kda if keep and length == 1 else chunk_kda
        o, state = rule(
            q,
            k,
            v,
            decay,
            self.b_proj(x),
            initial_state=cache.state if cache else None,
            output_final_state=keep,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            lower_bound=self.lower_bound,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
        )
        if cache is not None:
            cache.conv, cache.state = conv, state
        gate = self.g_b_proj(self.g_a_proj(x)).view(v.shape)
        o = rmsnorm_gated(o, gate, self.o_norm_weight, self.eps, activation="sigmoid")
        return self.o_proj(o.reshape(batch, length, -1))


class LatentAttention(nn.Module):
    """NoPE multi-head latent attention: no rotation, a latent shared by all heads is what the cache holds."""

    def __init__(self, c: KimiLinearConfig, **kw: Any) -> None:
        super().__init__()
        self.c = c
        d, heads = c.hidden_size, c.num_attention_heads
        if c.q_lora_rank is None:
            self.q_proj = nn.Linear(d, heads * c.qk_head_dim, bias=False, **kw)
        else:
            self.q_a_proj = nn.Linear(d, c.q_lora_rank, bias=False, **kw)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, LATENT_NORM_EPS, **kw)
            self.q_b_proj = nn.Linear(c.q_lora_rank, heads * c.qk_head_dim, bias=False, **kw)
        self.kv_a_proj_with_mqa = nn.Linear(d, c.latent_dim, bias=False, **kw)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, LATENT_NORM_EPS, **kw)
        self.kv_b_proj = nn.Linear(
            c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False, **kw
        )
        self.o_proj = nn.Linear(heads * c.v_head_dim, d, bias=False, **kw)

    def forward(self, x: Tensor, cache: LatentCache | None = None) -> Tensor:
        c = self.c
        batch, length = x.shape[:2]
        if c.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(batch, length, c.num_attention_heads, c.qk_head_dim).transpose(1, 2)
        latent, shared = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        rows = torch.cat([self.kv_a_layernorm(latent), shared], dim=-1)
        if cache is not None:
            rows = rows if cache.rows is None else torch.cat([cache.rows, rows], dim=1)
            cache.rows = rows
        latent, shared = rows.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        kv = self.kv_b_proj(latent).view(batch, rows.shape[1], c.num_attention_heads, -1).transpose(1, 2)
        k, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        k = torch.cat([k, shared.unsqueeze(1).expand(-1, c.num_attention_heads, -1, -1)], dim=-1)
        if rows.shape[1] == length:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=c.qk_head_dim**-0.5)
        else:
            # Query i of this call is token (past + i): it sees all of the past and itself.
            mask = torch.ones(length, rows.shape[1], dtype=torch.bool, device=x.device)
            mask = mask.tril(rows.shape[1] - length)
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=c.qk_head_dim**-0.5)
        return self.o_proj(o.transpose(1, 2).reshape(batch, length, -1))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, width: int, **kw: Any) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * width, bias=False, **kw)
        self.down_proj = nn.Linear(width, hidden, bias=False, **kw)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Router(nn.Module):
    """Scores by sigmoid; chooses by score plus a bias that only balances load; weighs by the score alone."""

    e_score_correction_bias: Tensor

    def __init__(self, c: KimiLinearConfig, **kw: Any) -> None:
        super().__init__()
        self.c = c
        wide = _at_least_float32(kw)
        self.weight = nn.Parameter(torch.empty(c.num_experts, c.hidden_size, **kw))
        self.register_buffer("e_score_correction_bias", torch.zeros(c.num_experts, **wide))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, D] -> (weights [N, k] in at least float32, expert numbers [N, k])."""
        c = self.c
        wide = self.e_score_correction_bias.dtype
        scores = F.linear(x.to(wide), self.weight.to(wide)).sigmoid()
        choice = (scores + self.e_score_correction_bias).detach()
        if c.num_expert_group > 1:
            groups = choice.view(len(x), c.num_expert_group, -1)
            best = groups.topk(2, dim=-1).values.sum(-1).topk(c.topk_group, dim=-1).indices
            closed = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best, False)
            choice = groups.masked_fill(closed.unsqueeze(-1), -math.inf).flatten(1)
        experts = choice.topk(c.num_experts_per_token, dim=-1).indices
        weights = scores.gather(1, experts)
        if c.moe_renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * c.routed_scaling_factor, experts


class MoE(nn.Module):
    """Routed experts plus a shared one. In training mode `load` counts the tokens each expert was given."""

    load: Tensor

    def __init__(self, c: KimiLinearConfig, **kw: Any) -> None:
        super().__init__()
        d, width = c.hidden_size, c.moe_intermediate_size
        self.gate = Router(c, **kw)
        self.experts_gate_up = nn.Parameter(torch.empty(c.num_experts, 2 * width, d, **kw))
        self.experts_down = nn.Parameter(torch.empty(c.num_experts, d, width, **kw))
        shared = width * c.num_shared_experts
        self.shared_experts = SwiGLU(d, shared, **kw) if shared else None
        load = torch.zeros(c.num_experts, dtype=torch.int64, device=kw.get("device"))
        self.register_buffer("load", load, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, experts = self.gate(flat)
        slots = experts.flatten()
        counts = slots.bincount(minlength=len(self.load))
        if self.training:
            self.load += counts
        # Tokens in order of their expert, so that every expert is one matrix product over a slice.
        order = slots.argsort(stable=True)
        token = order // experts.shape[1]
        outputs = []
        for part, gate_up, down in zip(
            flat[token].split(counts.tolist()), self.experts_gate_up.unbind(), self.experts_down.unbind()
        ):
            gate, up = F.linear(part, gate_up).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, down))
        routed = torch.cat(outputs) * weights.flatten()[order].unsqueeze(-1).to(x.dtype)
        out = torch.zeros_like(flat).index_add(0, token, routed)
        if self.shared_experts is not None:
            out = out + self.shared_experts(flat)
        return out.view(x.shape)

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """Moves the selection bias of each expert by `rate` towards equal load, then forgets the counts.

        Balancing without an auxiliary loss (DeepSeek-V3 report, 2.1.2): the sign of the load error alone.
        """
        load = self.load.to(self.gate.e_score_correction_bias.dtype)
        self.gate.e_score_correction_bias += rate * (load.mean() - load).sign()
        self.load.zero_()


class DepthMix(nn.Module):
    """Attention over earlier sub-layers' outputs (AttnRes paper, section 3): a query and a key norm gain."""

    def __init__(self, size: int, eps: float, **kw: Any) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(size, **kw))
        self.norm_weight = nn.Parameter(torch.ones(size, **kw))
        self.eps = eps

    def forward(self, sources: list[Tensor]) -> Tensor:
        return attn_res(self.query, sources, self.norm_weight, rms_eps=self.eps)


class DecoderLayer(nn.Module):
    """One attention and one MLP sub-layer, with their norms and, with AttnRes, their mixes over depth."""

    def __init__(self, c: KimiLinearConfig, layer: int, **kw: Any) -> None:
        super().__init__()
        d = c.hidden_size
        self.input_layernorm = RMSNorm(d, c.rms_norm_eps, **kw)
        self.post_attention_layernorm = RMSNorm(d, c.rms_norm_eps, **kw)
        kda = c.is_kda_layer(layer)
        self.self_attn = KimiDeltaAttention(c, **kw) if kda else LatentAttention(c, **kw)
        self.mlp = MoE(c, **kw) if c.is_moe_layer(layer) else SwiGLU(d, c.intermediate_size, **kw)
        if c.use_attn_res:
            self.self_attention_res = DepthMix(d, c.rms_norm_eps, **kw)
            self.mlp_res = DepthMix(d, c.rms_norm_eps, **kw)

    def attention(self, h: Tensor, cache: Any) -> Tensor:
        return self.self_attn(self.input_layernorm(h), cache)

    def feed_forward(self, h: Tensor) -> Tensor:
        return self.mlp(self.post_attention_layernorm(h))


class KimiLinearForCausalLM(nn.Module):
    """Kimi Linear with a language-model head.

    `dtype` (default: torch's) is that of all parameters but `A_log`, `dt_bias` and the routers' bias, which are
    at least float32. Weights are undefined until `init_weights` or `kimi_models.weights.load_weights`.
    """

    def __init__(
        self,
        config: KimiLinearConfig,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        c, kw = config, {"dtype": dtype, "device": device}
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size, **kw)  # type: ignore[arg-type]
        self.layers = nn.ModuleList(DecoderLayer(c, i, **kw) for i in range(c.num_hidden_layers))
        if c.use_attn_res:
            self.output_attn_res = DepthMix(c.hidden_size, c.rms_norm_eps, **kw)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, **kw)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False, **kw)  # type: ignore[arg-type]

    def forward(self, input_ids: Tensor, cache: Cache | None = None) -> Tensor:
        """input_ids [B, T] -> logits [B, T, vocab_size]. With a cache, the tokens continue what it holds."""
        if input_ids.ndim != 2:
            raise ValueError(
                f"input_ids must be [batch, tokens], got shape {list(input_ids.shape)}: add a batch"
            )
        total = input_ids.shape[1] + (cache.length if cache else 0)
        if total > self.config.model_max_length:
            raise ValueError(
                f"input_ids reach {total} tokens, model_max_length is {self.config.model_max_length}: "
                "shorten the context"
            )
        return self.lm_head(self.norm(self.hidden(self.embed_tokens(input_ids), cache)))

    def hidden(self, h: Tensor, cache: Cache | None = None) -> Tensor:
        """Embeddings [B, T, D] -> the stream before the last norm, [B, T, D]."""
        caches: list[Any] = list(cache.layers) if cache else [None] * len(self.layers)
        out = self._mixed(h, caches) if self.config.use_attn_res else self._added(h, caches)
        if cache is not None:
            cache.length += h.shape[1]
        return out

    def _added(self, h: Tensor, caches: list[Any]) -> Tensor:
        for layer, cache in zip(self.layers, caches):
            h = h + layer.attention(h, cache)  # type: ignore[operator]
            h = h + layer.feed_forward(h)  # type: ignore[operator]
        return h

    def _mixed(self, h: Tensor, caches: list[Any]) -> Tensor:
        """Block AttnRes (its section 3.2); the full form is blocks of one sub-layer.

        `blocks` are the finished sums, the embedding first; `partial` is the sum of the block under way.
        """
        size = self.config.attn_res_sublayers
        assert size is not None
        blocks: list[Tensor] = []
        partial = h
        done = 0
        for layer, cache in zip(self.layers, caches):
            for mix, sub_layer in (
                (layer.self_attention_res, lambda x, layer=layer, cache=cache: layer.attention(x, cache)),
                (layer.mlp_res, layer.feed_forward),
            ):
                h = mix([*blocks, partial])  # type: ignore[operator]
                first = done % size == 0
                if first:
                    blocks.append(partial)
                out = sub_layer(h)  # type: ignore[operator]
                partial = out if first else partial + out
                done += 1
        return self.output_attn_res([*blocks, partial])

    @torch.no_grad()
    def init_weights(self, seed: int = 0, query_std: float = 0.0) -> None:
        """Random weights from `seed`: normal with the config's initializer_range, gates as in the papers.

        `query_std` is the spread of the AttnRes queries; 0 (a uniform mean over depth) is where training starts.
        """
        rng = torch.Generator().manual_seed(seed)

        def fill(p: Tensor, draw: Tensor) -> None:
            p.copy_(draw.to(p.dtype))

        def normal(p: Tensor, std: float) -> None:
            fill(p, torch.randn(p.shape, generator=rng, dtype=torch.float64) * std)

        for name, p in self.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if leaf == "A_log" and self.config.linear_attn_config.gate_lower_bound is not None:
                p.zero_()  # Kimi K3 report, 2.1
            elif leaf == "A_log":
                fill(p, torch.empty(p.shape, dtype=torch.float64).uniform_(1, 16, generator=rng).log())
            elif leaf == "dt_bias":
                lo, hi = math.log(1e-3), math.log(1e-1)
                dt = (
                    torch.empty(p.shape, dtype=torch.float64)
                    .uniform_(lo, hi, generator=rng)
                    .exp()
                    .clamp(min=1e-4)
                )
                fill(p, dt + torch.log(-torch.expm1(-dt)))
            elif leaf == "query":
                normal(p, query_std)
            elif leaf == "conv_weight":
                normal(p, p.shape[-1] ** -0.5)
            elif p.ndim == 1:
                p.fill_(1.0)
            else:
                normal(p, self.config.initializer_range)
        for module in self.modules():
            if isinstance(module, MoE):
                module.gate.e_score_correction_bias.zero_()
                module.load.zero_()


@torch.inference_mode()
def generate(
    model: KimiLinearForCausalLM,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    eos_token_id: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Continues prompts of equal length, [B, T] -> [B, T + n] with n <= max_new_tokens.

    `temperature` 0 is greedy. A sequence that has ended is filled with `eos_token_id`; n is the longest.
    """
    cache = Cache(model.config)
    rng = torch.Generator(device=input_ids.device).manual_seed(seed)
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    out = step = input_ids
    for _ in range(max_new_tokens):
        logits = model(step, cache)[:, -1].float()
        if temperature > 0:
            step = torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng)
        else:
            step = logits.argmax(-1, keepdim=True)
        if eos_token_id is not None:
            step = step.masked_fill(ended.unsqueeze(1), eos_token_id)
            ended = ended | (step[:, 0] == eos_token_id)
        out = torch.cat([out, step], dim=1)
        if eos_token_id is not None and bool(ended.all()):
            break
    return out
