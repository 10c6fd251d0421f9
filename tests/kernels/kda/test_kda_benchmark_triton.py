"""What `python -m benchmarks.gpu` compares is one thing: on its inputs fla-core and we give the same."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.gpu import kda
from benchmarks.gpu.measure import check

from kimi_kernels import _triton

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not _triton.interpreting() and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
    ),
]


def test_everybody_agrees(backend, fla_kda):
    backend("triton")
    device = torch.device("cpu" if _triton.interpreting() else "cuda")
    compared, report = check(kda.cases("tiny"), device)
    with_fla = {case: difference for case, who, difference in compared if who == kda.FLA}
    assert set(with_fla) == {f"{c.op} {c.shape}" for c in kda.cases("tiny") if c.op != "KDA decode"}
    assert all(0 < difference < 1e-2 for difference in with_fla.values()), with_fla
    assert any(who == kda.RECURRENCE for _, who, _ in compared)
    assert not any(kda.FLA in who for who in report.absent), report.absent
