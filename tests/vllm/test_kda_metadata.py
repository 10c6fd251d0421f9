"""A batch's parts for the KDA layers: made on the host, their tensors on the layers' device.

The device here is torch's "meta", whose tensors have no values: code that asked one for them would fail as it would
stall on a GPU, and a tensor left on the host is seen.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from vllm_kimi.kda import KDAMetadata, KDAMetadataBuilder

DEVICE = torch.device("meta")


def build(lengths: list[int], seq_lens: list[int], drafts: list[int] | None = None) -> KDAMetadata:
    """Of requests with `lengths` new tokens each, `drafts` of them drafted (-1: not speculative)."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    count = len(lengths)
    builder = object.__new__(KDAMetadataBuilder)
    builder.device, builder.by_position, builder.speculative = DEVICE, False, 2 if drafts else 0
    batch: Any = SimpleNamespace(
        query_start_loc=starts.to(DEVICE),
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seq_lens).to(DEVICE),
        seq_lens_cpu_upper_bound=torch.tensor([*seq_lens, 0]),  # padded
        num_reqs=count,
        num_actual_tokens=sum(lengths),
        max_query_len=max(lengths),
        block_table_tensor=torch.zeros(count, 3, dtype=torch.int32, device=DEVICE),
    )
    accepted = torch.ones(count, dtype=torch.int64, device=DEVICE) if drafts else None
    return builder.build(0, batch, accepted, torch.tensor(drafts) if drafts else None)


def on_device(metadata: KDAMetadata) -> bool:
    tensors = [x for part in metadata.parts for x in vars(part).values() if isinstance(x, torch.Tensor)]
    return bool(tensors) and all(x.device == DEVICE for x in tensors)


def test_decodes() -> None:
    metadata = build([1, 1, 1], [5, 9, 2])
    (part,) = metadata.parts
    assert on_device(metadata) and part.is_plain_decode(3)


def test_decodes_and_prefills() -> None:
    """A prompt of one token is a prefill: its slot holds another's state."""
    metadata = build([1, 1, 1, 7], [5, 9, 1, 7])
    decode, prefill = metadata.parts
    assert on_device(metadata)
    assert decode.tokens == slice(0, 2) and decode.has_state is None
    assert prefill.tokens == slice(2, 10) and prefill.has_state is not None and prefill.has_state.shape == (2,)


def test_drafts_beside_prefills() -> None:
    metadata = build([3, 2, 6], [20, 11, 6], [2, 1, -1])
    speculative, prefill = metadata.parts
    assert on_device(metadata)
    assert speculative.tokens == slice(0, 5) and speculative.fresh is None
    assert speculative.num_accepted is not None and speculative.states.shape == (2, 3)
    assert prefill.tokens == slice(5, 11) and prefill.has_state is not None


def test_drafts_between_prefills_and_a_new_prompt_that_looks_like_one() -> None:
    metadata = build([2, 4, 1], [9, 4, 1], [1, -1, 0])
    speculative, prefill = metadata.parts
    assert on_device(metadata)
    assert isinstance(speculative.tokens, torch.Tensor) and speculative.tokens.shape == (3,)
    assert speculative.fresh is not None and speculative.fresh.shape == (2,)
    assert prefill.tokens == slice(2, 6)


def test_the_same_batch_for_another_group_of_layers() -> None:
    metadata = build([3, 2, 6], [20, 11, 6], [2, 1, -1])
    builder = object.__new__(KDAMetadataBuilder)
    other = builder.update_block_table(metadata, torch.ones(3, 3, dtype=torch.int32, device=DEVICE), None)
    assert on_device(other)
    assert [p.states.shape for p in other.parts] == [p.states.shape for p in metadata.parts]
