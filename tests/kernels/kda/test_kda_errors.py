"""Bad input: the message names the argument, the value and the fix."""

from __future__ import annotations

import pytest
import torch

from kimi_kernels import BackendError, chunk_kda, fused_recurrent_kda, kda_decode, kda_gate, kda_prefill
from kimi_kernels.kda.validation import check_kda


@pytest.mark.parametrize("rule", [chunk_kda, fused_recurrent_kda])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(10, 2, 8)}, r"q must have shape \[B, T, H, K\], got \(10, 2, 8\)"),
        ({"q": torch.zeros(1, 10, 2, 9)}, r"q must have shape \(1, 10, 2, 8\)"),
        ({"k": torch.zeros(1, 10, 2, 8, dtype=torch.bfloat16)}, "q, k and v must share a dtype"),
        ({"v": torch.zeros(1, 9, 4, 6)}, "v must have batch and length"),
        ({"v": torch.zeros(1, 10, 3, 6)}, "multiple of k's heads, got HV=3, H=2"),
        ({"g": torch.zeros(1, 10, 2, 8)}, r"g must have shape \(1, 10, 4, 8\) = \[B, T, HV, K\]"),
        ({"beta": torch.zeros(1, 10, 4, 1)}, r"beta must have shape \(1, 10, 4\)"),
        ({"initial_state": torch.zeros(1, 4, 6, 8)}, r"initial_state must have shape \(1, 4, 8, 6\)"),
        (
            {"initial_state": torch.zeros(1, 4, 8, 6), "state_v_first": True},
            r"initial_state .* \(1, 4, 6, 8\)",
        ),
        (
            {"initial_state": torch.zeros(1, 4, 8, 6).bfloat16()},
            "initial_state must be float32, got torch.bfloat16",
        ),
        ({"cu_seqlens": torch.tensor([3, 10])}, "cu_seqlens must start at 0, got 3"),
        (
            {"cu_seqlens": torch.tensor([0, 6, 4, 10])},
            "cu_seqlens must not decrease, got 6 then 4 at sequence 1",
        ),
        ({"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens must end at T=10, got 9"),
        ({"cu_seqlens": torch.tensor([0.0, 10.0])}, "cu_seqlens must be int32 or int64, got torch.float32"),
        ({"cu_seqlens": torch.tensor([[0, 10]])}, r"cu_seqlens must have shape \[N\+1\]"),
        ({"use_gate_in_kernel": True}, "A_log is missing"),
        ({"use_gate_in_kernel": True, "A_log": torch.zeros(2)}, "A_log must have 4 elements"),
        (
            {"use_gate_in_kernel": True, "A_log": torch.zeros(4), "dt_bias": torch.zeros(4)},
            "dt_bias must have 32 elements",
        ),
        ({"use_gate_in_kernel": True, "lower_bound": -6.0}, r"lower_bound must be in \[-5, 0\), got -6.0"),
        ({"use_gate_in_kernel": True, "lower_bound": 0.0}, r"lower_bound must be in \[-5, 0\), got 0.0"),
        ({"g": torch.full((1, 10, 4, 8), 0.25)}, "g must be <= 0, got 0.25: pass natural-log decays"),
        ({"g": torch.zeros(1, 10, 4, 8, dtype=torch.int64)}, "g must have a floating-point dtype, got torch.int64"),
        ({"beta": torch.zeros(1, 10, 4, dtype=torch.int32)}, "beta must have a floating-point dtype"),
        ({"k": torch.zeros(1, 10, 2, 8, device="meta")}, "k must be on cpu as the other inputs are, got meta"),
        ({"initial_state": torch.zeros(1, 4, 8, 6, device="meta")}, "initial_state must be on cpu .* got meta"),
        ({"cu_seqlens": torch.zeros(2, dtype=torch.int64, device="meta")}, "cu_seqlens must be on cpu .* got meta"),
        ({"use_gate_in_kernel": True, "A_log": torch.zeros(4, device="meta")}, "A_log must be on cpu .* got meta"),
        ({"A_log": torch.zeros(4)}, "pass use_gate_in_kernel=True"),
    ],
)
def test_rules(rule, change, message):
    arguments = {
        "q": torch.zeros(1, 10, 2, 8),
        "k": torch.zeros(1, 10, 2, 8),
        "v": torch.zeros(1, 10, 4, 6),
        "g": torch.zeros(1, 10, 4, 8),
        "beta": torch.zeros(1, 10, 4),
    }
    with pytest.raises(ValueError, match=message):
        rule(**{**arguments, **change})


def test_packed_batch_must_be_one_row():
    x = torch.zeros(2, 10, 1, 8)
    with pytest.raises(ValueError, match="packed into one row, got B=2"):
        chunk_kda(x, x, x, x, x[..., 0], cu_seqlens=torch.tensor([0, 10]))


def test_gate_bound():
    with pytest.raises(ValueError, match="lower_bound must be in"):
        kda_gate(torch.zeros(3, 2, 8), torch.zeros(2), lower_bound=1.0)


@pytest.mark.parametrize(
    "width, dtype, message",
    [(264, torch.float32, "head sizes up to 256"), (8, torch.float64, "got torch.float64 for q")],
)
def test_what_the_native_kernels_do_not_take(native, backend, width, dtype, message):
    x = torch.zeros(1, 3, 1, width, dtype=dtype)
    backend("cpu")
    with pytest.raises(BackendError, match=message):
        chunk_kda(x, x, x, x, x[..., 0])
    backend("")
    assert chunk_kda(x, x, x, x, x[..., 0])[0].shape == x.shape  # the reference does


def layer(**change):
    arguments = {
        "qkv": torch.zeros(6, 96),
        "g": torch.zeros(6, 2, 16),
        "beta": torch.zeros(6, 2),
        "gate": torch.zeros(6, 2, 16),
        "conv_weight": torch.zeros(96, 4),
        "conv_state": torch.zeros(3, 3, 96),
        "state": torch.zeros(3, 2, 16, 16),
        "state_indices": torch.tensor([2, 0], dtype=torch.int32),
        "A_log": torch.zeros(2),
        "dt_bias": torch.zeros(32),
        "norm_weight": torch.ones(16),
        "num_heads": 2,
        "head_dim": 16,
    }
    return {**arguments, **change}


PACKED = {"cu_seqlens": torch.tensor([0, 5, 6]), "has_initial_state": torch.tensor([True, True])}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"state": torch.zeros(3, 2, 16, 16).bfloat16()}, r"state must be float32 \[slots, HV, V, K\]"),
        ({"head_dim": 8}, "state must have K = head_dim = 8 last"),
        ({"num_heads": 3}, "multiple of num_heads=3 heads, got HV=2"),
        ({"qkv": torch.zeros(6, 95)}, r"qkv must have 2\*H\*K \+ HV\*V = 96 channels, got 95"),
        ({"g": torch.zeros(6, 2, 8)}, r"g must have shape \(6, 2, 16\)"),
        ({"beta": torch.zeros(5, 2)}, "beta must have shape"),
        ({"gate": torch.zeros(6, 32)}, "gate must have shape"),
        ({"conv_weight": torch.zeros(95, 4)}, r"conv_weight must have shape \[96, W\]"),
        ({"conv_state": torch.zeros(3, 2, 96)}, r"conv_state must have shape \[slots, >= 3, 96\]"),
        ({"conv_state": torch.zeros(2, 3, 96)}, "conv_state has 2 slots, state has 3"),
        ({"A_log": torch.zeros(3)}, "A_log must have 2 elements"),
        ({"norm_weight": torch.zeros(8)}, r"norm_weight must have shape \(16,\)"),
        ({"lower_bound": -7.0}, "lower_bound must be in"),
        ({"out": torch.zeros(6, 31)}, "out must be torch.float32"),
        ({"out": torch.zeros(1, 32).expand(6, 32)}, "out must be .* with contiguous rows of their own"),
        ({"out": torch.zeros(6, 64)[:, ::2]}, "out must be .* with contiguous rows of their own"),
        ({"state": torch.zeros(1, 2, 16, 16).expand(3, 2, 16, 16)}, "state must have memory for every element"),
        ({"conv_state": torch.zeros(3, 1, 96).expand(3, 3, 96)}, "conv_state must have memory for every element"),
        ({"state_indices": torch.tensor([2.0, 0.0])}, "state_indices must be int32 or int64, got torch.float32"),
        *[
            ({name: torch.zeros(3, 2, 16, 16, device="meta")}, f"{name} must be on cpu .* got meta: move it there")
            for name in ("g", "gate", "state", "state_indices", "A_log", "norm_weight")
        ],
        ({"state_indices": torch.tensor([2, 3])}, r"index outside \[-1, 3\) for sequence 1"),
        ({"state_indices": torch.tensor([-2, 0])}, r"index outside \[-1, 3\) for sequence 0"),
    ],
)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_layers(native, backend, change, message, name):
    backend(name)
    with pytest.raises(ValueError, match=message):
        kda_decode(**layer(**change))
    with pytest.raises(ValueError, match=message):
        kda_prefill(**layer(**{**PACKED, **change}))


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_prefill_offsets(native, backend, name):
    backend(name)
    for offsets in ([1, 5, 6], [0, 5, 4], [0, 5, 7]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            kda_prefill(**layer(**{**PACKED, "cu_seqlens": torch.tensor(offsets)}))
    with pytest.raises(ValueError, match=r"cu_seqlens must have shape \(3,\)"):
        kda_prefill(**layer(**{**PACKED, "cu_seqlens": torch.tensor([0, 6])}))


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_speculation(native, backend, name):
    backend(name)
    good = {
        "cu_seqlens": torch.tensor([0, 2, 4]),
        "num_accepted_tokens": torch.tensor([1, 2]),
        "state_indices": torch.tensor([[0, 1], [2, 0]]),
        "conv_state": torch.zeros(3, 4, 96),
    }
    kda_decode(**layer(**good))
    for change, message in [
        ({"cu_seqlens": None}, "num_accepted_tokens needs cu_seqlens"),
        ({"conv_state": torch.zeros(3, 3, 96)}, r"conv_state must have shape \[slots, >= 4, 96\]"),
        ({"num_accepted_tokens": torch.tensor([0, 1])}, r"num_accepted_tokens\[0\] names no slot"),
        ({"num_accepted_tokens": torch.tensor([1, 3])}, r"num_accepted_tokens\[1\] names no slot"),
        (
            {"cu_seqlens": torch.tensor([0, 1, 4])},
            "gives sequence 1 more tokens than state_indices has columns",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            kda_decode(**layer(**{**good, **change}))


@pytest.mark.parametrize("rule", [chunk_kda, fused_recurrent_kda])
def test_positive_gates_are_inputs_of_the_gate(rule):
    """What is no log decay may have any sign; NaN and values on other devices are not looked for."""
    x = torch.ones(1, 3, 1, 8)
    rule(x, x, x, x, x[..., 0], use_gate_in_kernel=True, lower_bound=-1.0)
    meta = torch.ones(1, 3, 1, 8, device="meta")
    offsets = torch.ones(2, device="meta").int()
    check_kda(meta, meta, meta, meta, meta[..., 0], None, offsets, False, None, None, None, False)
