"""The reference model against transformers' own class, and Attention Residuals against the paper's equations."""

import random
import re
import types

import pytest
import torch
import torch.nn.functional as F

from kimi_models import KimiLinearConfig
from kimi_models.reference import Cache, KimiLinearForCausalLM, MoE, generate
from kimi_models.tiny import tiny_config, write_tiny
from kimi_models.weights import load_weights

# transformers computes in float32 in another order; logits are of size 1 and go through up to 8 layers.
ATOL = 1e-4

CONFIGS = {
    "tiny": tiny_config(dtype="float32"),
    "eight layers, low-rank queries, expert groups": tiny_config(
        8, dtype="float32", hidden_size=96, head_dim=16, num_heads=3, num_attention_heads=2, q_lora_rank=48,
        num_experts=12, num_experts_per_token=3, num_expert_group=4, topk_group=2, num_shared_experts=2,
    ),
    "head size 64, conv of 3, no renormalising, two dense layers": tiny_config(
        5, dtype="float32", head_dim=64, num_heads=2, short_conv_kernel_size=3, moe_renormalize=False,
        first_k_dense_replace=2, num_experts_per_token=1, rms_norm_eps=1e-6, kv_lora_rank=32, v_head_dim=16,
    ),
    "MLA in the middle, one head": tiny_config(
        3,
        dtype="float32",
        num_attention_heads=1,
        num_heads=1,
        vocab_size=300,
        kda_layers=(1, 3),
        full_attn_layers=(2,),
    ),
}  # fmt: skip


def random_config(seed):
    """A config with every size drawn from `seed`; some in fours, as transformers' grouped product asks for."""
    draw = random.Random(seed)
    layers = draw.randint(2, 6)
    full = sorted(draw.sample(range(1, layers + 1), draw.randint(1, layers - 1)))
    experts = draw.randint(2, 9)
    return tiny_config(
        layers,
        dtype="float32",
        full_attn_layers=tuple(full),
        kda_layers=tuple(i for i in range(1, layers + 1) if i not in full),
        vocab_size=draw.randint(259, 600),
        hidden_size=4 * draw.randint(6, 35),
        num_heads=draw.randint(1, 5),
        head_dim=draw.choice([16, 32, 48, 96]),
        short_conv_kernel_size=draw.randint(2, 5),
        num_attention_heads=draw.randint(1, 5),
        kv_lora_rank=16 * draw.randint(1, 5),
        q_lora_rank=draw.choice([None, 24]),
        qk_nope_head_dim=draw.randint(8, 40),
        qk_rope_head_dim=16 * draw.randint(1, 2),
        v_head_dim=draw.randint(8, 40),
        intermediate_size=draw.randint(16, 200),
        moe_intermediate_size=4 * draw.randint(2, 20),
        num_experts=experts,
        num_experts_per_token=draw.randint(1, experts),
        num_shared_experts=draw.randint(1, 2),
        first_k_dense_replace=draw.randint(0, 2),
        moe_renormalize=draw.random() < 0.7,
        routed_scaling_factor=draw.uniform(0.5, 3),
    )


CONFIGS |= {f"random {seed}": random_config(seed) for seed in range(4)}


def load(folder, config, dtype=torch.float32):
    model = KimiLinearForCausalLM(config, dtype=dtype).eval()
    load_weights(model, folder, config)
    return model


def prompt(config, batch, length, seed=0):
    return torch.randint(3, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_model(config, dtype=torch.float64, seed=0):
    model = KimiLinearForCausalLM(config.replace(initializer_range=0.1), dtype=dtype).eval()
    model.init_weights(seed, query_std=1.0)
    return model


@pytest.fixture(params=CONFIGS, ids=lambda name: name)
def pair(request, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = CONFIGS[request.param]
    write_tiny(tmp_path, config, seed=len(request.param))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    return config, load(tmp_path, config), theirs, tmp_path


@torch.no_grad()
def test_logits_equal_transformers(pair):
    config, ours, theirs, _ = pair
    ids = prompt(config, 2, 75)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=ATOL, rtol=0)


@torch.no_grad()
def test_greedy_generation_equals_transformers(pair):
    config, ours, theirs, _ = pair
    ids = prompt(config, 2, 21)
    want = theirs.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(ours, ids, 16), want)


@torch.no_grad()
def test_what_transformers_saves_loads_as_the_same_model(pair):
    config, ours, theirs, folder = pair
    theirs.save_pretrained(folder / "theirs")
    again = KimiLinearConfig.from_pretrained(folder / "theirs")
    loaded = load(folder / "theirs", again)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), loaded.state_dict().values()))
    ids = prompt(config, 1, 9)
    assert torch.equal(loaded(ids), ours(ids))


@torch.no_grad()
def test_lower_bounded_gate_equals_transformers_with_that_gate(tmp_path):
    """transformers has the softplus gate only; its gate module is given the formula of Kimi K3, 2.1."""
    transformers = pytest.importorskip("transformers")
    config = tiny_config(dtype="float32", gate_lower_bound=-5.0)
    write_tiny(tmp_path, config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()

    def bounded(gate, x):
        z = (gate.f_b_proj(gate.f_a_proj(x)) + gate.dt_bias).unflatten(-1, (gate.num_heads, gate.head_dim))
        return -5.0 * torch.sigmoid(gate.A_log.exp() * z)

    for layer in theirs.model.layers:
        if hasattr(layer.self_attn, "forget_gate"):
            layer.self_attn.forget_gate.forward = types.MethodType(bounded, layer.self_attn.forget_gate)
    ids = prompt(config, 2, 40)
    ours = load(tmp_path, config)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=ATOL, rtol=0)
    softplus = config.replace(linear_attn_config=tiny_config().linear_attn_config)
    assert (ours(ids) - load(tmp_path, softplus)(ids)).abs().max() > 100 * ATOL


def mean_over_depth(sources, query, gain, eps):
    """Equation of AttnRes, section 3: softmax over depth of w . RMSNorm(v), values not normalised."""
    values = torch.stack(sources)
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * gain
    return (keys @ query).softmax(0).unsqueeze(-1).mul(values).sum(0)


@torch.no_grad()
@pytest.mark.parametrize(
    "form", [{"attn_res_full": True}, *({"attn_res_block_size": n} for n in (1, 2, 3, 5))], ids=str
)
def test_attn_res_is_the_papers_equation(form):
    """h of every sub-layer from the block sums written out from the definition, float64, to rounding."""
    config = tiny_config(5, **form)
    model = random_model(config)
    ids = prompt(config, 2, 11)
    size = 1 if config.attn_res_full else 2 * config.attn_res_block_size
    subs = [
        (mix, f)
        for layer in model.layers
        for mix, f in (
            (layer.self_attention_res, lambda x, layer=layer: layer.attention(x, None)),
            (layer.mlp_res, layer.feed_forward),
        )
    ]
    embedding = model.embed_tokens(ids)
    outputs: list[torch.Tensor] = []

    def sources(count):
        """Representations before sub-layer `count`: the embedding, finished blocks, and the block under way."""
        blocks = [sum(outputs[i : min(i + size, count)]) for i in range(0, count, size)]
        return [embedding, *blocks]

    for i, (mix, f) in enumerate(subs):
        outputs.append(f(mean_over_depth(sources(i), mix.query, mix.norm_weight, config.rms_norm_eps)))
    last = model.output_attn_res
    want = mean_over_depth(sources(len(subs)), last.query, last.norm_weight, config.rms_norm_eps)
    torch.testing.assert_close(model.hidden(embedding), want, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_zero_queries_are_a_plain_mean_of_the_sources():
    config = tiny_config(attn_res_full=True)
    model = random_model(config)
    for p in (p for n, p in model.named_parameters() if n.endswith(".query")):
        p.zero_()
    seen = []
    model.output_attn_res.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    model(prompt(config, 1, 5))
    sources, mixed = seen[0]
    assert len(sources) == 2 * config.num_hidden_layers + 1
    torch.testing.assert_close(mixed, torch.stack(sources).mean(0), atol=1e-12, rtol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(
    "form", [{}, {"attn_res_full": True}, {"attn_res_block_size": 2, "gate_lower_bound": -3.0}], ids=str
)
def test_any_cut_with_a_cache_equals_one_pass(form):
    """Prefill in pieces, then token by token, in float64, to rounding."""
    config = tiny_config(**form)
    model = random_model(config)
    ids = prompt(config, 2, 40)
    cache = Cache(config)
    pieces = [model(part, cache) for part in ids.split([1, 17, 2, 16, 1, 1, 1, 1], dim=1)]
    assert cache.length == 40
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids), atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_float64_float32_and_bfloat16_agree_to_their_precision():
    config = tiny_config(attn_res_block_size=1)
    wide = random_model(config)
    ids = prompt(config, 1, 30)
    want = wide(ids)
    for dtype, scale in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        narrow = KimiLinearForCausalLM(config, dtype=dtype).eval()
        narrow.load_state_dict(wide.state_dict())
        assert narrow(ids).dtype == dtype
        # Routing may flip for a token between precisions, so the bound is on the typical logit.
        assert (narrow(ids).double() - want).abs().median() < scale * want.abs().max()


def test_gradients_reach_every_parameter_and_match_differences():
    config = tiny_config(attn_res_block_size=1, num_experts_per_token=8)
    model = random_model(config).train()
    ids = prompt(config, 1, 20)

    def loss():
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def slope(move, step=1e-5):
        """Of the loss along `move`, which adds a multiple of a direction to the weights; by central differences."""
        with torch.no_grad():
            move(step)
            up = loss()
            move(-2 * step)
            down = loss()
            move(step)
        return float(up - down) / (2 * step)

    loss().backward()
    kinds = set()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        if name.startswith("layers.0.self_attention_res."):
            continue  # the first mix has one source, whatever its query
        assert p.grad.abs().max() > 0, name
        kind = re.sub(r"\d+", "*", name)
        if kind in kinds:
            continue
        kinds.add(kind)
        at = int(p.grad.abs().argmax())
        expected = float(p.grad.view(-1)[at])
        assert slope(lambda x, p=p, at=at: p.view(-1)[at].add_(x)) == pytest.approx(expected, rel=1e-4), name
    # All others at once, every element of them in its own direction.
    rng = torch.Generator().manual_seed(1)
    steps = [(p, torch.randn(p.shape, generator=rng, dtype=p.dtype)) for p in model.parameters()]
    expected = sum(float((p.grad * direction).sum()) for p, direction in steps)
    together = slope(lambda x: [p.add_(x * direction) for p, direction in steps], step=1e-7)
    assert together == pytest.approx(expected, rel=1e-4)


def test_balancing_moves_the_selection_towards_equal_load():
    config = tiny_config(num_experts_per_token=1)
    moe = MoE(config, dtype=torch.float32).train()
    rng = torch.Generator().manual_seed(0)
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=rng)
    x = torch.randn(1000, config.hidden_size, generator=rng) + 0.3

    def worst():
        moe.load.zero_()
        moe(x)
        return float(moe.load.max() / moe.load.float().mean())

    before = worst()
    with torch.no_grad():
        for _ in range(60):
            moe.load.zero_()
            moe(x)
            moe.balance(3e-3)
    assert before > 1.5 and worst() < 1.15


def test_bad_input_is_refused():
    config = tiny_config(model_max_length=16)
    model = random_model(config, torch.float32)
    with pytest.raises(ValueError, match=r"must be \[batch, tokens\], got shape \[5\]"):
        model(torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="reach 17 tokens, model_max_length is 16"):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_generation_ends_at_the_end_token():
    config = tiny_config(attn_res_full=True)
    model = random_model(config, torch.float32)
    ids = prompt(config, 3, 8)
    free = generate(model, ids, 12)[:, 8:]
    stop = int(free[0, 4])
    out = generate(model, ids, 12, eos_token_id=stop)[:, 8:]
    first = (free[0] == stop).nonzero()[0].item()
    assert out[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert (out[0, first:] == stop).all()
    again = [generate(model, ids, 6, temperature=1.0, seed=s) for s in (1, 1, 2)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])
