"""KDA against code that nobody here wrote: transformers' and fla-core's torch functions."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kimi_kernels import chunk_kda, fused_recurrent_kda, kda_gate

# Both peers compute in float32; two float32 evaluations of a 200-token recurrence agree to a few 1e-6 in the norm.
PEER_ERROR = 1e-5


def assert_near(actual, peer):
    assert (actual - peer).norm() <= PEER_ERROR * peer.norm()


@pytest.mark.parametrize("rule", [chunk_kda, fused_recurrent_kda])
@pytest.mark.parametrize("peer", ["chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"])
def test_transformers(isa, backend, make, rule, peer):
    backend("cpu")
    modeling = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    function = getattr(modeling, peer)
    # The decorator that may fetch a kernel from the hub keeps the torch function below it.
    function = getattr(function, "__wrapped__", function)
    q, k, v, g, beta = make(2, 150, 2, 2, 64, 64)
    q, k = 3 * q, 5 * k
    state = torch.randn(2, 2, 64, 64)
    theirs = function(
        q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    ours = rule(q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
    for a, b in zip(ours, theirs):
        assert_near(a, b)


def fla_naive() -> ModuleType:
    """fla-core's torch functions, without importing the package: that needs a GPU driver."""
    spec = importlib.util.find_spec("fla")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("fla-core is not installed")
    pytest.importorskip("einops")
    path = Path(next(iter(spec.submodule_search_locations))) / "ops" / "kda" / "naive.py"
    loaded = importlib.util.spec_from_file_location("fla_kda_naive", path)
    assert loaded is not None and loaded.loader is not None
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    return module


@pytest.mark.parametrize("peer", ["naive_recurrent_kda", "naive_chunk_kda"])
def test_fla(isa, backend, make, peer):
    backend("cpu")
    function = getattr(fla_naive(), peer)
    inputs = make(1, 128, 2, 4, 64, 32, decay=1.0)  # their chunk form overflows at stronger decays
    state = torch.randn(1, 4, 64, 32)
    theirs = function(*inputs, initial_state=state, output_final_state=True)
    for rule in (chunk_kda, fused_recurrent_kda):
        for a, b in zip(rule(*inputs, initial_state=state, output_final_state=True), theirs):
            assert_near(a, b)


def test_gate_of_transformers(isa):
    modeling = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    from transformers import KimiLinearConfig

    config = KimiLinearConfig(hidden_size=32)
    layer = modeling.KimiLinearForgetGate(config)
    heads, width = config.linear_num_heads, config.linear_head_dim
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, 7, 32)
    with torch.no_grad():
        raw = layer.f_b_proj(layer.f_a_proj(x)).view(1, 7, heads, width)
        assert_near(kda_gate(raw, layer.A_log.view(-1), layer.dt_bias), layer(x))
