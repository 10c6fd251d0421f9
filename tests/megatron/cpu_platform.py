"""Lets megatron-core train on a CPU over gloo: what it asks of `torch.cuda` is answered by the CPU. Tests only.

`install()` must run before the first import of megatron.core. Only Megatron's questions are answered: code outside
of it still sees `torch.cuda.is_available() == False`. Every replacement stands for a call that megatron-core 0.16.1
or 0.19.2 makes on the way of a training step; a name that is not here was not needed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from typing import Any

import torch
import torch.cuda.random

CPU = torch.device("cpu")
_FACTORIES = (
    "tensor",
    "zeros",
    "empty",
    "ones",
    "full",
    "arange",
    "rand",
    "randn",
    "zeros_like",
    "empty_like",
)


class _Stream:
    """Work on a CPU is done when the call returns: every stream is empty."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _: Any) -> float:
        return 0.0


class _Generators:
    """`torch.cuda.default_generators`, which Megatron indexes by device."""

    def __getitem__(self, _: Any) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _seed(value: Any) -> None:
    # not torch.manual_seed: that one calls torch.cuda.manual_seed_all
    torch.default_generator.manual_seed(int(value))


def _asked_by_megatron() -> bool:
    frame = sys._getframe(2)
    return f"{os.sep}megatron{os.sep}" in frame.f_code.co_filename


def _on_cpu(factory: Any) -> Any:
    """`factory` with ``device="cuda"`` read as the CPU."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return make


def install() -> None:
    """Patch this process. Calling it again does nothing."""
    if getattr(torch.cuda, "_kimi_cpu_platform", False):
        return
    cuda: Any = torch.cuda
    cuda._kimi_cpu_platform = True
    replacements: dict[str, Any] = {
        "is_available": _asked_by_megatron,
        "current_device": lambda: CPU,
        "device_count": lambda: 1,
        "set_device": lambda *_: None,
        "synchronize": lambda *_, **__: None,
        "empty_cache": lambda: None,
        "manual_seed": _seed,
        "manual_seed_all": _seed,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "stream": lambda *_: contextlib.nullcontext(),
        "device": lambda *_: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda *_: (8, 0),
        "get_device_name": lambda *_: "cpu",
        "get_device_properties": lambda *_: type(
            "Properties", (), {"total_memory": 1 << 34, "major": 8, "minor": 0}
        )(),
        "mem_get_info": lambda *_: (1 << 34, 1 << 34),
        "memory_stats": lambda *_, **__: {},
        "reset_peak_memory_stats": lambda *_, **__: None,
        "_lazy_call": lambda callback, **__: callback(),
        "_lazy_init": lambda: None,
        "Stream": _Stream,
        "Event": _Event,
        "default_generators": _Generators(),
    }
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        replacements[name] = lambda *_, **__: 0
    for name, value in replacements.items():
        setattr(cuda, name, value)
    for name in ("get_rng_state", "set_rng_state", "_lazy_init"):
        setattr(torch.cuda.random, name, replacements[name])
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None

    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_: self  # type: ignore[assignment,method-assign]
    move, kind = tensor.to, tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        places = [CPU if isinstance(a, str | torch.device) and "cuda" in str(a) else a for a in args]
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = CPU
        return move(self, *places, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Megatron sorts its parameters by names such as "torch.cuda.BFloat16Tensor"
        name = kind(self, *args, **kwargs)
        if isinstance(name, str) and ".cuda." not in name:
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    tensor.to, tensor.type = to, type_
