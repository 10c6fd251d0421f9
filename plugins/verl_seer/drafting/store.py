"""Grouped drafting across instances (Seer's DGDS): a server that holds what every response has said, and clients.

The server keeps token logs, not indices: appends are cheap, and a client fetches what lies behind its cursors. A client
keeps one index a group (`native.NativeIndex`), adds its own requests' tokens at once and its siblings' when it syncs.
Both are plain objects without locks or processes; whoever hosts them sees to that.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from verl_seer.drafting.types import EMPTY_DRAFT, TOKEN_LIMIT, Draft, DraftOptions, TokenIds, check_tokens

PROMPT_TAIL = 16  # prompt tokens before each response in the index: context for its first tokens


@dataclass(frozen=True)
class Delta:
    """What a client lacks of a group: tokens behind its cursors, by request.

    `epoch` counts the weights that the tokens were sampled with; a client of another epoch starts over.
    """

    epoch: int
    tokens: Mapping[str, array]


@dataclass
class _Log:
    expires: float
    requests: dict[str, array] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(len(tokens) for tokens in self.requests.values())


class DraftServer:
    """The responses of all live groups.

    Args:
        vocab_size: token ids must be in [0, vocab_size).
        max_tokens: most tokens held, of all groups; beyond it the group that was used longest ago is dropped.
        ttl: seconds after which a group that nobody touches is dropped, unless registered with its own.
        clock: seconds from any start.
    """

    def __init__(
        self,
        vocab_size: int = TOKEN_LIMIT,
        max_tokens: int = 1 << 30,
        ttl: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        if not ttl > 0:
            raise ValueError(f"ttl must be positive seconds, got {ttl}")
        self.vocab_size, self.max_tokens, self.ttl, self.epoch = vocab_size, max_tokens, ttl, 0
        self._clock = clock
        self._groups: OrderedDict[str, _Log] = OrderedDict()  # least recently used first
        self._ttls: dict[str, float] = {}
        self._held = 0

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return self._held

    @property
    def groups(self) -> list[str]:
        """Groups held, the one used longest ago first."""
        return list(self._groups)

    def register_group(self, group_id: str, ttl_seconds: float | None = None) -> None:
        """Makes room for a group, or gives it a new time to live."""
        if ttl_seconds is not None:
            if not ttl_seconds > 0:
                raise ValueError(f"ttl_seconds must be positive, got {ttl_seconds}")
            self._ttls[group_id] = ttl_seconds
        self._touch(group_id)

    def append(self, group_id: str, request_id: str, position: int, tokens: TokenIds) -> int:
        """Tokens of a response from `position` on; returns the length of the response here.

        Tokens that are here already are skipped, so that an update may be sent twice. ValueError for a gap, which
        means that an update was lost, and for token ids outside [0, vocab_size); nothing has been added then.
        """
        new = check_tokens(tokens, self.vocab_size)
        held = len(self._groups[group_id].requests.get(request_id, ())) if group_id in self._groups else 0
        if not 0 <= position <= held:
            raise ValueError(
                f"position of {request_id!r} must be in 0..{held} (the tokens held), got {position}: send what "
                "is missing first"
            )
        log = self._touch(group_id).requests.setdefault(request_id, array("i"))
        fresh = new[held - position :]
        log.frombytes(fresh.tobytes())
        self._held += len(fresh)
        while self._held > self.max_tokens and len(self._groups) > 1:
            self.drop_group(next(iter(self._groups)))
        return len(log)

    def fetch(self, group_id: str, cursors: Mapping[str, int], epoch: int) -> Delta:
        """What lies behind the client's cursors (tokens that it has, by request).

        A client of another epoch gets everything. A group that is not here gives an empty delta. A cursor beyond
        what is here (the client runs the request, and its update is on the way) gives nothing for that request.
        """
        if group_id not in self._groups:
            return Delta(self.epoch, {})
        log = self._touch(group_id)
        known = cursors if epoch == self.epoch else {}
        if min(known.values(), default=0) < 0:
            raise ValueError(f"cursors must not be negative, got {min(known.values())} in group {group_id!r}")
        rows = {request: tokens[known.get(request, 0) :] for request, tokens in log.requests.items()}
        return Delta(self.epoch, {request: tokens for request, tokens in rows.items() if tokens})

    def drop_group(self, group_id: str) -> None:
        """Forgets a group; one that is not here is no error."""
        log = self._groups.pop(group_id, None)
        self._ttls.pop(group_id, None)
        if log is not None:
            self._held -= log.size

    def sweep(self) -> list[str]:
        """Drops the groups whose time is over; returns them."""
        now = self._clock()
        over = [group for group, log in self._groups.items() if log.expires <= now]
        for group in over:
            self.drop_group(group)
        return over

    def new_weights(self) -> None:
        """The policy has changed: what the old one said is forgotten, here and at each client's next sync."""
        self.epoch += 1
        self._groups.clear()
        self._ttls.clear()
        self._held = 0

    def _touch(self, group_id: str) -> _Log:
        expires = self._clock() + self._ttls.get(group_id, self.ttl)
        log = self._groups.get(group_id)
        if log is None:
            log = self._groups[group_id] = _Log(expires)
        log.expires = expires
        self._groups.move_to_end(group_id)
        return log


class Index(Protocol):
    """What a client needs of an index; `native.NativeIndex` and `reference.ReferenceIndex` have it."""

    def append(self, request_id: str, tokens: TokenIds) -> int: ...

    def trim(self, keep: int) -> None: ...

    def draft(self, request_id: str, options: DraftOptions) -> Draft: ...


@dataclass
class _Group:
    index: Index
    prompt_tail: list[int]
    positions: dict[str, int] = field(default_factory=dict)
    held: int = 0


class GroupDrafter:
    """One instance's indices: drafts for its requests from all that their groups have said.

    Args:
        make_index: makes an empty index, e.g. ``lambda: NativeIndex(vocab_size)``.
        draft_batch: drafts from many of these indices at once (`native.draft_batch`); None asks one after the other.
        max_group_tokens: when a group holds more, all but the last half of that, shared by its requests, is forgotten.
        max_groups: groups held; beyond it the one used longest ago is dropped and starts over when it is seen again.
    """

    def __init__(
        self,
        make_index: Callable[[], Index],
        max_group_tokens: int = 1 << 20,
        max_groups: int = 4096,
        draft_batch: Callable[[Sequence[Any], Sequence[str], Sequence[DraftOptions]], list[Draft]]
        | None = None,
    ) -> None:
        for name, value in (("max_group_tokens", max_group_tokens), ("max_groups", max_groups)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._make, self.max_group_tokens, self.max_groups = make_index, max_group_tokens, max_groups
        self._draft_batch = draft_batch or _one_by_one
        self.epoch = 0
        self._groups: OrderedDict[str, _Group] = OrderedDict()

    @property
    def groups(self) -> list[str]:
        """Groups held, the one used longest ago first."""
        return list(self._groups)

    @property
    def tokens(self) -> int:
        """Tokens held, prompts included."""
        return sum(group.held for group in self._groups.values())

    def __contains__(self, group_id: str) -> bool:
        return group_id in self._groups

    def clear(self) -> None:
        """Forgets all groups."""
        self._groups.clear()

    def drop(self, group_id: str) -> None:
        """Forgets a group; one that is not here is no error."""
        self._groups.pop(group_id, None)

    def open(self, group_id: str, prompt: TokenIds) -> None:
        """Makes the group's index from its prompt, unless there is one."""
        if group_id in self._groups:
            self._groups.move_to_end(group_id)
            return
        index = self._make()
        index.append("prompt", prompt)
        tail = [int(token) for token in prompt[-PROMPT_TAIL:]]
        self._groups[group_id] = _Group(index, tail, held=len(prompt))
        while len(self._groups) > self.max_groups:
            self._groups.popitem(last=False)

    def cursors(self, group_id: str) -> dict[str, int]:
        """Tokens held of each response of the group, for `DraftServer.fetch`."""
        return dict(self._group(group_id).positions)

    def append(self, group_id: str, request_id: str, tokens: TokenIds) -> int:
        """Tokens that one of this instance's requests has generated; returns the length of the response here."""
        group = self._group(group_id)
        name = f"response {request_id}"
        at = group.positions.get(request_id, 0)
        # Checks the tokens before anything changes: a new response starts with the end of the prompt.
        if request_id not in group.positions:
            group.index.append(name, [*group.prompt_tail, *(int(t) for t in tokens)])
            group.held += len(group.prompt_tail)
        else:
            group.index.append(name, tokens)
        group.positions[request_id] = at + len(tokens)
        group.held += len(tokens)
        if group.held > self.max_group_tokens:
            keep = max(1, self.max_group_tokens // 2 // (len(group.positions) + 1))
            group.index.trim(keep)
            group.held = sum(min(keep, n + len(group.prompt_tail)) for n in group.positions.values()) + keep
        return group.positions[request_id]

    def extend(self, group_id: str, request_id: str, position: int, tokens: TokenIds) -> int:
        """Takes in a response's tokens from `position` on, as far as they are new; returns how many were.

        Nothing is taken of a group that is not here, or from behind a gap.
        """
        group = self._groups.get(group_id)
        held = 0 if group is None else group.positions.get(request_id, 0)
        if group is None or not 0 <= position <= held:
            return 0
        fresh = tokens[held - position :]
        if len(fresh) == 0:
            return 0
        self.append(group_id, request_id, fresh)
        return len(fresh)

    def sync(self, group_id: str, delta: Delta) -> int:
        """Takes in what the server had behind the cursors; returns how many tokens were new.

        A delta of a new epoch clears every group first, so that open and append come again from the caller.
        """
        if delta.epoch != self.epoch:
            self.epoch = delta.epoch
            self._groups.clear()
            return 0
        for request_id, tokens in delta.tokens.items():
            self.append(group_id, request_id, tokens)
        return sum(len(tokens) for tokens in delta.tokens.values())

    def draft(self, group_id: str, request_id: str, options: DraftOptions) -> Draft:
        """What may follow the request's response; empty for a group or request that is not here."""
        group = self._groups.get(group_id)
        if group is None or request_id not in group.positions:
            return EMPTY_DRAFT
        self._groups.move_to_end(group_id)
        return group.index.draft(f"response {request_id}", options)

    def drafts(self, rows: Sequence[tuple[str, str, DraftOptions]]) -> list[Draft]:
        """`draft` for each (group, request, options) of groups that are here."""
        indices = [self._groups[group].index for group, _, _ in rows]
        return self._draft_batch(
            indices, [f"response {request}" for _, request, _ in rows], [o for *_, o in rows]
        )

    def _group(self, group_id: str) -> _Group:
        try:
            return self._groups[group_id]
        except KeyError:
            raise ValueError(f"group_id {group_id!r} is not open: open it with its prompt first") from None


def _one_by_one(
    indices: Sequence[Index], names: Sequence[str], options: Sequence[DraftOptions]
) -> list[Draft]:
    return [index.draft(name, o) for index, name, o in zip(indices, names, options)]


def replay(draft: Draft, truth: Sequence[int]) -> int:
    """How many of the tokens that really follow the draft has, along its best path."""
    children: dict[tuple[int, int], int] = {
        (parent, token): i for i, (token, parent) in enumerate(zip(draft.tokens, draft.parents))
    }
    at = -1
    for accepted, token in enumerate(truth):
        nxt = children.get((at, token))
        if nxt is None:
            return accepted
        at = nxt
    return len(truth)
