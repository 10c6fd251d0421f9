"""One engine's drafting: from the tokens of each step to drafts for the next. Without vLLM; `drafter` feeds it."""

from __future__ import annotations

import dataclasses
import logging
import time
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from verl_seer.budget import BENEFIT_RULES, GAMMA_MAX, BenefitRule, BudgetConfig
from verl_seer.drafting.lengths import DraftLengths
from verl_seer.drafting.names import parse_chunk
from verl_seer.drafting.store import GroupDrafter
from verl_seer.drafting.types import DraftOptions

logger = logging.getLogger("verl.seer")

NEWS_PER_STEP = 4096  # siblings' tokens that one step takes in at most: about a millisecond


@dataclass(frozen=True)
class EngineOptions:
    """How an engine drafts.

    Args:
        max_draft: most tokens drafted for a request in a step.
        adaptive: whether Algorithm 1 chooses the lengths, up to max_draft; else every draft may have max_draft.
        rule: its reading of beta, see `BudgetConfig`.
        min_score: least estimated probability that a drafted token and all before it are accepted.
        update_seconds: time between two exchanges with the draft server.
        ttl_seconds: after which a group without running requests here is forgotten.
        max_tokens: tokens of all groups held here (about 80 bytes each); beyond it idle groups go first.
        server: address of a draft server, ``tcp://host:port``; None drafts from this engine's own responses until
            it is told one.
    """

    max_draft: int = GAMMA_MAX
    adaptive: bool = True
    rule: BenefitRule = "conditional"
    min_score: float = 0.1
    update_seconds: float = 0.25
    ttl_seconds: float = 600.0
    max_tokens: int = 1 << 25
    server: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_draft", "max_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not isinstance(self.adaptive, bool):
            raise ValueError(f"adaptive must be true or false, got {self.adaptive!r}")
        if self.rule not in BENEFIT_RULES:
            raise ValueError(f"rule must be one of {', '.join(BENEFIT_RULES)}, got {self.rule!r}")
        if not _number(self.min_score) or not 0 <= self.min_score <= 1:
            raise ValueError(f"min_score must be in [0, 1], got {self.min_score!r}")
        for name in ("update_seconds", "ttl_seconds"):
            value = getattr(self, name)
            if not _number(value) or not value > 0:
                raise ValueError(f"{name} must be a positive number of seconds, got {value!r}")
        if self.server is not None and not str(self.server).startswith("tcp://"):
            raise ValueError(f"server must be null or tcp://host:port, got {self.server!r}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> EngineOptions:
        """Options by name.

        Raises:
            ValueError: an unknown name or a value out of range.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ValueError(f"unknown drafting options {unknown}: there are {', '.join(names)}")
        return cls(**given)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass
class DraftCounts:
    """What an engine has done since it started. Seconds are of steps whose time is known; see `EngineDrafter.step`."""

    steps: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    received: int = 0  # siblings' tokens from the draft server
    timed_steps: int = 0
    own_seconds: float = 0.0
    step_seconds: float = 0.0


Update = tuple[str, str, int, array]
"""(group, response, position, tokens): a response's tokens from a position on."""


class Link(Protocol):
    """The way to a draft server; `link.DraftLink` is one. No method waits for the server."""

    def offer(
        self, updates: list[Update], cursors: dict[str, dict[str, int]], counts: dict[str, float]
    ) -> None:
        """Hands over what is new here, and what is held of the groups that run here."""

    def take(self) -> tuple[bool, list[Update]]:
        """Whether all that was held or sent is void (new weights, or the server lost something), and what came."""

    def close(self) -> None:
        """Ends it."""


@dataclass(slots=True)
class _Live:
    group: str
    response: str
    probe: bool
    prompt: int  # tokens before the response
    limit: int  # most tokens of prompt and response
    held: int  # tokens of the response in the index
    fresh: array = field(default_factory=lambda: array("i"))  # those that come after them
    sent: int = 0
    pending: array = field(default_factory=lambda: array("i"))


class EngineDrafter:
    """Drafts for the requests of one engine.

    Args:
        groups: the indices; empty.
        options: how to draft.
        link: a draft server, or None.
        clock: seconds from any start.
    """

    def __init__(
        self,
        groups: GroupDrafter,
        options: EngineOptions,
        link: Link | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.options, self.link = options, link
        self.counts = DraftCounts()
        self.lengths = DraftLengths(BudgetConfig(options.rule, options.max_draft))
        self._groups, self._clock = groups, clock
        self._drafting = [DraftOptions(n, min_score=options.min_score) for n in range(options.max_draft + 1)]
        self._live: dict[str, _Live] = {}
        self._news: deque[Update] = deque()
        self._used: dict[str, float] = {}
        self._flushed = self._ended = clock()
        self._stale = False

    def new_weights(self) -> None:
        """The policy has changed: what the old one said is forgotten before the next draft."""
        self._stale = True

    def step(
        self,
        request_ids: Sequence[str],
        sampled: Sequence[Sequence[int]],
        totals: Sequence[int],
        prompts: Sequence[int],
        token_ids: NDArray[np.int32],
        verified: Mapping[str, Sequence[int]],
        scheduled: int,
        limit: Callable[[str], int],
    ) -> list[list[int]]:
        """After a step of the engine: takes in what it sampled, returns a draft for each row.

        Args:
            request_ids: the engine's names of its running requests, by row.
            sampled: new tokens of each row; none for a prompt that is not complete.
            totals: tokens of each row, the new ones included.
            prompts: tokens of each row that the engine got as its prompt.
            token_ids: [rows, tokens] all of them.
            verified: the drafts that this step verified, by request; -1 is padding.
            scheduled: tokens that the step ran in all; with rows and drafts it tells whether it only decoded.
            limit: most tokens that a request may have, its prompt included.
        """
        start = self._clock()
        counts = self.counts
        counts.steps += 1
        forward = start - self._ended
        timed = any(name in self._live for name in request_ids)  # else the engine may have been idle
        for name, new in zip(request_ids, sampled):
            if new and (draft := verified.get(name)) and draft[0] >= 0:  # else padding of vLLM's
                accepted = len(new) - 1
                counts.drafts += 1
                counts.drafted += len(draft)
                counts.accepted += accepted
                self.lengths.verified(len(draft), accepted)
        drafted = sum(map(len, verified.values()))
        if timed and scheduled == len(request_ids) + drafted:
            self.lengths.ran(scheduled, drafted, forward)
        self._take_news()
        rows = self._take_sampled(request_ids, sampled, totals, prompts, token_ids, limit)
        out = self._draft(rows, len(request_ids))
        if start - self._flushed >= self.options.update_seconds:
            self._flush(set(request_ids))
        self._ended = self._clock()
        if rows:
            self.lengths.drafted(len(rows), self._ended - start)
        if timed:
            counts.timed_steps += 1
            counts.own_seconds += self._ended - start
            counts.step_seconds += self._ended - start + forward
        return out

    def _take_sampled(
        self,
        request_ids: Sequence[str],
        sampled: Sequence[Sequence[int]],
        totals: Sequence[int],
        prompts: Sequence[int],
        token_ids: NDArray[np.int32],
        limit: Callable[[str], int],
    ) -> list[tuple[int, _Live, int]]:
        """(row, request, most tokens to draft) of the rows with new tokens."""
        rows = []
        for row, new in enumerate(sampled):
            if not new:
                continue
            name, total = request_ids[row], totals[row]
            live = self._live.get(name)
            if live is None:
                live = self._live[name] = self._open(name, token_ids[row, : prompts[row]], limit(name))
            elif live.group not in self._groups:  # dropped to save memory
                self._groups.open(live.group, token_ids[row, : live.prompt])
                live.held, live.fresh = 0, array("i")
            response = total - live.prompt
            seen = live.held + len(live.fresh)
            if seen + len(new) == response:
                tokens = array("i", new)
            else:  # the request came with a part of its response, from another instance or before new weights
                tokens = array("i", token_ids[row, live.prompt + seen : total].tolist())
            live.fresh.extend(tokens)
            if self.link is not None:
                have = live.sent + len(live.pending)
                live.pending.extend(
                    tokens
                    if have + len(tokens) == response
                    else array("i", token_ids[row, live.prompt + have : total].tolist())
                )
            rows.append((row, live, live.limit - total - 1))
        return rows

    def _open(self, name: str, prompt: NDArray[np.int32], limit: int) -> _Live:
        chunk = parse_chunk(name, prompt)
        before = len(prompt) - chunk.generated
        self._take_in()  # an earlier chunk of the same response may have left something
        self._groups.open(chunk.group, prompt[:before])
        self._used[chunk.group] = self._clock()
        held = self._groups.cursors(chunk.group).get(chunk.response, 0)
        return _Live(chunk.group, chunk.response, chunk.probe, before, limit, held)

    def _draft(self, rows: Sequence[tuple[int, _Live, int]], count: int) -> list[list[int]]:
        out: list[list[int]] = [[] for _ in range(count)]
        most = self.options.max_draft
        if self.options.adaptive:
            probes = sum(live.probe for _, live, _ in rows)
            high, low = self.lengths.next(probes, len(rows) - probes)
        else:
            high = low = most
        if not high and not low:
            return out
        self._take_in()
        wanted = [
            (row, live, length)
            for row, live, room in rows
            if (length := min(high if live.probe else low, room)) > 0
        ]
        drafts = self._groups.drafts(
            [(live.group, live.response, self._drafting[n]) for _, live, n in wanted]
        )
        for (row, _, length), draft in zip(wanted, drafts):
            out[row] = draft.tokens
            self.lengths.made.record(length, len(draft.tokens))
        return out

    def _take_in(self) -> None:
        """Puts what the requests have sampled into the index: many tokens at once cost a tenth of one by one, so it
        waits until a draft is wanted, or the next flush."""
        for live in self._live.values():
            if live.fresh and live.group in self._groups:
                live.held = self._groups.append(live.group, live.response, live.fresh)
                live.fresh = array("i")

    def _take_news(self) -> None:
        """What the draft server sent, a bounded part of it; and forgets everything if that is what it says."""
        if self.link is not None:
            void, news = self.link.take()
            self._stale |= void
            self._news.extend(news)
        if self._stale:
            # Requests that go on are taken in again from the engine's own rows.
            self._stale = False
            self._groups.clear()
            self._live.clear()
            self._used.clear()
            self._news.clear()
        if self._news:  # which may have this engine's own tokens in it
            self._take_in()
        taken = 0
        while self._news and taken < NEWS_PER_STEP:
            try:
                taken += self._groups.extend(*self._news.popleft())
            except ValueError as error:  # the server serves another model, or is not what it says
                logger.warning("Seer: what the draft server sent is not taken: %s", error)
                self._news.clear()
        self.counts.received += taken

    def _flush(self, running: set[str]) -> None:
        """Hands what is new to the link; forgets requests that have left, and groups that nothing uses."""
        now = self._flushed = self._clock()
        self._take_in()
        updates: list[Update] = []
        cursors: dict[str, dict[str, int]] = {}
        for name, live in list(self._live.items()):
            if live.pending:
                updates.append((live.group, live.response, live.sent, live.pending))
                live.sent += len(live.pending)
                live.pending = array("i")
            if name not in running:
                del self._live[name]
            elif live.group in self._groups:
                cursors[live.group] = self._groups.cursors(live.group)
                self._used[live.group] = now
        full = self._groups.tokens > self.options.max_tokens
        for group in self._groups.groups:  # the one used longest ago first
            idle = now - self._used.get(group, now)
            if group not in cursors and (full or idle > self.options.ttl_seconds):
                self._groups.drop(group)
                full = self._groups.tokens > self.options.max_tokens
        self._used = {group: self._used.get(group, now) for group in self._groups.groups}
        if self.link is not None:
            # Nothing more is asked for while there is something to take in.
            self.link.offer(updates, {} if self._news else cursors, dataclasses.asdict(self.counts))
