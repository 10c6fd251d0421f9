"""Which matrices a fused parameter consists of: Muon orthogonalises each of them on its own.

A `Split` is data. `split` gives the matrices of a parameter and `merge` puts them back; `Split.local` is the same
parameter as one tensor-parallel rank holds it, and `Split.gather_axis` says how the ranks' parts of a matrix join.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Section:
    """A run of `size` rows (or columns) with one meaning in every block, `heads` equal heads in it."""

    name: str
    size: int
    heads: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or self.heads < 1 or self.size % self.heads:
            raise ValueError(
                f"section {self.name!r} of size {self.size} does not fall into {self.heads} equal heads"
            )


@dataclass(frozen=True)
class Split:
    """How a parameter falls into matrices.

    In storage order the parameter is `blocks` equal blocks [rows, columns]; the sections follow one another along
    `axis` of each block (0 rows, 1 columns), and the other axis has length `other`.

    matrices: "joined", a section of all blocks is one matrix; "blocks", one matrix a block; "heads", one a head.
    shards: what a tensor-parallel rank holds of the sections' axis: whole "blocks", or its part of all "sections".
    """

    blocks: int
    sections: tuple[Section, ...]
    other: int
    axis: Literal[0, 1] = 0
    matrices: Literal["joined", "blocks", "heads"] = "joined"
    shards: Literal["blocks", "sections"] = "sections"

    def __post_init__(self) -> None:
        names = [s.name for s in self.sections]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"sections need different names and at least one, got {names}")
        if self.blocks < 1 or self.other < 1:
            raise ValueError(f"blocks and other must be at least 1, got {self.blocks} and {self.other}")

    @property
    def block_size(self) -> int:
        """Rows (columns) of a block along `axis`."""
        return sum(s.size for s in self.sections)

    @property
    def shape(self) -> tuple[int, int]:
        """The parameter's shape."""
        length = self.blocks * self.block_size
        return (length, self.other) if self.axis == 0 else (self.other, length)

    def local(self, tp_size: int, partition_dim: int) -> Split:
        """The split of one rank's shard, of `tp_size` along `partition_dim` (0 column-, 1 row-parallel).

        Raises ValueError where a rank's shard is not made of whole blocks, heads or sections: gather the
        parameter, and use the split as it is.
        """
        if partition_dim != self.axis:
            return replace(self, other=_share(self.other, tp_size, f"dimension {partition_dim}"))
        if self.shards == "blocks":
            return replace(self, blocks=_share(self.blocks, tp_size, "the number of blocks"))
        whole_heads = self.matrices == "heads"
        return replace(
            self,
            sections=tuple(
                Section(
                    s.name,
                    _share(s.size, tp_size, f"section {s.name!r}"),
                    _share(s.heads, tp_size, f"heads of section {s.name!r}")
                    if whole_heads
                    else (s.heads // tp_size if s.heads % tp_size == 0 else 1),
                )
                for s in self.sections
            ),
        )

    def gathered(self, tp_size: int, partition_dim: int) -> Split:
        """The split of all ranks' shards, concatenated in rank order along `partition_dim`.

        Raises ValueError for several matrices a parameter with parts of each on every rank (the experts of
        GroupedMLP cut over ranks): join the matrices that `local` gives, along `gather_axis`.
        """
        if tp_size == 1 or partition_dim != self.axis or self.shards == "blocks":
            return self
        if self.blocks > 1 or self.axis == 1:
            raise ValueError(
                f"{self.blocks} blocks, each cut over {tp_size} ranks, do not concatenate to the parameter"
            )
        return replace(self.local(tp_size, partition_dim), blocks=tp_size)

    def gather_axis(self, partition_dim: int) -> int | None:
        """The axis of the matrices [N, rows, columns] along which the ranks' parts join; None: each is whole.

        Concatenating in rank order what `split(shard, local)` gives on each rank makes the full matrices (with
        `shards="sections"` and several blocks in one matrix: up to the order of its rows).
        """
        if partition_dim != self.axis:
            return partition_dim + 1
        if self.matrices == "heads" or (self.matrices == "blocks" and self.shards == "blocks"):
            return None
        return self.axis + 1


def _share(length: int, tp_size: int, what: str) -> int:
    if length % tp_size:
        raise ValueError(f"{what} must be a multiple of the tensor-parallel size {tp_size}, got {length}")
    return length // tp_size


def split(parameter: Tensor, layout: Split) -> dict[str, Tensor]:
    """The matrices [N, rows, columns] of each section; views where the layout allows.

    Raises ValueError when the parameter does not have the layout's shape.
    """
    if tuple(parameter.shape) != layout.shape:
        raise ValueError(
            f"parameter must have the shape {layout.shape} of its layout, got {tuple(parameter.shape)}"
        )
    stored = _as_blocks(parameter, layout)
    parts = stored.split([s.size for s in layout.sections], 1)
    out = {}
    for section, part in zip(layout.sections, parts):
        if layout.matrices == "joined":
            part = part.reshape(1, -1, layout.other)
        elif layout.matrices == "heads":
            part = part.reshape(layout.blocks * section.heads, -1, layout.other)
        out[section.name] = part if layout.axis == 0 else part.mT
    return out


def merge(matrices: Mapping[str, Tensor], layout: Split) -> Tensor:
    """The parameter, from the matrices that `split` gave: `merge(split(w, s), s)` is w."""
    columns = []
    for section in layout.sections:
        part = matrices[section.name]
        part = part if layout.axis == 0 else part.mT
        columns.append(part.reshape(layout.blocks, section.size, layout.other))
    joined = torch.cat(columns, 1)
    return (joined if layout.axis == 0 else joined.mT).reshape(layout.shape)


def _as_blocks(parameter: Tensor, layout: Split) -> Tensor:
    """[blocks, block_size, other], whichever axis the sections lie on."""
    if layout.axis == 0:
        return parameter.reshape(layout.blocks, -1, layout.other)
    return parameter.reshape(layout.blocks, layout.other, -1).mT


def row_factors(layout: Split, factors: Mapping[str, Tensor]) -> Tensor:
    """[rows] of the parameter: the factor of the head that each row belongs to, 1 in sections without factors.

    `factors[name]` is [blocks * heads], the heads of that section in storage order. Names that the layout lacks
    are passed over, so that one set of factors serves a fused parameter or several separate ones.
    """
    if layout.axis != 0:
        raise ValueError("row factors need a layout whose sections are rows, got axis 1")
    known = list(factors.values())
    plain = known[0].new_ones if known else torch.ones
    columns = []
    for s in layout.sections:
        factor = factors.get(s.name)
        if factor is None:
            columns.append(plain((layout.blocks, s.size)))
            continue
        if tuple(factor.shape) != (layout.blocks * s.heads,):
            raise ValueError(
                f"factors[{s.name!r}] must have shape ({layout.blocks * s.heads},), one a head, "
                f"got {tuple(factor.shape)}"
            )
        columns.append(factor.view(layout.blocks, s.heads).repeat_interleave(s.size // s.heads, 1))
    return torch.cat(columns, 1).flatten()


def _kind(per_head: bool) -> Literal["joined", "heads"]:
    return "heads" if per_head else "joined"


def stacked(rows: Mapping[str, int], columns: int, heads: Mapping[str, int] | None = None) -> Split:
    """Projections stacked in one parameter [sum of rows, columns], each its own matrix.

    Serves SwiGLU's gate and up, the fused input projections of KDA and Gated DeltaNet, the latent and rotary
    parts of MLA's down projections. With `heads` (name to number of heads, 1 where absent) each head is its own.
    """
    sections = tuple(Section(name, size, (heads or {}).get(name, 1)) for name, size in rows.items())
    return Split(1, sections, columns, matrices=_kind(heads is not None))


def fused_qkv(
    groups: int, heads: int, head_dim: int, columns: int, gate: bool = False, per_head: bool = False
) -> Split:
    """Megatron's linear_qkv: for each query group its queries, with `gate` their gates, one key, one value."""
    if groups < 1 or heads % groups:
        raise ValueError(f"heads must be a multiple of the {groups} query groups, got {heads}")
    each = heads // groups
    queries = (
        Section("q", each * head_dim, each),
        *([Section("gate", each * head_dim, each)] if gate else []),
    )
    sections = (*queries, Section("k", head_dim), Section("v", head_dim))
    return Split(groups, sections, columns, matrices=_kind(per_head), shards="blocks")


def mla_query(heads: int, nope: int, rope: int, columns: int, per_head: bool = False) -> Split:
    """MLA's query (up) projection: for each head the content rows, then the rotary rows."""
    sections = (Section("q_nope", nope), *([Section("q_rope", rope)] if rope else []))
    return Split(heads, sections, columns, matrices=_kind(per_head), shards="blocks")


def mla_key_value(heads: int, nope: int, value: int, columns: int, per_head: bool = False) -> Split:
    """MLA's key-value up projection: for each head the key's content rows, then the value rows."""
    sections = (Section("k_nope", nope), Section("v", value))
    return Split(heads, sections, columns, matrices=_kind(per_head), shards="blocks")


def grouped_fc1(experts: int, hidden: int, ffn: int, gated: bool) -> Split:
    """GroupedMLP's weight1 [hidden, experts * width]: stored as experts matrices [hidden, (gate, up) of ffn]."""
    sections = (Section("gate", ffn), Section("up", ffn)) if gated else (Section("up", ffn),)
    return Split(experts, sections, hidden, axis=1, matrices="blocks")


def grouped_fc2(experts: int, ffn: int, hidden: int) -> Split:
    """GroupedMLP's weight2 [experts * ffn, hidden]: a matrix [ffn, hidden] an expert."""
    return Split(experts, (Section("down", ffn),), hidden, matrices="blocks")
