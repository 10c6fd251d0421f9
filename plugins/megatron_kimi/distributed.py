"""Where the pieces of each matrix are, and how they meet (Moonlight, arXiv 2502.16982, section 2.3).

A data-parallel rank holds flat slices of the matrices of its model-parallel rank: all of every matrix without
Megatron's distributed optimizer, its part of a buffer with it (ZeRO-1). A matrix may also be cut over the
tensor-parallel group. Newton-Schulz needs the whole matrix, so

1. over the data-parallel group, the slices of a matrix go to one holder, its owner (nothing moves if it is whole);
2. over the tensor-parallel group, the parts of the owners go to one of them;
3. that rank orthogonalises; both ways back bring each rank its own slice of the result.

So every matrix is orthogonalised once, and for one cut by a shard boundary as many bytes move as if each of its two
holders had fetched the other's half. With ``once=False`` every holder fetches the matrix and orthogonalises it
itself, and nothing comes back: Moonlight's description. Both give the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from .splits import Split

# Matrices are exchanged in rounds of at most this many elements (or one matrix), so that buffers stay small:
# 2**26 bfloat16 elements are 128 MiB, far beyond where a network reaches its full rate.
ROUND_ELEMENTS = 1 << 26

Orthogonalize = Callable[[Sequence["Matrix"], Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a flattened matrix, held by `rank` of the data-parallel group."""

    rank: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight, as the ranks of one data-parallel group hold it.

    Args:
        name: its name in the model.
        shape: [n, m] on one tensor-parallel rank.
        pieces: its slices over the data-parallel group; together they cover it once (ZeRO-1), or each is all of it.
        tensor_dim: dimension that is cut over the tensor-parallel group, None where each rank has all of it.
        layout: what it consists of when it is whole over the tensor-parallel group; None: it is one matrix.
    """

    name: str
    shape: tuple[int, int]
    pieces: tuple[Piece, ...]
    tensor_dim: int | None = None
    layout: Split | None = None

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def replicated(self) -> bool:
        """Every rank of the data-parallel group has all of it."""
        return len(self.pieces) > 1 and all(p.stop - p.start == self.numel for p in self.pieces)

    def piece(self, rank: int) -> Piece | None:
        return next((p for p in self.pieces if p.rank == rank), None)

    def cost(self, tensor_size: int) -> int:
        """Of orthogonalising the whole matrix, in multiply-adds but for a constant."""
        n, m = self.shape
        if self.tensor_dim is not None:
            n, m = (n * tensor_size, m) if self.tensor_dim == 0 else (n, m * tensor_size)
        return n * m * min(n, m)


@dataclass(frozen=True)
class Group:
    """A process group with this rank's place in it; `group` None is a group of this rank alone."""

    group: dist.ProcessGroup | None
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Group:
        if group is None or dist.get_world_size(group) == 1:
            return cls(None)
        return cls(group, dist.get_rank(group), dist.get_world_size(group))


ALONE = Group(None)


@dataclass
class _Loads:
    """Work given to each rank so far: the next matrix goes to the least loaded of those that may have it."""

    loads: list[int] = field(default_factory=list)

    def take(self, ranks: Sequence[int], cost: int) -> int:
        rank = min(ranks, key=lambda r: (self.loads[r], r))
        self.loads[rank] += cost
        return rank


class Exchange:
    """Updates of all matrices that share one data-parallel and one tensor-parallel group.

    Every rank of both groups must build it from the same matrices in the same order and call `run` together.

    Args:
        matrices: in an order that all ranks share.
        data: the data-parallel group whose ranks `Piece.rank` counts.
        tensor: the tensor-parallel group.
        once: one rank orthogonalises each matrix; otherwise each holder does.
    """

    def __init__(self, matrices: Sequence[Matrix], data: Group, tensor: Group, once: bool = True) -> None:
        self.matrices = tuple(matrices)
        self.data, self.tensor, self.once = data, tensor, once
        data_loads, tensor_loads = _Loads([0] * data.size), _Loads([0] * tensor.size)
        self._owner: list[int] = []
        self._tensor_owner: list[int] = []
        # Largest first gives the evenest shares; the order of `matrices` itself must not change.
        owners: dict[int, tuple[int, int]] = {}
        for index in sorted(range(len(matrices)), key=lambda i: (-matrices[i].cost(tensor.size), i)):
            matrix = matrices[index]
            cost = matrix.cost(tensor.size)
            owner = data_loads.take(sorted({p.rank for p in matrix.pieces}), cost)
            cut = matrix.tensor_dim is not None and tensor.size > 1
            owners[index] = owner, tensor_loads.take(range(tensor.size), cost) if cut else -1
        for index in range(len(matrices)):
            owner, tensor_owner = owners[index]
            self._owner.append(owner)
            self._tensor_owner.append(tensor_owner)

    def rounds(self) -> Iterator[range]:
        """Runs of matrices that are exchanged together."""
        start, elements = 0, 0
        for index, matrix in enumerate(self.matrices):
            if index > start and elements + matrix.numel > ROUND_ELEMENTS:
                yield range(start, index)
                start, elements = index, 0
            elements += matrix.numel
        if start < len(self.matrices):
            yield range(start, len(self.matrices))

    def run(
        self, slices: Callable[[Matrix], Tensor], orthogonalize: Orthogonalize
    ) -> Iterator[tuple[Matrix, Tensor]]:
        """Orthogonalise every matrix and yield this rank's flat slice of each result.

        Args:
            slices: the flat local slice of a matrix, [piece's length]; called once for each held matrix. All ranks
                must give the same dtype.
            orthogonalize: takes matrices and their whole tensors ([n, m] over all tensor-parallel ranks) and
                returns the results.

        Yields:
            (matrix, [piece's length]) for each matrix of which this rank holds a slice.
        """
        for members in self.rounds():
            held = {i: slices(self.matrices[i]) for i in members if self.matrices[i].piece(self.data.rank)}
            whole = self._gather(members, held)
            results = self._solve(members, whole, orthogonalize)
            yield from self._deliver(members, results, held)

    # over the data-parallel group

    def _destinations(self, index: int) -> tuple[int, ...]:
        """Ranks that put matrix `index` together."""
        matrix = self.matrices[index]
        if self.once:
            return (self._owner[index],)
        return tuple(sorted({p.rank for p in matrix.pieces}))

    def _gather(self, members: range, held: dict[int, Tensor]) -> dict[int, Tensor]:
        """The matrices that this rank puts together, [n, m] each, of one tensor-parallel rank."""
        me = self.data.rank
        moving = [
            (index, piece, to)
            for index in members
            if not self.matrices[index].replicated
            for piece in self.matrices[index].pieces
            for to in self._destinations(index)
            if to != piece.rank
        ]
        sample = next(iter(held.values()), None)
        arrived = _all_to_all(
            self.data if moving else ALONE,
            [
                (to, held[index][: piece.stop - piece.start])
                for index, piece, to in moving
                if piece.rank == me
            ],
            [(piece.rank, piece.stop - piece.start) for _, piece, to in moving if to == me],
            sample,
        )
        incoming = iter(arrived)
        parts: dict[int, list[tuple[Piece, Tensor]]] = {}
        for index, piece, to in moving:
            if to == me:
                parts.setdefault(index, []).append((piece, next(incoming)))
        whole = {}
        for index in members:
            if me not in self._destinations(index):
                continue
            matrix, mine = self.matrices[index], self.matrices[index].piece(me)
            assert mine is not None
            if matrix.replicated or mine.stop - mine.start == matrix.numel:
                whole[index] = held[index].view(matrix.shape)
                continue
            flat = held[index].new_empty(matrix.numel)
            flat[mine.start : mine.stop] = held[index]
            for piece, part in parts.get(index, ()):
                flat[piece.start : piece.stop] = part
            whole[index] = flat.view(matrix.shape)
        return whole

    def _deliver(
        self, members: range, results: dict[int, Tensor], held: dict[int, Tensor]
    ) -> Iterator[tuple[Matrix, Tensor]]:
        """This rank's slice of each result."""
        me = self.data.rank
        moving = [
            (index, piece)
            for index in members
            for piece in self.matrices[index].pieces
            if self.once and piece.rank != self._owner[index]
        ]
        sample = next(iter(held.values()), None)
        arrived = _all_to_all(
            self.data if moving else ALONE,
            [
                (piece.rank, results[index].reshape(-1)[piece.start : piece.stop])
                for index, piece in moving
                if self._owner[index] == me
            ],
            [(self._owner[index], piece.stop - piece.start) for index, piece in moving if piece.rank == me],
            sample,
        )
        remote = dict(zip((index for index, piece in moving if piece.rank == me), arrived, strict=True))
        for index in members:
            piece = self.matrices[index].piece(me)
            if piece is None:
                continue
            if index in remote:
                yield self.matrices[index], remote[index]
            else:
                yield self.matrices[index], results[index].reshape(-1)[piece.start : piece.stop]

    # over the tensor-parallel group

    def _solve(
        self, members: range, whole: dict[int, Tensor], orthogonalize: Orthogonalize
    ) -> dict[int, Tensor]:
        """Results of the matrices in `whole`, still cut over the tensor-parallel group."""
        me, size = self.tensor.rank, self.tensor.size
        cut = [i for i in whole if self.matrices[i].tensor_dim is not None and size > 1]
        sample = whole[cut[0]] if cut else None

        def solvers(index: int) -> tuple[int, ...]:
            return (self._tensor_owner[index],) if self.once else tuple(range(size))

        # Every tensor-parallel peer of this rank holds the same matrices, so the list is theirs as well.
        forth = [(i, source, to) for i in cut for source in range(size) for to in solvers(i) if to != source]
        arrived = iter(
            _all_to_all(
                self.tensor if forth else ALONE,
                [(to, whole[i].reshape(-1)) for i, source, to in forth if source == me],
                [(source, self.matrices[i].numel) for i, source, to in forth if to == me],
                sample,
            )
        )
        parts = {i: {me: whole[i]} for i in cut}
        for i, source, to in forth:
            if to == me:
                parts[i][source] = next(arrived).view(self.matrices[i].shape)
        mine = [i for i in whole if i not in parts or me in solvers(i)]
        full = [
            torch.cat([parts[i][r] for r in range(size)], dim=self.matrices[i].tensor_dim or 0)
            if i in parts
            else whole[i]
            for i in mine
        ]
        solved = dict(zip(mine, orthogonalize([self.matrices[i] for i in mine], full), strict=True))

        def part(index: int, rank: int) -> Tensor:
            return solved[index].chunk(size, dim=self.matrices[index].tensor_dim or 0)[rank].contiguous()

        back = [(i, to) for i in cut if self.once for to in range(size) if to != self._tensor_owner[i]]
        arrived = iter(
            _all_to_all(
                self.tensor if back else ALONE,
                [(to, part(i, to).reshape(-1)) for i, to in back if self._tensor_owner[i] == me],
                [(self._tensor_owner[i], self.matrices[i].numel) for i, to in back if to == me],
                sample,
            )
        )
        results = {i: next(arrived).view(self.matrices[i].shape) for i, to in back if to == me}
        for i in whole:
            if i not in results:
                results[i] = part(i, me) if i in parts else solved[i]
        return results


def _all_to_all(
    group: Group,
    outgoing: Sequence[tuple[int, Tensor]],
    incoming: Sequence[tuple[int, int]],
    sample: Tensor | None,
) -> list[Tensor]:
    """Send flat tensors and receive flat tensors, all of `sample`'s dtype and device, in one collective.

    Args:
        group: all its ranks must call.
        outgoing: (to, tensor); those for one rank keep their order.
        incoming: (from, elements) in the order in which the result lists them.
        sample: a tensor of the dtype and device; None where this rank neither sends nor receives.
    """
    if group.group is None:
        return []
    if sample is None:
        assert not outgoing and not incoming
        sample = torch.empty(0, dtype=torch.uint8)
        if dist.get_backend(group.group) == "nccl":
            sample = sample.cuda()
    size = sample.element_size()
    by_rank: list[list[Tensor]] = [[] for _ in range(group.size)]
    for to, tensor in outgoing:
        by_rank[to].append(tensor.reshape(-1))
    sends = [sum(t.numel() for t in tensors) * size for tensors in by_rank]
    receives = [0] * group.size
    for source, elements in incoming:
        receives[source] += elements * size
    flat = [t for tensors in by_rank for t in tensors]
    # As bytes: gloo knows few types, and every backend knows this one.
    source_bytes = (torch.cat(flat) if flat else sample.new_empty(0)).view(torch.uint8)
    target = source_bytes.new_empty(sum(receives))
    dist.all_to_all_single(target, source_bytes, receives, sends, group=group.group)
    offsets = [sum(receives[:r]) for r in range(group.size)]
    result = []
    for source, elements in incoming:
        start = offsets[source]
        offsets[source] += elements * size
        result.append(target[start : offsets[source]].view(sample.dtype))
    return result
