"""Finds and loads the native CPU library, and hands out its kernels as ctypes functions.

Nothing is loaded at import. Without the library everything still imports, and the reference backend runs.

Environment: `KIMI_KERNELS_LIBRARY` names the library file; `KIMI_KERNELS_ISA=generic|avx2|avx512|avx512bf16` forces one
instruction set (by default the best that this CPU runs). Both are read when the library is first needed.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # first: its OpenMP runtime must be in the process before the library is

from kimi_kernels.native_files import NativeLibraryError, find_library

ABI_VERSION = 2
FILE_NAME = "libkimi_kernels_cpu.so"
ISAS = ("avx512bf16", "avx512", "avx2", "generic")  # best first
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}

# A parallel region costs a few microseconds, in which one core does about this many fused multiply-adds.
_WORK_WORTH_THREADS = 1 << 16

_C_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


class _Library:
    def __init__(self, path: Path, handle: ctypes.CDLL, isa: str) -> None:
        self.path, self.handle, self.isa = path, handle, isa


_loaded: _Library | None = None
_failure: str | None = None


def _open(path: Path) -> ctypes.CDLL:
    mode = os.RTLD_NOW | os.RTLD_LOCAL
    try:
        return ctypes.CDLL(str(path), mode=mode)
    except OSError as error:
        if "GOMP" not in str(error) and "omp" not in str(error):
            raise NativeLibraryError(f"cannot load {path}: {error}") from error
    # This torch keeps its OpenMP symbols private: bring the system's runtime into the global scope.
    try:
        ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOW | os.RTLD_GLOBAL)
        return ctypes.CDLL(str(path), mode=mode)
    except OSError as error:
        raise NativeLibraryError(
            f"cannot load {path}: {error}; install libgomp (GNU OpenMP runtime)"
        ) from error


def _usable(handle: ctypes.CDLL, isa: str) -> str | None:
    if not handle.kimi_isa_built(isa.encode()):
        return "the library was built without it"
    if not handle.kimi_isa_supported(isa.encode()):
        return "this CPU lacks it"
    return None


def _choose_isa(handle: ctypes.CDLL, forced: str | None) -> str:
    if not forced:
        return next(isa for isa in ISAS if _usable(handle, isa) is None)
    if forced not in ISAS:
        raise NativeLibraryError(f"KIMI_KERNELS_ISA must be one of {', '.join(ISAS)}, got {forced!r}")
    problem = _usable(handle, forced)
    if problem:
        raise NativeLibraryError(f"KIMI_KERNELS_ISA={forced} cannot be used: {problem}")
    return forced


def _load() -> _Library:
    path = find_library("kimi_kernels", FILE_NAME, "KIMI_KERNELS_LIBRARY")
    handle = _open(path)
    for name, restype, argtypes in (
        ("kimi_abi_version", ctypes.c_int, []),
        ("kimi_isa_built", ctypes.c_int, [ctypes.c_char_p]),
        ("kimi_isa_supported", ctypes.c_int, [ctypes.c_char_p]),
        ("kimi_kernel", ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_char_p]),
    ):
        function = getattr(handle, name, None)
        if function is None:
            raise NativeLibraryError(f"{path} lacks {name}: it is not this package's library, rebuild it")
        function.restype, function.argtypes = restype, argtypes
    version = handle.kimi_abi_version()
    if version != ABI_VERSION:
        raise NativeLibraryError(
            f"{path} has ABI version {version}, this package needs {ABI_VERSION}: rebuild it"
        )
    return _Library(path, handle, _choose_isa(handle, os.environ.get("KIMI_KERNELS_ISA")))


def _library() -> _Library:
    global _loaded, _failure
    if _loaded is None:
        if _failure is not None:
            raise NativeLibraryError(_failure)
        try:
            _loaded = _load()
        except NativeLibraryError as error:
            _failure = str(error)
            raise
    return _loaded


def unavailable() -> str | None:
    """Why the native library cannot be used here, or None when it can."""
    if _loaded is not None:
        return None
    try:
        _library()
    except NativeLibraryError as error:
        return str(error)
    return None


def isa() -> str:
    """The instruction set in use, one of ISAS."""
    return _library().isa


def library_path() -> Path:
    """The file that was loaded."""
    return _library().path


def usable_isas() -> list[str]:
    """The instruction sets that are both built in and supported by this CPU, best first."""
    return [name for name in ISAS if _usable(_library().handle, name) is None]


def has_kernel(name: str) -> bool:
    """Whether the loaded library has kernel `name`."""
    library = _library()
    return bool(library.handle.kimi_kernel(name.encode(), library.isa.encode()))


@functools.cache
def kernel(name: str, signature: str) -> Callable[..., None]:
    """The C function `name` of the instruction set in use.

    `signature` has one letter an argument: p pointer (int address or None), i int64, f float.
    """
    library = _library()
    address = library.handle.kimi_kernel(name.encode(), library.isa.encode())
    if not address:
        raise NativeLibraryError(f"{library.path} has no kernel {name} for {library.isa}: rebuild it")
    return ctypes.CFUNCTYPE(None, *(_C_TYPES[letter] for letter in signature))(address)


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Address of a tensor's first element; None stays None (a null pointer)."""
    return None if tensor is None else tensor.data_ptr()


def pointer_array(tensors: list[torch.Tensor]) -> Any:
    """A C array of the tensors' addresses; keep it alive during the call."""
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def threads(work: int) -> int:
    """Threads worth using for `work` elementary operations: torch's number, or 1 for little work."""
    return torch.get_num_threads() if work > _WORK_WORTH_THREADS else 1


def refuses_dtype(*tensors: torch.Tensor | None) -> str | None:
    """A reason when the kernels cannot take these tensors: all must share float32 or all bfloat16."""
    first: torch.dtype | None = None
    for tensor in tensors:
        if tensor is None:
            continue
        dtype = tensor.dtype
        if dtype not in DTYPE_CODES:
            return f"takes float32 or bfloat16, got {dtype}"
        if first is None:
            first = dtype
        elif dtype != first:
            return f"takes one dtype for all tensors, got {first} and {dtype}"
    return None
