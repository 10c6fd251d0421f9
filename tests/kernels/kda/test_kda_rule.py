"""chunk_kda and fused_recurrent_kda against equation 1 of the paper in float64, on every instruction set."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_kernels import chunk_kda, fused_recurrent_kda

RULES = [chunk_kda, fused_recurrent_kda]


def wide(tensors):
    return [x.double() for x in tensors]


# The ends of the 16-token tiles and of the vectors; head sizes that fill a vector, a panel, neither.
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 63, 64, 65, 200])
def test_lengths(isa, backend, make, oracle, accurate, rule, tokens):
    backend("cpu")
    inputs = make(2, tokens, 2, 2, 32, 48)
    state = torch.randn(2, 2, 32, 48)
    out, final = rule(*inputs, initial_state=state, output_final_state=True)
    exact, exact_final = oracle(*wide(inputs), initial_state=state.double(), output_final_state=True)
    accurate("output", out, exact)
    accurate("final state", final, exact_final)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("K, V", [(8, 8), (16, 256), (64, 64), (72, 40), (128, 128), (256, 16), (5, 7)])
def test_head_sizes(isa, backend, make, oracle, accurate, rule, K, V):
    backend("cpu")
    inputs = make(1, 20, 1, 1, K, V)
    state = torch.randn(1, 1, K, V)
    out, final = rule(*inputs, initial_state=state, output_final_state=True)
    exact, exact_final = oracle(*wide(inputs), initial_state=state.double(), output_final_state=True)
    accurate("output", out, exact)
    accurate("final state", final, exact_final)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state_v_first", [False, True])
def test_packed_sequences_with_empty_and_one_token_ones(
    isa, backend, make, oracle, accurate, rule, state_v_first
):
    backend("cpu")
    offsets = [0, 0, 1, 2, 35, 35, 60, 60]
    inputs = make(1, 60, 1, 3, 32, 32)
    options = {
        "initial_state": torch.randn(7, 3, 32, 32),
        "output_final_state": True,
        "state_v_first": state_v_first,
        "cu_seqlens": torch.tensor(offsets, dtype=torch.int32),
    }
    out, final = rule(*inputs, **options)
    exact, exact_final = oracle(
        *wide(inputs), **{**options, "initial_state": options["initial_state"].double()}
    )
    accurate("output", out, exact)
    accurate("final state", final, exact_final)
    for n, (a, b) in enumerate(pairwise(offsets)):
        part = [x[:, a:b] for x in inputs]
        alone, state = rule(
            *part,
            initial_state=options["initial_state"][n : n + 1],
            output_final_state=True,
            state_v_first=state_v_first,
        )
        assert torch.equal(alone, out[:, a:b]), "a sequence's result must not depend on its neighbours"
        assert torch.equal(state[0], final[n])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_in_the_kernel(isa, backend, oracle, accurate, rule, lower_bound, dtype):
    backend("cpu")
    q, k = torch.randn(2, 2, 40, 2, 64).to(dtype)
    v, g, beta = (torch.randn(2, 40, 4, *s).to(dtype) for s in ([48], [64], []))
    A_log, dt_bias = torch.randn(4), torch.randn(4 * 64)
    options = {
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "allow_neg_eigval": True,
        "lower_bound": lower_bound,
        "scale": 0.3,
        "output_final_state": True,
    }
    out, final = rule(q, k, v, g, beta, **options, A_log=A_log, dt_bias=dt_bias)
    exact, exact_final = oracle(
        *wide([q, k, v, g, beta]), **options, A_log=A_log.double(), dt_bias=dt_bias.double()
    )
    assert out.dtype == dtype
    accurate("output", out, exact)
    accurate("final state", final, exact_final)


@pytest.mark.parametrize("rule", RULES)
def test_non_contiguous_inputs(isa, backend, make, oracle, accurate, rule):
    backend("cpu")
    packed = torch.randn(1, 30, 2, 3, 32).mul_(0.2)
    q, k, v = packed.unbind(3)
    g = -torch.rand(1, 2, 32, 30).permute(0, 3, 1, 2)  # channels strided as well
    beta = torch.rand(2, 30, 1).permute(2, 1, 0)
    state = torch.randn(1, 32, 32, 2).permute(0, 3, 2, 1)
    out, final = rule(q, k, v, g, beta, initial_state=state, output_final_state=True)
    exact, exact_final = oracle(
        *wide([q, k, v, g, beta]), initial_state=state.double(), output_final_state=True
    )
    accurate("output", out, exact)
    accurate("final state", final, exact_final)


@pytest.mark.parametrize("rule", RULES)
def test_more_threads_than_heads(isa, backend, make, rule):
    """The columns of a head are then shared out; that must not change a bit."""
    backend("cpu")
    inputs = make(1, 50, 1, 1, 64, 128)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 3, 16):
            torch.set_num_threads(number)
            results.append(rule(*inputs, output_final_state=True))
    finally:
        torch.set_num_threads(threads)
    for out, final in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(final, results[0][1])


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 40])
def test_state_hand_over_at_any_cut(isa, backend, make, accurate, cut):
    """Handbook: chunked prefill equals whole prefill. To rounding, as tiles start elsewhere."""
    backend("cpu")
    inputs = make(1, 41, 2, 2, 64, 64)
    whole, final = chunk_kda(*inputs, output_final_state=True)
    first, state = chunk_kda(*(x[:, :cut] for x in inputs), output_final_state=True)
    second, handed = chunk_kda(*(x[:, cut:] for x in inputs), initial_state=state, output_final_state=True)
    accurate("output", torch.cat([first, second], 1), whole.double())
    accurate("final state", handed, final.double())
    step, stepped = fused_recurrent_kda(
        *(x[:, cut:] for x in inputs), initial_state=state, output_final_state=True
    )
    accurate("decode equals prefill", step, second.double())
    accurate("its state", stepped, final.double())


@pytest.mark.parametrize("rule", RULES)
def test_equal_decays_make_gated_deltanet_and_none_deltanet(isa, backend, make, accurate, rule):
    backend("cpu")
    q, k, v, g, beta = make(1, 50, 1, 1, 32, 32)
    for scalar in (g[..., :1], torch.zeros(1, 50, 1, 1)):
        out, final = rule(q, k, v, scalar.expand_as(g).contiguous(), beta, output_final_state=True)
        state = torch.zeros(32, 32, dtype=torch.float64)
        exact = []
        for t in range(50):  # Gated DeltaNet with a scalar decay; decay 1 is DeltaNet
            kt, vt, b = k[0, t, 0].double(), v[0, t, 0].double(), beta[0, t, 0].double()
            state = scalar[0, t, 0].double().exp() * (
                state - b * torch.outer(kt, kt @ state)
            ) + b * torch.outer(kt, vt)
            exact.append(q[0, t, 0].double() @ state * 32**-0.5)
        accurate("output", out[0, :, 0], torch.stack(exact))
        accurate("state", final[0, 0], state)


@pytest.mark.parametrize("rule", RULES)
def test_without_writes_the_state_only_decays(isa, backend, make, accurate, rule):
    backend("cpu")
    q, k, v, g, beta = make(1, 30, 1, 1, 32, 32, decay=0.2)
    state = torch.randn(1, 1, 32, 32)
    _, final = rule(q, k, v, g, 0 * beta, initial_state=state, output_final_state=True)
    accurate("state", final, g.double().sum(1).exp()[..., None] * state.double())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_shapes(native, backend, make, oracle, accurate, data):
    backend("cpu")
    draw = data.draw
    heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    K, V = draw(st.integers(1, 80)), draw(st.integers(1, 80))
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    inputs = make(
        1, int(offsets[-1]), heads, heads * groups, K, V, decay=draw(st.sampled_from([0.01, 1.0, 5.0, 50.0]))
    )
    v_first = draw(st.booleans())
    state = torch.randn(len(lengths), heads * groups, *((V, K) if v_first else (K, V)))
    options = {"output_final_state": True, "state_v_first": v_first, "cu_seqlens": offsets}
    exact, exact_final = oracle(*wide(inputs), initial_state=state.double(), **options)
    for rule in RULES:
        out, final = rule(*inputs, initial_state=state, **options)
        accurate("output", out, exact)
        accurate("final state", final, exact_final)


@pytest.mark.parametrize("rule", RULES)
def test_reference_in_float64(backend, make, oracle, rule):
    """The reference backend itself: both forms are equation 1 to float64 rounding, also where decays are extreme."""
    backend("reference")
    for decay in (0.01, 5.0, 200.0):
        inputs = make(2, 70, 1, 2, 16, 24, decay=decay, dtype=torch.float64)
        state = torch.randn(2, 2, 16, 24, dtype=torch.float64)
        out, final = rule(*inputs, initial_state=state, output_final_state=True)
        exact, exact_final = oracle(*inputs, initial_state=state, output_final_state=True)
        torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(final, exact_final, rtol=1e-10, atol=1e-12)
