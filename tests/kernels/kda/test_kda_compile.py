"""The ops as torch.compile, autograd and export see them."""

from __future__ import annotations

import pytest
import torch

from kimi_kernels import chunk_kda, fused_recurrent_kda, kda_gate
from kimi_kernels.kda import ops, paged

OPTIONS = (0.3, True, True, True, False, -5.0, True)


def tensors(requires_grad: bool):
    q, k = torch.randn(2, 1, 20, 1, 16)
    v, g, beta = torch.randn(1, 20, 2, 16), torch.randn(1, 20, 2, 16), torch.randn(1, 20, 2)
    found = [q, k, v, g, beta, torch.randn(2, 2, 16, 16), torch.randn(2), torch.randn(32)]
    return [x.requires_grad_(requires_grad) for x in found]


@pytest.mark.parametrize("op", [ops.chunk, ops.recurrent])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_opcheck(native, backend, op, name):
    backend(name)
    offsets = torch.tensor([0, 3, 20])
    torch.library.opcheck(op.default, (*tensors(True), offsets, *OPTIONS))
    torch.library.opcheck(
        op.default,
        (*tensors(False)[:5], None, None, None, None, *OPTIONS[:2], False, *OPTIONS[3:5], None, False),
    )


def test_opcheck_gate():
    torch.library.opcheck(
        ops.gate.default, (torch.randn(3, 2, 8, requires_grad=True), torch.randn(2), None, -5.0)
    )


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_opcheck_paged(native, backend, name):
    backend(name)
    qkv, g, beta, gate = torch.randn(6, 96), torch.randn(6, 2, 16), torch.randn(6, 2), torch.randn(6, 2, 16)
    weight, conv, state = torch.randn(96, 4), torch.randn(3, 3, 96), torch.randn(3, 2, 16, 16)
    slots, offsets, resumed = (
        torch.tensor([2, 0]).int(),
        torch.tensor([0, 5, 6]).int(),
        torch.tensor([True, False]),
    )
    layer = (torch.randn(2), torch.randn(32), torch.rand(16))
    constants = (2, None, 1e-5, 0.25)
    pool = (qkv, g, beta, gate, weight, conv, state, slots)
    out = torch.empty(6, 32)
    torch.library.opcheck(paged._prefill.default, (*pool, offsets, resumed, *layer, out, *constants))
    torch.library.opcheck(paged._decode.default, (*pool, *layer, None, None, out, *constants))


@pytest.mark.slow
@pytest.mark.parametrize("rule", [chunk_kda, fused_recurrent_kda])
def test_compiles_as_one_graph(native, rule):
    def loss(q, k, v, g, beta, state, A_log, dt_bias):
        g = kda_gate(g, A_log, dt_bias, -5.0)
        out, final = rule(
            q, k, v, g, beta.sigmoid(), initial_state=state, output_final_state=True, state_v_first=True,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        return out.square().sum() + final.sum()

    inputs = tensors(True)
    inputs[5] = inputs[5][:1].detach().requires_grad_()
    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(torch.autograd.grad(compiled(*inputs), inputs), expected):
        torch.testing.assert_close(actual, wanted)
