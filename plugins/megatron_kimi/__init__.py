"""Kimi systems for Megatron: MuonClip by ``--use-muonclip`` in Megatron's own launch scripts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .autoload import install
    from .factory import get_megatron_muonclip_optimizer

__all__ = ["get_megatron_muonclip_optimizer", "install"]


def __getattr__(name: str) -> Any:
    # Python imports this package at start-up (see kimi_stack_megatron.pth), so it must cost next to nothing.
    if name == "install":
        from .autoload import install

        return install
    if name == "get_megatron_muonclip_optimizer":
        from .factory import get_megatron_muonclip_optimizer

        return get_megatron_muonclip_optimizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
