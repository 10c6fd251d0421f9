"""Every registered Triton kernel compiles for a GPU that is not here, within its budget."""

from __future__ import annotations

import importlib

import pytest

pytest.importorskip("triton")
from benchmarks import aot

from kimi_kernels import _triton

pytestmark = pytest.mark.skipif(_triton.interpreting(), reason="what is interpreted cannot be compiled")


@pytest.mark.parametrize("variant", list(aot.variants()), ids=lambda v: f"{v.name}-{v.config.constants}")
def test_within_budget_on_sm_90(variant):
    usage = aot.compile_for(variant, "sm_90")
    assert aot.over_budget(usage) is None
    assert usage.registers <= 255 and "tcgen05" not in usage.matrix


@pytest.mark.parametrize("name", aot.MAY_SPILL)
def test_who_may_spill_says_why(name):
    module, config = aot.MAY_SPILL[name].rsplit(".", 1)
    docstring = getattr(importlib.import_module(f"kimi_kernels.{module}"), config).__doc__
    assert "spill" in docstring
    assert any(variant.name == name and variant.backward for variant in aot.variants()), "no forward kernel may"


def test_budget():
    usage = aot.Usage("k", "sm_90", "", False, 255, 8, 1 << 10, "-")
    assert aot.over_budget(usage) == "spills 8 bytes on sm_90"
    assert "bytes of shared memory" in str(
        aot.over_budget(aot.Usage("k", "gfx942", "", True, 9, 0, 1 << 17, "-"))
    )
