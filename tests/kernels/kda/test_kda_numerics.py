"""Numerical traps that other implementations of KDA fell into, each as a test on every instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kimi_kernels import chunk_kda, fused_recurrent_kda

RULES = [chunk_kda, fused_recurrent_kda]


def check(rule, oracle, accurate, inputs, **options):
    out, final = rule(*inputs, output_final_state=True, **options)
    exact, exact_final = oracle(*(x.double() for x in inputs), output_final_state=True)
    accurate("output", out, exact)
    accurate("state", final, exact_final)


@pytest.mark.parametrize("T", [16, 47])
@pytest.mark.parametrize("change", ["values", "infinite", "saturated decay", "huge decay"])
def test_the_future_changes_no_bit_of_the_past(isa, backend, make, T, change):
    """Tiles anchored in their middle, or masked after a product, leak later tokens into earlier outputs."""
    backend("cpu")
    inputs = make(1, T, 2, 2, 64, 64)
    before = chunk_kda(*inputs)[0]
    for first in (1, 7, T - 1):
        q, k, v, g, beta = (x.clone() for x in inputs)
        if change == "values":
            for x in (q, k, v, beta):
                x[:, first:] = torch.randn_like(x[:, first:])
            g[:, first:] *= torch.rand_like(g[:, first:])
        elif change == "infinite":
            k[:, first:], v[:, first:] = float("nan"), float("inf")
        elif change == "saturated decay":
            g[:, first:] = -5.0
        else:
            g[:, first:] = -300.0
        assert torch.equal(chunk_kda(q, k, v, g, beta)[0][:, :first], before[:, :first])


@pytest.mark.parametrize("rule", RULES)
def test_saturated_lower_bound(isa, backend, make, oracle, accurate, rule):
    """-5 nats in every channel and token: e^75 within a tile, and e^320 within 64 tokens."""
    backend("cpu")
    q, k, v, g, beta = make(1, 100, 1, 1, 64, 64)
    check(rule, oracle, accurate, [q, k, v, torch.full_like(g, -5.0), beta])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [8.0, 40.0, 110.0, 1e4])
def test_unbounded_decay(isa, backend, make, oracle, accurate, rule, scale):
    """A softplus gate has no bound: channels that forget at once beside channels that keep everything."""
    backend("cpu")
    q, k, v, g, beta = make(1, 70, 1, 1, 64, 64)
    g = -scale * torch.rand(1, 70, 1, 64) * (torch.rand(1, 70, 1, 64) < 0.3)
    g[0, 20:24] = -scale  # whole tokens as well
    check(rule, oracle, accurate, [q, k, v, g, beta])


@pytest.mark.parametrize("rule", RULES)
def test_minus_infinity_resets_the_state(isa, backend, make, oracle, accurate, rule):
    backend("cpu")
    q, k, v, g, beta = make(1, 40, 1, 1, 32, 32)
    g[0, 19] = float("-inf")
    check(rule, oracle, accurate, [q, k, v, g, beta])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", [0.0, 1e-3])
def test_slow_decay_with_repeated_keys(isa, backend, make, oracle, accurate, rule, decay):
    """Then the triangular matrix is near all ones, and a truncated Neumann series for its inverse is wrong."""
    backend("cpu")
    q, k, v, g, beta = make(1, 128, 1, 1, 64, 64)
    k = F.normalize(k[:, :1] + 0.05 * k, dim=-1)
    check(rule, oracle, accurate, [q, k, v, torch.full_like(g, -decay), torch.full_like(beta, 0.999)])


@pytest.mark.parametrize("rule", RULES)
def test_double_write_strength(isa, backend, make, oracle, accurate, rule):
    """beta up to 2: reflections, eigenvalues down to -1."""
    backend("cpu")
    q, k, v, g, beta = make(1, 64, 1, 1, 32, 32, decay=0.1)
    out, final = rule(q, k, v, g, beta, allow_neg_eigval=True, output_final_state=True)
    exact, exact_final = oracle(*(x.double() for x in (q, k, v, g, 2 * beta)), output_final_state=True)
    accurate("output", out, exact)
    accurate("state", final, exact_final)


def test_error_does_not_grow_with_length(native, backend, make, oracle, accurate):
    backend("cpu")
    inputs = make(1, 2000, 1, 1, 32, 32, decay=0.05)
    check(chunk_kda, oracle, accurate, inputs)


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_costs_its_rounding_and_no_more(isa, backend, make, oracle, accurate, rule):
    """bf16 in and out: the arithmetic between is float32, so the error is that of rounding the exact result."""
    backend("cpu")
    inputs = make(1, 130, 2, 2, 64, 64, decay=1.0, dtype=torch.bfloat16)
    check(rule, oracle, accurate, inputs)


@pytest.mark.parametrize("rule", RULES)
def test_padding_behind_a_head_is_not_read(isa, backend, make, rule):
    """Channels, tokens and heads next to the ones in use are NaN."""
    backend("cpu")
    inputs = make(1, 21, 2, 2, 24, 24)
    clean = rule(*inputs, output_final_state=True)
    padded = []
    for x in inputs:
        room = torch.full([n + 9 for n in x.shape], float("nan"))
        view = room[tuple(slice(0, n) for n in x.shape)]
        view.copy_(x)
        padded.append(view)
    out, final = rule(*padded, output_final_state=True)
    assert torch.equal(out, clean[0])
    assert torch.equal(final, clean[1])


def test_offsets_beyond_32_bits(native, backend):
    """Element offsets above 2^31, on an expanded tensor that takes no memory."""
    backend("cpu")
    stride = 2**30
    room = torch.empty(0).set_(torch.UntypedStorage(4 * (3 * stride + 64)))  # reserved, never touched
    v = room.as_strided((1, 4, 1, 8), (0, stride, 8, 1))
    small = torch.randn(1, 4, 1, 8)
    v.copy_(small)
    q, k, g, beta = (
        torch.rand(1, 4, 1, 8),
        torch.rand(1, 4, 1, 8) / 3,
        -torch.rand(1, 4, 1, 8),
        torch.rand(1, 4, 1),
    )
    assert torch.equal(chunk_kda(q, k, v, g, beta)[0], chunk_kda(q, k, small, g, beta)[0])
    assert torch.equal(fused_recurrent_kda(q, k, v, g, beta)[0], fused_recurrent_kda(q, k, small, g, beta)[0])
