"""Which backend runs, what is said about it, and what happens without the native library."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest
import torch

from kimi_kernels import (
    BackendError,
    NativeLibraryError,
    _native,
    attn_res,
    backend_report,
    causal_conv1d,
    dispatch,
    rmsnorm_gated,
)


def norm(dtype=torch.float32):
    x = torch.ones(2, 8, dtype=dtype)
    return rmsnorm_gated(x, x, torch.ones(8, dtype=dtype))


def run_python(code: str, **environment: str) -> dict:
    """Run code in a new interpreter; it prints one JSON object as its last line."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    caplog.set_level(logging.INFO, "kimi_kernels")
    return lambda: [record.getMessage() for record in caplog.records]


def test_the_choice_is_logged_once_with_its_reason(native, log):
    norm()
    norm()
    norm(torch.float64)
    assert log() == [
        "rmsnorm_gated runs on backend cpu: preferred on cpu",
        "rmsnorm_gated runs on backend reference: cpu: takes no float64 weight",
    ]


def test_forced_reference(native, log, monkeypatch):
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "reference")
    norm()
    assert log() == ["rmsnorm_gated runs on backend reference: forced by KIMI_KERNELS_BACKEND"]


def test_forced_backend_that_cannot_run_raises(native, monkeypatch):
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "cpu")
    with pytest.raises(
        BackendError, match="KIMI_KERNELS_BACKEND=cpu, but it cannot run rmsnorm_gated: takes no"
    ):
        norm(torch.float64)
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "triton")
    monkeypatch.delitem(dispatch._registry["rmsnorm_gated"], "triton")
    with pytest.raises(BackendError, match="no triton implementation of rmsnorm_gated"):
        norm()
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "cuda")
    with pytest.raises(BackendError, match="must be one of cpu, triton, reference, got 'cuda'"):
        norm()


def test_a_compiled_graph_holds_the_op_and_not_the_choice(native, log, monkeypatch):
    compiled = torch.compile(lambda x: rmsnorm_gated(x, x, x[0]), fullgraph=True, backend="aot_eager")
    compiled(torch.ones(2, 8))
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "reference")
    compiled(torch.ones(2, 8))
    assert [line.split(":")[0] for line in log()] == [
        "rmsnorm_gated runs on backend cpu",
        "rmsnorm_gated runs on backend reference",
    ]


def test_an_implementation_can_be_added_without_touching_callers(monkeypatch):
    implementations = dict(dispatch._registry["rmsnorm_gated"])
    monkeypatch.setitem(dispatch._registry, "rmsnorm_gated", implementations)
    refuses = lambda x, *_: None if x.dtype == torch.float32 else f"takes float32, got {x.dtype}"
    dispatch.register("rmsnorm_gated", "triton", refuses, native=False)(lambda x, *_: torch.full_like(x, 7))
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "triton")
    assert torch.equal(norm(), torch.full((2, 8), 7.0))
    with pytest.raises(BackendError, match=r"takes float32, got torch.float64"):
        norm(torch.float64)
    with pytest.raises(ValueError, match="backend must be one of cpu, triton, reference, got 'hip'"):
        dispatch.register("rmsnorm_gated", "hip")


def test_report_covers_every_op(native):
    rows = {row.op: row for row in backend_report() if row.device == "cpu"}
    assert {"attn_res", "causal_conv1d", "mla_paged_attention", "moe_experts", "rmsnorm_gated"} <= set(rows)
    assert rows["rmsnorm_gated"].backend == "cpu"
    assert _native.isa() in rows["rmsnorm_gated"].reason


def test_import_is_light():
    seen = run_python(
        "import json, sys, kimi_kernels\n"
        "from kimi_kernels import _native, rmsnorm_gated, attn_res, moe_experts\n"
        "print(json.dumps({'triton': 'triton' in sys.modules, 'vllm': 'vllm' in sys.modules,"
        " 'library': _native._loaded is not None}))"
    )
    assert seen == {"triton": False, "vllm": False, "library": False}


def test_without_the_library_the_reference_runs_and_says_why(tmp_path):
    missing = str(tmp_path / "absent.so")
    seen = run_python(
        "import json, os, torch, kimi_kernels\n"
        "x = torch.ones(2, 8)\n"
        "y = kimi_kernels.rmsnorm_gated(x, x, x[0])\n"
        "row = next(r for r in kimi_kernels.backend_report() if r.op == 'rmsnorm_gated')\n"
        "os.environ['KIMI_KERNELS_BACKEND'] = 'cpu'\n"
        "try: kimi_kernels.rmsnorm_gated(x, x, x[0])\n"
        "except kimi_kernels.BackendError as error: refused = str(error)\n"
        "print(json.dumps({'y': y[0, 0].item(), 'row': row, 'refused': refused}))",
        KIMI_KERNELS_LIBRARY=missing,
    )
    reason = f"KIMI_KERNELS_LIBRARY={missing} is not a file: build it, or unset the variable"
    assert seen["y"] == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=1e-5)
    assert seen["row"] == ["rmsnorm_gated", "cpu", "reference", f"cpu: {reason}"]
    assert reason in seen["refused"]


def test_ops_on_torch_products_need_no_library(tmp_path):
    seen = run_python(
        "import json, os, torch, kimi_kernels\n"
        "os.environ['KIMI_KERNELS_BACKEND'] = 'cpu'\n"
        "y = kimi_kernels.newton_schulz(torch.eye(3), 1, [(2.0, 0.0, 0.0)])\n"
        "row = next(r for r in kimi_kernels.backend_report() if r.op == 'newton_schulz')\n"
        "print(json.dumps({'y': y[0, 0].item(), 'row': row}))",
        KIMI_KERNELS_LIBRARY=str(tmp_path / "absent.so"),
    )
    assert seen["y"] == pytest.approx(2 / 3**0.5)
    assert seen["row"] == ["newton_schulz", "cpu", "cpu", "forced by KIMI_KERNELS_BACKEND, torch"]


@pytest.mark.parametrize("name", ["generic", "sse9"])
def test_instruction_set_by_environment(native, name):
    seen = run_python(
        "import json\n"
        "from kimi_kernels import _native\n"
        "reason = _native.unavailable()\n"
        "print(json.dumps({'reason': reason, 'isa': None if reason else _native.isa()}))",
        KIMI_KERNELS_ISA=name,
    )
    if name == "generic":
        assert seen == {"reason": None, "isa": "generic"}
    else:
        assert (
            seen["reason"] == "KIMI_KERNELS_ISA must be one of avx512bf16, avx512, avx2, generic, got 'sse9'"
        )


def test_instruction_set_that_cannot_be_used_is_refused():
    class Handle:
        kimi_isa_built = staticmethod(lambda isa: isa != b"avx2")
        kimi_isa_supported = staticmethod(lambda isa: not isa.startswith(b"avx512"))

    with pytest.raises(NativeLibraryError, match="KIMI_KERNELS_ISA=avx512 cannot be used: this CPU lacks it"):
        _native._choose_isa(Handle, "avx512")
    with pytest.raises(
        NativeLibraryError, match=r"KIMI_KERNELS_ISA=avx2 cannot be used: .* built without it"
    ):
        _native._choose_isa(Handle, "avx2")
    assert _native._choose_isa(Handle, None) == "generic"


def test_library_of_another_version_is_refused(native, monkeypatch):
    monkeypatch.setattr(_native, "ABI_VERSION", -1)
    with pytest.raises(NativeLibraryError, match=r"has ABI version \d+, this package needs -1: rebuild it"):
        _native._load()


def test_another_shared_library_is_refused(monkeypatch, native):
    import _ctypes

    monkeypatch.setenv("KIMI_KERNELS_LIBRARY", _ctypes.__file__)
    with pytest.raises(NativeLibraryError, match="lacks kimi_abi_version: it is not this package's library"):
        _native._load()


@pytest.mark.slow
def test_inductor_compiles_a_layer_of_ops_forward_and_backward(native):
    weight, gain = torch.randn(16, 4), torch.rand(16)

    def layer(x):
        y, _ = causal_conv1d(x, weight, activation="silu")
        return attn_res(gain, [x, rmsnorm_gated(y, x.sin(), gain)], gain).cos()

    x = torch.randn(2, 7, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(torch.compile(layer, fullgraph=True)(x).sum(), x)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(grad, expected)
