"""Triton's interpreter, made right for bfloat16.

`TRITON_INTERPRET=1` runs Triton kernels on the CPU with numpy, which has no bfloat16: the interpreter keeps such
values as 16-bit integers and computes on those, so that sums and products are garbage, and it truncates on the way
from float32. `install` puts that right for the process: operands are widened to float32, results are rounded to
nearest even. It also picks an autotuned kernel's first configuration (timing needs a GPU), takes the split
precisions of `tl.dot`, and leaves CPU storage in place instead of copying it onto itself after every launch.

Tested with Triton 3.6.0 and 3.9.0. Import triton, or anything that does, only after TRITON_INTERPRET is set.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

# Builder methods whose bfloat16 operands are computed in float32, the result rounded back.
_ROUNDED = ("binary_op", "unary_op", "create_fma", "create_clampf", "create_rsqrt", "create_erf")
_CASTS = (
    "create_si_to_fp", "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui", "create_fp_ext", "create_fp_trunc",
    "create_int_cast",
)  # fmt: skip
_installed = False


def widen(bits: np.ndarray) -> np.ndarray:
    """float32 of the bfloat16 values whose bit patterns are given as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Bit patterns, uint16, of float32 values rounded to bfloat16: to nearest, ties to even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    odd = (bits >> 16) & 1
    rounded = ((bits.astype(np.uint64) + 0x7FFF + odd) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def install() -> None:
    """Correct the interpreter of this process; once is enough.

    Raises RuntimeError unless TRITON_INTERPRET=1: kernels defined without it would not be interpreted.
    """
    global _installed
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET must be 1 before triton is imported, to interpret its kernels")
    if _installed:
        return
    import triton.language as tl
    from triton.runtime import autotuner
    from triton.runtime import interpreter as upstream

    builder, handle, bf16 = upstream.InterpreterBuilder, upstream.TensorHandle, tl.bfloat16

    def is_bf16(x: Any) -> bool:
        return isinstance(x, handle) and x.dtype.scalar == bf16

    def wide(x: Any) -> Any:
        return handle(widen(x.data), tl.float32) if is_bf16(x) else x

    def rounded(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, *args: Any) -> Any:
            result = method(self, *map(wide, args))
            if result.data.dtype == np.bool_:  # a comparison; upstream calls its type that of the operands
                return handle(result.data, tl.int1)
            return handle(narrow(result.data), bf16) if any(map(is_bf16, args)) else result

        return run

    for name in _ROUNDED:
        if hasattr(builder, name):
            setattr(builder, name, rounded(getattr(builder, name)))

    dot = builder.create_dot
    builder.create_dot = lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)

    cast = builder.cast_impl

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == target.scalar:
            return source
        if target.scalar == bf16:
            return handle(narrow(source.data.astype(np.float32)), bf16)
        return cast(self, wide(source), target) if is_bf16(source) else cast(self, source, target)

    builder.cast_impl = cast_impl
    for name in _CASTS:
        setattr(builder, name, lambda self, source, target, *_: self.cast_impl(source, target))

    fp_to_fp = builder.create_fp_to_fp

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        kinds = (source.dtype.scalar, target.scalar)
        if bf16 in kinds and all(kind.primitive_bitwidth > 8 for kind in kinds):
            return self.cast_impl(source, target)
        return fp_to_fp(self, source, target, rounding)

    builder.create_fp_to_fp = create_fp_to_fp

    def wide_tensor(x: Any) -> Any:
        if not is_bf16(x.handle):
            return x
        return tl.core.tensor(
            wide(x.handle), tl.block_type(tl.float32, list(x.shape)) if x.shape else tl.float32
        )

    # The language widens bfloat16 itself before a sum, not before a maximum or a scan.
    for kind in (upstream.ReduceOps, upstream.ScanOps):

        def apply_impl(self: Any, tensors: Any, method: Callable[..., Any] = kind.apply_impl) -> Any:
            kinds = [x.dtype.scalar for x in tensors]
            results = method(self, tuple(map(wide_tensor, tensors)))
            if bf16 not in kinds:
                return results
            several = isinstance(results, (list, tuple))
            found = [
                x.to(bf16, _semantic=upstream.interpreter_semantic)
                if kind == bf16 and x.dtype == tl.float32
                else x
                for x, kind in zip(results if several else [results], kinds)
            ]
            return found if several else found[0]

        kind.apply_impl = apply_impl

    precisions = (*upstream.InterpreterOptions.allowed_dot_input_precisions, "bf16x3", "bf16x6")
    object.__setattr__(upstream.interpreter_builder.options, "allowed_dot_input_precisions", precisions)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args))
        self.best_config = self.prune_configs(kwargs)[0] if self.early_config_prune else self.configs[0]
        result = self.fn.run(*args, **kwargs, **self.best_config.all_kwargs())
        self.nargs = None
        return result

    autotuner.Autotuner.run = run

    restore = upstream.GridExecutor._restore_args_dev

    def restore_args(
        self: Any, device_args: Any, host_args: Any, device_kwargs: Any, host_kwargs: Any
    ) -> None:
        def copied(on_device: Any, on_host: Any) -> bool:
            if isinstance(on_device, tuple):
                return any(map(copied, on_device, on_host))
            base, host = getattr(on_device, "base", on_device), getattr(on_host, "base", on_host)
            if not hasattr(base, "untyped_storage"):
                return False
            return base.untyped_storage().data_ptr() != host.untyped_storage().data_ptr()

        pairs = [*zip(device_args, host_args), *((device_kwargs[k], host_kwargs[k]) for k in device_kwargs)]
        if any(copied(*pair) for pair in pairs):
            restore(self, device_args, host_args, device_kwargs, host_kwargs)

    upstream.GridExecutor._restore_args_dev = restore_args
    _installed = True
