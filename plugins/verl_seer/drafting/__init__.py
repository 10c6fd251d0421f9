"""Grouped drafting: drafts for a response from what its siblings, and the response itself, have said before."""

from verl_seer.drafting.types import Draft, DraftOptions

__all__ = ["Draft", "DraftOptions"]
