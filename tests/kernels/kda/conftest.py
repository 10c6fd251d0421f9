"""The oracle of the KDA tests, and inputs for them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_kernels import _triton, kda_decode, kda_prefill

SLOTS, SPECULATED = 8, 3


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Equation 1 of the paper: S = (I - b k k^T) diag(e^g) S + b k v^T, o = S^T q; tokens first, then heads."""
    outputs = []
    for t in range(len(k)):
        decayed = g[t].exp().unsqueeze(-1) * state
        erased = torch.einsum("...k,...l,...lv->...kv", k[t], k[t], decayed)
        written = torch.einsum("...k,...v->...kv", k[t], v[t])
        state = decayed + beta[t][..., None, None] * (written - erased)
        outputs.append(torch.einsum("...kv,...k->...v", state, scale * q[t]))
    return (torch.stack(outputs) if outputs else v), state


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_kda` by `delta_rule`, head after head, in the dtype of the inputs."""
    batch, length, heads, width = k.shape
    value_heads = v.shape[2]
    if use_gate_in_kernel:
        z = g if dt_bias is None else g + dt_bias.view(value_heads, width)
        rate = 1.0 if A_log is None else A_log.exp()[:, None]
        g = -rate * (z.exp() + 1).log() if lower_bound is None else lower_bound * torch.sigmoid(rate * z)
    if use_qk_l2norm_in_kernel:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid()
    if allow_neg_eigval:
        beta = 2 * beta
    groups = value_heads // heads
    q, k = (x.repeat_interleave(groups, 2) for x in (q, k))
    scale = width**-0.5 if scale is None else scale
    if cu_seqlens is None:
        starts = [(slice(None), 0, length)]
    else:
        starts = [(slice(n, n + 1), a, b) for n, (a, b) in enumerate(pairwise(cu_seqlens.tolist()))]
    outputs, states = [], []
    for sequences, a, b in starts:
        if initial_state is None:
            start = v.new_zeros(batch, value_heads, width, v.shape[3])
        else:
            start = initial_state[sequences].mT if state_v_first else initial_state[sequences]
        parts = (x[:, a:b].transpose(0, 1) for x in (q, k, v, g, beta))
        out, state = delta_rule(*parts, scale, start)
        outputs.append(out.transpose(0, 1))
        states.append(state.mT if state_v_first else state)
    return torch.cat(outputs, 1), torch.cat(states) if output_final_state else None


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The oracle makes many tiny products: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(name="oracle")
def _oracle() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return oracle


@pytest.fixture
def make() -> Callable[..., list[Tensor]]:
    """make(B, T, H, HV, K, V, decay=..., dtype=...): q, k, v, g, beta as the recurrence takes them.

    Keys and queries have norm 1, beta is in (0, 1), log decays are in (-decay, 0) and reach both ends.
    """

    def inputs(
        B: int,
        T: int,
        H: int,
        HV: int,
        K: int,
        V: int,
        decay: float = 5.0,
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:
        q, k = (F.normalize(torch.randn(B, T, H, K), dim=-1) for _ in range(2))
        g = -decay * torch.sigmoid(3 * torch.randn(B, T, HV, K))
        return [x.to(dtype) for x in (q, k, torch.randn(B, T, HV, V), g, torch.rand(B, T, HV))]

    return inputs


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """backend(name): all following calls use this backend."""
    return lambda name: monkeypatch.setenv("KIMI_KERNELS_BACKEND", name)


class Layer:
    """A random layer, its pools, and what its ops should do, in float64."""

    def __init__(self, H=2, HV=2, K=32, V=32, W=4, lower_bound=None, dtype=torch.float32, v_last=False):
        self.H, self.HV, self.K, self.V, self.W = H, HV, K, V, W
        self.channels = 2 * H * K + HV * V
        self.dtype = dtype
        self.conv_weight = torch.randn(self.channels, W).to(dtype)
        self.A_log, self.dt_bias = torch.randn(HV), torch.randn(HV * K)
        self.norm_weight = torch.rand(V)
        self.constants = {"num_heads": H, "head_dim": K, "lower_bound": lower_bound}
        entries = W - 1 + SPECULATED
        conv = torch.randn(SLOTS, self.channels, entries).transpose(1, 2) if v_last else None
        self.conv_state = (torch.randn(SLOTS, entries, self.channels) if conv is None else conv).to(dtype)
        room = torch.randn(SLOTS, 2, HV, V, K)  # slots of a pool shared with other layers: strided
        self.state = room[:, 1]

    def tokens(self, T):
        shapes = ([self.channels], [self.HV, self.K], [self.HV], [self.HV, self.V])
        return [torch.randn(T, *shape).to(self.dtype) for shape in shapes]

    def pools(self):
        return self.conv_state.clone(memory_format=torch.preserve_format), self.state.clone()

    def prefill(self, tokens, pools, slots, offsets, resumed, **more):
        return kda_prefill(
            *tokens, self.conv_weight, *pools, torch.tensor(slots, dtype=torch.int32),
            torch.tensor(offsets, dtype=torch.int32), torch.tensor(resumed), self.A_log, self.dt_bias,
            self.norm_weight, **self.constants, **more,
        )  # fmt: skip

    def decode(self, tokens, pools, slots, **more):
        return kda_decode(
            *tokens, self.conv_weight, *pools, torch.tensor(slots, dtype=torch.int32), self.A_log, self.dt_bias,
            self.norm_weight, **self.constants, **more,
        )  # fmt: skip

    def exact(self, oracle, tokens, history, state):
        """Output, last inputs and state after these tokens of one sequence."""
        x, g, beta, gate = (t.double() for t in tokens)
        inputs = torch.cat([history.double(), x])
        y = F.silu(F.conv1d(inputs.T[None], self.conv_weight.double()[:, None], groups=self.channels))[0].T
        q, k, v = y.split([self.H * self.K] * 2 + [self.HV * self.V], -1)
        out, final = oracle(
            q.view(1, -1, self.H, self.K), k.view(1, -1, self.H, self.K), v.view(1, -1, self.HV, self.V),
            g[None], beta[None], initial_state=state.double()[None], output_final_state=True, state_v_first=True,
            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
            lower_bound=self.constants["lower_bound"], A_log=self.A_log.double(), dt_bias=self.dt_bias.double(),
        )  # fmt: skip
        out = F.rms_norm(out[0], (self.V,), self.norm_weight.double(), 1e-5) * gate.sigmoid()
        return out.flatten(1), inputs[len(x) :], final[0]


@pytest.fixture(name="Layer")
def _layer() -> type[Layer]:
    return Layer


@pytest.fixture
def fla_kda(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """fla-core's KDA. Interpreted, it needs loop indices that are tensors, and no gather bound at import."""
    pytest.importorskip("fla")
    functions = importlib.import_module("fla.ops.kda")
    if _triton.interpreting():
        import numpy as np
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        def indices(*bounds):
            for i in range(*map(int, bounds)):
                yield tl.core.tensor(TensorHandle(np.array([i], np.int32), tl.int32), tl.int32)

        monkeypatch.setattr(sys.modules["fla.ops.common.chunk_delta_h"], "range", indices, raising=False)
        for name, module in list(sys.modules.items()):
            if name.startswith("fla") and getattr(module, "IS_GATHER_SUPPORTED", False):
                monkeypatch.setattr(module, "IS_GATHER_SUPPORTED", False)
    return functions
