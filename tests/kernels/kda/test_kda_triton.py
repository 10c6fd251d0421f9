"""KDA's Triton kernels: interpreted on the CPU, or on a GPU where there is one.

Tolerances, in the L2 norm against float64: float32 in the interpreter as everywhere (a few hundred products); on a GPU
its exponentials are approximate and its products split. bfloat16 as fla-core's own tests allow, 5e-3: products take
operands rounded to bfloat16.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from kimi_kernels import BackendError, _triton, chunk_kda, fused_recurrent_kda
from kimi_kernels.kda import ops
from kimi_kernels.kda import triton as backend_triton

pytest.importorskip("triton")
DEVICE = "cpu" if _triton.interpreting() else "cuda"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)

ERROR = {torch.float32: 2e-6 if _triton.interpreting() else 1e-4, torch.bfloat16: 5e-3}
IN_KERNEL = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


def moved(x, device):
    return x.to(device) if isinstance(x, torch.Tensor) else x


def on_device(rule):
    @functools.wraps(rule)
    def run(*args, **kwargs):
        found = rule(*(moved(x, DEVICE) for x in args), **{k: moved(x, DEVICE) for k, x in kwargs.items()})
        return tuple(moved(x, "cpu") for x in found)

    return run


chunk, recurrent = on_device(chunk_kda), on_device(fused_recurrent_kda)
RULES = [chunk, recurrent]


@pytest.fixture(autouse=True)
def _forced(backend):
    backend("triton")


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def relative(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def check(rule, oracle, inputs, limit=None, **options):
    out, final = rule(*inputs, output_final_state=True, **options)
    exact, exact_final = oracle(
        *map(wide, inputs), output_final_state=True, **{k: wide(x) for k, x in options.items()}
    )
    limit = limit or ERROR[inputs[2].dtype]
    assert out.dtype == inputs[2].dtype and final.dtype == torch.float32
    assert out.shape == exact.shape and final.shape == exact_final.shape
    assert relative(out, exact) <= limit
    assert relative(final, exact_final) <= limit
    return out, final


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 63, 64, 65, 200])
def test_lengths(make, oracle, dtype, tokens):
    inputs = make(1, tokens, 1, 1, 32, 48, dtype=dtype)
    check(chunk, oracle, inputs, initial_state=torch.randn(1, 1, 32, 48))


@pytest.mark.parametrize("tokens", [0, 1, 21])
def test_lengths_of_the_recurrence(make, oracle, tokens):
    for dtype in ERROR:
        inputs = make(2, tokens, 1, 2, 32, 48, dtype=dtype)
        check(recurrent, oracle, inputs, initial_state=torch.randn(2, 2, 32, 48))


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("K, V", [(64, 64), (72, 40), (128, 128), (256, 32), (96, 256), (5, 7)])
def test_head_sizes(make, oracle, rule, K, V):
    for dtype in ERROR:
        inputs = make(1, 20 if rule is chunk else 5, 1, 1, K, V, dtype=dtype)
        check(rule, oracle, inputs, initial_state=torch.randn(1, 1, K, V))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state_v_first", [False, True])
def test_packed_sequences_are_each_alone(make, oracle, rule, state_v_first):
    """Grouped value heads, sequences without tokens and with one; to the bit what each gives alone."""
    for dtype in ERROR:
        length = 15 if rule is recurrent else 40 if dtype == torch.float32 else 110
        offsets = [0, 0, 1, 2, length // 2, length // 2, length, length]
        inputs = make(1, length, 1, 2, 16, 16, dtype=dtype)
        states = torch.randn(7, 2, 16, 16)
        out, final = check(
            rule, oracle, inputs, initial_state=states, state_v_first=state_v_first,
            cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
        )  # fmt: skip
        for n, (a, b) in enumerate(pairwise(offsets)):
            alone, state = rule(
                *(x[:, a:b] for x in inputs), initial_state=states[n : n + 1], output_final_state=True,
                state_v_first=state_v_first,
            )  # fmt: skip
            assert torch.equal(alone, out[:, a:b]) and torch.equal(state[0], final[n])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_in_the_kernel(oracle, rule, lower_bound, dtype):
    T = 12 if rule is recurrent else 20 if dtype == torch.float32 else 70
    q, k = torch.randn(2, 1, T, 1, 64).to(dtype)
    v, g, beta = (torch.randn(1, T, 2, *s).to(dtype) for s in ([48], [64], []))
    options = dict(IN_KERNEL, allow_neg_eigval=True, lower_bound=lower_bound, scale=0.3)
    check(rule, oracle, [q, k, v, g, beta], **options, A_log=torch.randn(2), dt_bias=torch.randn(2 * 64))


def test_gate_without_rate_or_bias(oracle):
    q, k, v, g = torch.randn(4, 1, 40, 1, 32)
    check(chunk, oracle, [q, k, v, g, torch.randn(1, 40, 1)], **IN_KERNEL, lower_bound=-2.0)


@pytest.mark.parametrize("rule", RULES)
def test_strides_and_nan_around_the_inputs(make, oracle, rule):
    inputs = make(1, 19, 2, 2, 24, 40)
    padded = []
    for x in inputs:
        room = torch.full([n + 9 for n in x.shape], float("nan"))
        view = room[tuple(slice(0, n) for n in x.shape)]
        view.copy_(x)
        padded.append(view)
    out, final = check(rule, oracle, inputs)
    for actual, wanted in zip(rule(*padded, output_final_state=True), (out, final)):
        assert torch.equal(actual, wanted)
    turned = [x.transpose(1, -1).contiguous().transpose(1, -1) for x in inputs]  # channels are strided
    assert torch.equal(rule(*turned)[0], out)


@pytest.mark.parametrize("change", ["values", "infinite", "saturated decay", "huge decay"])
def test_the_future_changes_no_bit_of_the_past(make, change):
    inputs = make(1, 70, 1, 1, 32, 32, dtype=torch.bfloat16)
    before = chunk(*inputs)[0]
    for first in (1, 7, 63, 65):
        q, k, v, g, beta = (x.clone() for x in inputs)
        if change == "values":
            for x in (q, k, v, beta):
                x[:, first:] = torch.randn_like(x[:, first:])
        elif change == "infinite":
            v[:, first:] = 1e30
        g[:, first:] = -5.0 if change == "saturated decay" else -300.0 if change == "huge decay" else -0.1
        assert torch.equal(chunk(q, k, v, g, beta)[0][:, :first], before[:, :first])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 5.0, 40.0, 1e4, float("inf")])
def test_decay_of_every_size(make, oracle, dtype, decay):
    """None, saturated (e^320 over 64 tokens), and unbounded: channels that forget at once beside others that do not."""
    q, k, v, g, beta = make(1, 70, 1, 1, 32, 32, dtype=dtype)
    g = torch.full_like(g, -decay)
    if decay > 5:
        g = torch.where(torch.rand(g.shape) < 0.3, g, -torch.rand(g.shape).to(dtype))
        g[0, 20:24] = -decay
    check(chunk, oracle, [q, k, v, g, beta])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 1e-3])
def test_slow_decay_with_repeated_keys(make, oracle, dtype, decay):
    """The triangular matrix is then near all ones: a truncated series for its inverse would be wrong.

    What is written is nearly all erased again, so bfloat16 operands cost more here, to fla-core's kernels as well:
    2 to 4 % on such inputs.
    """
    q, k, v, g, beta = make(1, 64 if dtype == torch.float32 else 128, 1, 1, 64, 64)
    k = F.normalize(k[:, :1] + 0.05 * k, dim=-1)
    inputs = [x.to(dtype) for x in (q, k, v, torch.full_like(g, -decay), torch.full_like(beta, 0.999))]
    check(chunk, oracle, inputs, limit=0.04 if dtype == torch.bfloat16 else None)


@pytest.mark.parametrize("cut", [1, 64, 80])
def test_state_hand_over_and_steps(make, cut):
    """Prefill in pieces is prefill at once, and the recurrence goes on where it ends."""
    inputs = make(1, 90, 1, 1, 32, 32)
    whole, final = chunk(*inputs, output_final_state=True)
    first, state = chunk(*(x[:, :cut] for x in inputs), output_final_state=True)
    second, handed = chunk(*(x[:, cut:] for x in inputs), initial_state=state, output_final_state=True)
    assert relative(torch.cat([first, second], 1), whole.double()) <= ERROR[torch.float32]
    assert relative(handed, final.double()) <= ERROR[torch.float32]
    if cut == 80:
        steps, stepped = recurrent(
            *(x[:, cut:] for x in inputs), initial_state=state, output_final_state=True
        )
        assert relative(steps, second.double()) <= ERROR[torch.float32]
        assert relative(stepped, handed.double()) <= ERROR[torch.float32]


@pytest.mark.skipif(DEVICE == "cuda", reason="the storage is reserved memory that a GPU would have to have")
@pytest.mark.parametrize("rule", RULES)
def test_offsets_beyond_32_bits(make, rule):
    stride = 2**30
    room = torch.empty(0).set_(torch.UntypedStorage(4 * (3 * stride + 64)))
    far = room.as_strided((1, 4, 1, 16), (0, stride, 16, 1))
    for n in (1, 2, 3):  # k, v and g
        inputs = make(1, 4, 1, 1, 16, 16)
        near, _ = rule(*inputs)
        far.copy_(inputs[n])
        inputs[n] = far
        assert torch.equal(rule(*inputs)[0], near)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"cu_seqlens": [1, 20]}, "cu_seqlens must start at 0, got 1"),
        ({"cu_seqlens": [0, 15, 9, 20]}, "cu_seqlens must not decrease, got 15 then 9"),
        ({"cu_seqlens": [0, 25]}, "cu_seqlens must end at T=20, got 25"),
        ({"lower_bound": -6.0, "use_gate_in_kernel": True}, "lower_bound must be in"),
        ({"initial_state": torch.zeros(1, 1, 32, 8)}, "initial_state must have shape"),
    ],
)
def test_bad_input_never_reaches_a_kernel(monkeypatch, make, wrong, message):
    monkeypatch.setattr(_triton, "launch", lambda *_, **__: pytest.fail("launched"))
    wrong = {k: torch.tensor(x) if isinstance(x, list) else x for k, x in wrong.items()}
    with pytest.raises(ValueError, match=message):
        chunk(*make(1, 20, 1, 1, 32, 32), **wrong)


def test_what_it_cannot_run_is_said(make):
    with pytest.raises(BackendError, match="triton, but it cannot run chunk_kda: takes float32, bfloat16 or float16"):
        chunk(*make(1, 4, 1, 1, 16, 16, dtype=torch.float64))
    with pytest.raises(BackendError, match="takes head sizes up to 256, got K=257"):
        chunk(*make(1, 4, 1, 1, 257, 16))


@pytest.mark.slow
@pytest.mark.parametrize("op", [ops.chunk, ops.recurrent])
def test_opcheck(make, op):
    inputs = [moved(x, DEVICE) for x in make(1, 5, 1, 2, 16, 16)]
    state, A_log, bias = (torch.randn(*s, device=DEVICE) for s in ([2, 2, 16, 16], [2], [32]))
    offsets = torch.tensor([0, 3, 5], device=DEVICE)
    torch.library.opcheck(
        op.default, (*inputs, state, A_log, bias, offsets, 0.3, True, True, True, False, -5.0, True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("rule", [chunk_kda, fused_recurrent_kda])
def test_compiles_as_one_graph(make, rule):
    inputs = [moved(x, DEVICE) for x in make(1, 5, 1, 1, 16, 16)]
    run = lambda *x: rule(*x, output_final_state=True)
    for actual, wanted in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), run(*inputs)):
        assert torch.equal(actual, wanted)


def test_configuration_does_not_depend_on_the_batch():
    """Batch invariance: what a kernel is compiled for follows from a head's shape."""
    problem = functools.partial(
        backend_triton.Problem, A_log=None, dt_bias=None, cu_seqlens=None, initial_state=None
    )
    options = backend_triton.Options(1.0, False, False, False, False, None, False)
    seen = set()
    for B, T in ((1, 1), (3, 200)):
        q = torch.empty(B, T, 2, 64)
        p = problem(q, q, q, q, torch.empty(B, T, 2), options=options)
        seen.add(tuple(sorted(p.input_constants().items())))
    assert len(seen) == 1


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lower bound", "softplus", "plain", "slow decay", "saturated"])
def test_as_near_to_float64_as_fla(make, oracle, fla_kda, case):
    """The published Triton kernels on the same bfloat16 inputs; at most 5 % more error, which is its own scatter."""
    T, K = 48 if case == "softplus" else 100, 64  # their kernel for unbounded gates is slow to interpret
    options, safe = {}, False
    q, k, v, g, beta = make(1, T, 1, 1, K, K, dtype=torch.bfloat16)
    if case in ("lower bound", "softplus"):
        q, k, v, g = (torch.randn(1, T, 1, K).bfloat16() for _ in range(4))
        safe = case == "lower bound"
        options = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "A_log": torch.randn(1),
                   "dt_bias": torch.randn(K), "lower_bound": -5.0 if safe else None}  # fmt: skip
    else:
        g = g.float()
        if case == "slow decay":
            k = F.normalize(k[:, :1].float() + 0.05 * torch.randn(1, T, 1, K), dim=-1).bfloat16()
            g, beta = torch.full_like(g, -1e-3), torch.full_like(beta, 0.999)
        elif case == "saturated":
            g, safe = torch.full_like(g, -5.0), True
    inputs, state = [q, k, v, g, beta], torch.randn(1, 1, K, K) * (case != "slow decay")
    exact = oracle(*map(wide, inputs), initial_state=state.double(), output_final_state=True,
                   **{name: wide(x) for name, x in options.items()})  # fmt: skip
    theirs = on_device(fla_kda.chunk_kda)(
        *inputs, initial_state=state.clone(), output_final_state=True, safe_gate=safe, **options
    )
    ours = chunk(*inputs, initial_state=state, output_final_state=True, **options)
    for mine, other, wanted in zip(ours, theirs, exact):
        assert relative(mine, wanted) <= 1.05 * relative(other, wanted)
