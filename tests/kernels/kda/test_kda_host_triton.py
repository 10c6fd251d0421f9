"""The host side of the Triton paths asks a device nothing, so that a CUDA graph may capture it.

Here with tensors on torch's "meta" device, which have no values: `.item()`, `.tolist()`, `.cpu()` and the like raise on
them, as they would wait for a GPU, and a tensor that was made on the host is seen among a launch's arguments. With a
GPU the calls are captured and replayed.
"""

from __future__ import annotations

import pytest
import torch

from kimi_kernels import (
    _triton,
    chunk_kda,
    chunk_kda_states,
    dispatch,
    fused_recurrent_kda,
    kda_decode,
    kda_prefill,
)
from kimi_kernels.kda import triton as backend_triton
from kimi_kernels.kda.paged_reference import LayerOptions
from kimi_kernels.kda.reference import Options
from kimi_kernels.kda.validation import check_kda, check_layer

pytest.importorskip("triton")
needs_gpu = pytest.mark.skipif(
    _triton.interpreting() or not torch.cuda.is_available(), reason="needs a GPU and compiled kernels"
)

META = torch.device("meta")
OPTIONS = Options(0.1, True, True, True, False, None, True)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched with no tensor but those of the device."""
    names = []

    def launch(kernel, grid, like, *args, config):
        tensors = [x for x in (like, *args) if isinstance(x, torch.Tensor)]
        assert all(x.device == META for x in tensors), "a kernel got a tensor of the host"
        if 0 not in grid:
            names.append(kernel.fn.__name__)

    monkeypatch.setattr(_triton, "launch", launch)
    return names


def backend(op):
    return dispatch._registry[op]["triton"].function


def sequences(packed, requires_grad=False):
    """q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens of two sequences or of two rows."""
    B, T = (1, 300) if packed else (2, 150)
    shapes = [(B, T, 1, 64), (B, T, 1, 64), (B, T, 2, 32), (B, T, 2, 64), (B, T, 2), (2, 2, 32, 64), (2,), (128,)]
    found = [torch.empty(s, device=META, dtype=torch.bfloat16 if n < 5 else None) for n, s in enumerate(shapes)]
    return [*found, torch.empty(3, dtype=torch.int32, device=META) if packed else None]


def layer(speculative=False):
    """Arguments of kda_prefill, which are those of kda_decode but for two, by name."""
    make = lambda *shape: torch.empty(shape, device=META)
    integers = lambda *shape: torch.empty(shape, dtype=torch.int32, device=META)
    return {
        "qkv": make(6, 96), "g": make(6, 2, 16), "beta": make(6, 2), "gate": make(6, 2, 16),
        "conv_weight": make(96, 4), "conv_state": make(3, 5, 96), "state": make(3, 2, 16, 16),
        "state_indices": integers(2, 3) if speculative else integers(2),
        "cu_seqlens": integers(3), "has_initial_state": integers(2) > 0,
        "A_log": make(2), "dt_bias": make(32), "norm_weight": make(16), "num_accepted_tokens": integers(2),
        "out": make(6, 32),
    }  # fmt: skip


POOL = ("qkv", "g", "beta", "gate", "conv_weight", "conv_state", "state", "state_indices")
PARAMETERS = ("A_log", "dt_bias", "norm_weight")


def test_the_device_without_values_is_noticed():
    """These tests can fail: what they look for raises."""
    x = torch.ones(2, device=META)
    for read in (x.tolist, x[0].item, x.cpu, lambda: bool(x[0]), lambda: x.to("cpu")):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("segments", [1, 3])
def test_chunk(monkeypatch, launched, packed, segments):
    monkeypatch.setattr(backend_triton, "LEAST_CHUNKS", 1)
    monkeypatch.setattr(backend_triton, "SEGMENTS", 2)
    monkeypatch.setattr(backend_triton, "processors", lambda device: 4 * segments)  # as of 4 programs
    tensors = sequences(packed)
    check_kda(*tensors[:6], tensors[8], True, *tensors[6:8], None, True)
    out, final = backend("chunk_kda")(*tensors, OPTIONS)
    more = {1: [], 2: ["segment_kernel"]}[min(segments, 2)]
    assert launched == ["prepare_kernel", *more, "scan_kernel"]
    assert out.device == final.device == META
    launched.clear()
    backend("chunk_kda_states")(*tensors[:9], 64, OPTIONS)
    assert launched == ["prepare_kernel", *more, "scan_kernel"]


@pytest.mark.parametrize("packed", [True, False])
def test_backward_and_recurrence(launched, packed):
    tensors = sequences(packed)
    d_out, d_final = torch.empty_like(tensors[2]), torch.empty(2, 2, 32, 64, device=META)
    grads = backend("chunk_kda_backward")(d_out, d_final, *tensors, OPTIONS)
    assert launched == ["prepare_kernel", "scan_kernel", "scan_back_kernel", "gradient_kernel"]
    assert [x.shape for x in grads] == [x.shape for x in tensors[:8]]
    launched.clear()
    backend("fused_recurrent_kda")(*tensors, OPTIONS)
    assert launched == ["recurrent_kernel"]


def test_prefill(launched):
    x = layer()
    call = [x[name] for name in (*POOL, "cu_seqlens", "has_initial_state", *PARAMETERS, "out")]
    check_layer(*call[:8], *call[10:13], *call[8:10], None, 2, 16, None, x["out"])
    backend("kda_prefill")(*call, LayerOptions(2, None, 1e-5, 0.25))
    assert launched == ["convolve_kernel", "prepare_kernel", "scan_kernel", "finish_kernel"]


@pytest.mark.parametrize("speculative", [True, False])
def test_decode(launched, speculative):
    x = layer(speculative)
    offsets = [x["cu_seqlens"], x["num_accepted_tokens"]] if speculative else [None, None]
    call = [x[name] for name in (*POOL, *PARAMETERS)]
    check_layer(*call, offsets[0], None, offsets[1], 2, 16, None, x["out"])
    backend("kda_decode")(*call, *offsets, x["out"], LayerOptions(2, None, 1e-5, 0.25))
    assert launched == ["decode_kernel"]


@needs_gpu
@pytest.mark.parametrize("rule", [chunk_kda, chunk_kda_states, fused_recurrent_kda])
def test_graph_of_whole_sequences(make, rule):
    """Replayed on other values and other offsets of the same batch, to the bit what a call gives."""
    inputs = [x.cuda() for x in make(1, 300, 2, 2, 64, 64, dtype=torch.bfloat16)]
    offsets = torch.tensor([0, 70, 300], device="cuda")
    rule(*inputs, cu_seqlens=offsets)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rule(*inputs, cu_seqlens=offsets)
    for x, new in zip(inputs, make(1, 300, 2, 2, 64, 64, dtype=torch.bfloat16)):
        x.copy_(new)
    offsets.copy_(torch.tensor([0, 190, 300]))
    graph.replay()
    for x, wanted in zip(captured, rule(*inputs, cu_seqlens=offsets)):
        assert x is wanted is None or torch.equal(x, wanted)


@needs_gpu
@pytest.mark.parametrize("rule", [kda_prefill, kda_decode])
def test_graph_of_a_layer(Layer, rule):
    layer = Layer(H=1, HV=2, K=64, V=64, dtype=torch.bfloat16)
    tokens = [x.cuda() for x in layer.tokens(200)]
    slots = torch.tensor([3, 0], dtype=torch.int32, device="cuda")
    more = {}
    if rule is kda_prefill:
        more = {"cu_seqlens": torch.tensor([0, 80, 200], dtype=torch.int32, device="cuda"),
                "has_initial_state": torch.tensor([True, False], device="cuda")}  # fmt: skip
    more |= {name: getattr(layer, name).cuda() for name in ("conv_weight", "A_log", "dt_bias", "norm_weight")}

    def call(pools):
        names = ("qkv", "g", "beta", "gate", "conv_state", "state")
        return rule(**dict(zip(names, (*tokens, *pools))), state_indices=slots, **more, **layer.constants)

    pools = [x.cuda() for x in layer.pools()]
    call([x.clone() for x in pools])  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(pools)
    for x, fresh in zip(pools, layer.pools()):
        x.copy_(fresh)
    graph.replay()
    others = [x.cuda() for x in layer.pools()]
    assert torch.equal(captured, call(others))
    assert all(torch.equal(x, y) for x, y in zip(pools, others))
