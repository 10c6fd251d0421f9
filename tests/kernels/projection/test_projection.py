"""Linear maps of a few tokens against float64."""

from __future__ import annotations

import pytest
import torch

from kimi_kernels import BackendError, batched_linear, linear


def oracle(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.einsum("btk,bnk->btn", x.double(), weight.double())


# (B, T, K, N): one token, few, more than one block of rows, odd K, more tokens than the native path takes, none.
@pytest.mark.parametrize(
    "sizes", [(2, 1, 32, 128), (4, 3, 64, 200), (3, 16, 37, 67), (2, 140, 32, 64), (2, 0, 16, 8), (1, 1, 8, 4)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_float64(isa, sizes, dtype, accurate):
    batch, tokens, width, rows = sizes
    x, weight = torch.randn(batch, tokens, width).to(dtype), torch.randn(batch, rows, width).to(dtype)
    accurate("out", batched_linear(x, weight), oracle(x, weight))


@pytest.mark.parametrize("sizes", [(1, 32, 130), (3, 37, 7), (128, 64, 65), (129, 64, 65), (0, 16, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_map_matches_float64(isa, sizes, dtype, accurate):
    tokens, width, rows = sizes
    x, weight = torch.randn(tokens, width + 3).to(dtype)[:, 3:], torch.randn(rows, width).to(dtype)
    accurate("out", linear(x, weight), x.double() @ weight.double().t())


def test_takes_views_of_a_wider_tensor(isa, accurate):
    x = torch.randn(5, 3, 48).transpose(0, 1)[..., 8:40]
    weight = torch.randn(3, 28, 32)[:, 8:]
    accurate("out", batched_linear(x, weight), oracle(x, weight))


def test_a_token_has_the_bits_it_has_alone(isa):
    x, weight = torch.randn(3, 11, 40), torch.randn(3, 24, 40)
    together = batched_linear(x, weight)
    for t in (0, 4, 10):
        assert torch.equal(batched_linear(x[:, t : t + 1], weight)[:, 0], together[:, t])


def test_opcheck_and_compile(native):
    x, weight = torch.randn(2, 3, 16), torch.randn(2, 8, 16)
    torch.library.opcheck(torch.ops.kimi.batched_linear.default, (x, weight))
    torch.library.opcheck(torch.ops.kimi.linear.default, (x[0], weight[0]))
    compiled = torch.compile(lambda a, b: batched_linear(a, b) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), batched_linear(x, weight) + 1)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"weight must be \[B, N, K\]"):
        batched_linear(torch.randn(2, 1, 16), torch.randn(2, 8, 15))
    with pytest.raises(ValueError, match=r"weight must be \[N, K\]"):
        linear(torch.randn(2, 16), torch.randn(8, 15))


def test_forced_native_backend_says_what_it_cannot_do(native, monkeypatch):
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "cpu")
    with pytest.raises(BackendError, match="at most 128 tokens, got 129"):
        batched_linear(torch.randn(1, 129, 16), torch.randn(1, 7, 16))
