"""What the kernel tests share: instruction sets, and comparison with float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from kimi_kernels import _native, _triton

if _triton.interpreting():
    from kimi_kernels.testing import interpreter

    interpreter.install()

_ISAS = _native.usable_isas() if _native.unavailable() is None else []

# float32 kernels sum a few hundred products: their error in the L2 norm stays within some units of 2^-24 = 6e-8.
FLOAT32_ERROR = 2e-6
# A kernel that computes in float32 and rounds once has the error of the rounded exact result; the rest is margin.
BFLOAT16_MARGIN = 1.2


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def native() -> None:
    """Needs the native library; says why where there is none."""
    reason = _native.unavailable()
    assert reason is None, reason


@pytest.fixture(params=_ISAS or ["missing"])
def isa(request: pytest.FixtureRequest, native: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test on each instruction set that was built and that this CPU has."""
    monkeypatch.setattr(_native._library(), "isa", request.param)
    _native.kernel.cache_clear()
    yield request.param
    _native.kernel.cache_clear()


def _error(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact).norm().item()


def assert_accurate(name: str, actual: Tensor, exact: Tensor, roundings: int = 1) -> None:
    """`actual` is as near to the float64 result as its dtype allows.

    `roundings`: to bfloat16 on the way, the last one included; independent ones add like their squares.
    """
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    if actual.dtype == torch.bfloat16:
        rounding = roundings**0.5 * _error(exact.bfloat16(), exact)
        limit = BFLOAT16_MARGIN * rounding + FLOAT32_ERROR * exact.norm().item()
    else:
        limit = FLOAT32_ERROR * exact.norm().item() + 1e-30
    assert _error(actual, exact) <= limit, f"{name}: error {_error(actual, exact):.2e}, limit {limit:.2e}"


@pytest.fixture
def accurate() -> Callable[[str, Tensor, Tensor], None]:
    return assert_accurate


def _outputs(result: Tensor | Sequence[Tensor | None]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [r for r in result if r is not None]


@pytest.fixture
def accurate_with_gradients() -> Callable[..., None]:
    """check(op, oracle, inputs): results and gradients of op against autograd through oracle in float64.

    The oracle gets the same values in float64; None among the inputs is passed through.
    """

    def check(
        op: Callable[..., object], oracle: Callable[..., object], inputs: Sequence[Tensor | None]
    ) -> None:
        mine = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
        exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
        got, want = _outputs(op(*mine)), _outputs(oracle(*exact))
        assert len(got) == len(want)
        for n, (a, b) in enumerate(zip(got, want)):
            assert_accurate(f"output {n}", a, b.detach())
        weights = [torch.randn_like(y) for y in got]
        live = [n for n, x in enumerate(inputs) if x is not None]
        grads = torch.autograd.grad(got, [mine[n] for n in live], weights)
        exact_grads = torch.autograd.grad(
            want, [exact[n] for n in live], [w.double() for w in weights], materialize_grads=True
        )
        for n, a, b in zip(live, grads, exact_grads):
            assert a.dtype == inputs[n].dtype
            assert_accurate(f"gradient of input {n}", a, b)

    return check
