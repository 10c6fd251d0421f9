"""Copies of recurrent states between cache blocks where Triton is absent.

Prefix caching of hybrid models ("align" mode) keeps the running state in the last block and copies it when a
request enters a new one. vLLM does that with a Triton kernel, which a CPU without triton-cpu does not have.
"""

from __future__ import annotations

import ctypes

import torch


def copy_ranges(src_ptrs: torch.Tensor, dst_ptrs: torch.Tensor, sizes: torch.Tensor) -> None:
    """memmove `sizes[i]` bytes from address `src_ptrs[i]` to `dst_ptrs[i]`, in order.

    The same contract as vLLM's `batch_memcpy`: int tensors [n] of host addresses; ranges of one pair may overlap.
    """
    for source, target, size in zip(src_ptrs.tolist(), dst_ptrs.tolist(), sizes.tolist()):
        ctypes.memmove(target, source, size)


def install() -> None:
    """Give vLLM this copy on a CPU without Triton; elsewhere its own kernel stays."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON
    from vllm.v1.worker import mamba_utils

    if current_platform.is_cpu() and not HAS_TRITON:
        mamba_utils.batch_memcpy = copy_ranges
