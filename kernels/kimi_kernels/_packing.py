"""Where packed sequences lie in the grid of a Triton kernel. Needs triton.

Sequences of any length share one grid: sequence n, which starts at token a of the packed row, owns the slots of BT
tokens from a // BT + n on, which are as many as it can need. No table of them has to be made, or to reach the host.
Without offsets (PACKED is False) every sequence is a batch row of T tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sequence_bounds(cu_seqlens, n, T, PACKED: tl.constexpr):
    """First token in the packed row, and length, of sequence n; a batch row starts at its own token 0.

    The host does not read offsets that are on a GPU: wrong ones name other tokens, never memory outside of the row.
    """
    if PACKED:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens + n).to(tl.int64), 0), T)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + n + 1).to(tl.int64), first), T)
        length = end - first
    else:
        first = n.to(tl.int64) * 0
        length = first + T
    return first, length


@triton.jit
def first_slot(first, n, T, BT: tl.constexpr, PACKED: tl.constexpr):
    """The slot of the tokens from `first` on, with which sequence n starts."""
    if PACKED:
        slot = first // BT + n
    else:
        slot = n.to(tl.int64) * ((T + BT - 1) // BT)
    return slot


@triton.jit
def sequence_of_slot(cu_seqlens, slot, T, N, BT: tl.constexpr, PACKED: tl.constexpr):
    """The last of N sequences whose slots start at or before this one; it need not reach as far."""
    if PACKED:
        low = slot * 0
        high = low + N - 1
        while low < high:
            middle = (low + high + 1) // 2
            starts = tl.load(cu_seqlens + middle).to(tl.int64) // BT + middle
            low = tl.where(starts <= slot, middle, low)
            high = tl.where(starts <= slot, high, middle - 1)
        n = low
    else:
        n = slot // ((T + BT - 1) // BT)
    return n
