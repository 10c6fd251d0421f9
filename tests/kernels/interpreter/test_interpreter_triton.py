"""The corrected interpreter against torch's bfloat16 arithmetic, which rounds every operation to nearest even."""

from __future__ import annotations

import numpy as np
import pytest
import torch

tl = pytest.importorskip("triton.language")
import triton  # noqa: E402

from kimi_kernels import _triton  # noqa: E402
from kimi_kernels.testing import interpreter  # noqa: E402

pytestmark = pytest.mark.skipif(not _triton.interpreting(), reason="needs TRITON_INTERPRET=1")

N = 64


@triton.jit
def elementwise_kernel(x, y, out, OP: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(x + at), tl.load(y + at)
    if OP == "add":
        c = a + b
    elif OP == "sub":
        c = a - b
    elif OP == "mul":
        c = a * b
    elif OP == "maximum":
        c = tl.maximum(a, b)
    elif OP == "where":
        c = tl.where(a > b, a, b)
    elif OP == "neg":
        c = -a
    else:
        c = tl.abs(a)
    tl.store(out + at, c)


TORCH = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "maximum": torch.maximum,
    "where": torch.maximum,
    "neg": lambda a, b: -a,
    "abs": lambda a, b: a.abs(),
}


@pytest.mark.parametrize("name", TORCH)
def test_elementwise(name):
    x, y = (100 * torch.randn(2, N)).bfloat16()
    out = torch.empty(N, dtype=torch.bfloat16)
    elementwise_kernel[(1,)](x, y, out, name, N)
    assert torch.equal(out, TORCH[name](x, y))


@triton.jit
def cast_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_casts(source, target):
    x = (100 * torch.randn(N)).to(source)
    out = torch.empty(N, dtype=target)
    cast_kernel[(1,)](x, out, N)
    assert torch.equal(out, x.to(target))


def test_rounding_at_ties_and_ends():
    ends = [1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 3.4e38, float("inf"), -float("inf"), 1e-40, 0.0, -0.0]
    x = torch.tensor([*ends, float("nan")])
    bits = interpreter.narrow(x.numpy())
    assert torch.equal(torch.from_numpy(interpreter.widen(bits))[:-1], x.bfloat16().float()[:-1])
    assert np.isnan(interpreter.widen(bits)[-1])


@triton.jit
def reduce_kernel(x, sums, maxima, prefix, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)
    a = tl.load(x + at)
    tl.store(sums + tl.arange(0, M), tl.sum(a.to(tl.float32), axis=1))
    tl.store(maxima + tl.arange(0, M), tl.max(a, axis=1))
    tl.store(prefix + at, tl.cumsum(a.to(tl.float32), axis=1, reverse=True))


def test_reductions_and_scans():
    x = torch.randn(4, N).bfloat16()
    sums, maxima, prefix = torch.empty(4), torch.empty(4, dtype=torch.bfloat16), torch.empty(4, N)
    reduce_kernel[(1,)](x, sums, maxima, prefix, 4, N)
    assert torch.equal(maxima, x.amax(1))
    torch.testing.assert_close(sums, x.float().sum(1))
    torch.testing.assert_close(prefix, x.float().flip(1).cumsum(1).flip(1))


@triton.jit
def dot_kernel(a, b, c, PRECISION: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)
    product = tl.dot(tl.load(a + at), tl.trans(tl.load(b + at)), input_precision=PRECISION)
    tl.store(c + at, product)


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3", "bf16x3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dot(precision, dtype):
    a, b = torch.randn(2, 16, 16).to(dtype)
    c = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, c, precision, 16)
    torch.testing.assert_close(c, a.float() @ b.float().T)


@triton.jit
def scalar_mask_kernel(out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, 1.0, mask=(at < N // 2) & (n + tl.program_id(0) > 2))


def test_comparison_of_scalars_in_a_mask():
    for n, written in ((2, 0), (3, N // 2)):
        out = torch.zeros(N)
        scalar_mask_kernel[(1,)](out, n, N)
        assert out.sum() == written


@triton.autotune(configs=[triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 32})], key=["N"])
@triton.jit
def tuned_kernel(out, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    for first in tl.range(0, N, BLOCK):
        tl.store(out + first + at, BLOCK, mask=first + at < N)


def test_autotune_takes_the_first_configuration():
    out = torch.zeros(50)
    tuned_kernel[(1,)](out, 50)
    assert torch.equal(out, torch.full((50,), 16.0))


def test_huge_storage_is_left_in_place():
    """A view far into reserved memory: copying the storage onto itself would touch all of it."""
    room = torch.empty(0).set_(torch.UntypedStorage(4 * (3 * 2**30 + N)))
    x = room[3 * 2**30 :]
    x.fill_(1.5)
    out = torch.empty(N)
    cast_kernel[(1,)](x, out, N)
    assert torch.equal(out, torch.full((N,), 1.5))


def test_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET must be 1 before triton is imported"):
        interpreter.install()
