"""Whole layers of a decode step: prepared once, then one native call a step.

A decode step of a small model is made of calls that each compute for a few microseconds. What is constant from step
to step, which is nearly everything a call is told, is checked and laid out once here. Where the native library
cannot run a layer, it is computed by the single ops, which choose their backends themselves.
"""

from .kda import KdaDecodeLayer
from .mla import MlaLayer
from .moe import MoeLayer

__all__ = ["KdaDecodeLayer", "MlaLayer", "MoeLayer"]
