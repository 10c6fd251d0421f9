"""The index of a group's responses in plain Python: counts of all substrings, one by one. What is meant, not fast."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from verl_seer.drafting.types import (
    EMPTY_DRAFT,
    MAX_DEPTH,
    TOKEN_LIMIT,
    Draft,
    DraftOptions,
    TokenIds,
    check_depth,
    check_tokens,
)

Context = tuple[int, ...]


@dataclass
class _Candidate:
    score: float
    token: int
    parent: int
    depth: int
    context: Context


class ReferenceIndex:
    """Same calls and same results as `native.NativeIndex`, which has the documentation."""

    def __init__(self, vocab_size: int = TOKEN_LIMIT, max_depth: int = MAX_DEPTH) -> None:
        check_depth(max_depth, vocab_size)
        self.vocab_size, self.max_depth = vocab_size, max_depth
        self._sequences: dict[str, list[int]] = {}
        self._clear()

    def _clear(self) -> None:
        self._count: defaultdict[Context, int] = defaultdict(int)
        self._after: defaultdict[Context, set[int]] = defaultdict(set)

    def append(self, request_id: str, tokens: TokenIds) -> int:
        new = check_tokens(tokens, self.vocab_size).tolist()
        sequence = self._sequences.setdefault(request_id, [])
        for token in new:
            sequence.append(token)
            for length in range(1, min(self.max_depth, len(sequence)) + 1):
                substring = tuple(sequence[len(sequence) - length :])
                self._count[substring] += 1
                self._after[substring[:-1]].add(token)
        return len(sequence)

    def tokens(self, request_id: str) -> int:
        return len(self._sequences.get(request_id, []))

    def trim(self, keep: int) -> None:
        if keep < 0:
            raise ValueError(f"keep must not be negative, got {keep}")
        old, self._sequences = self._sequences, {}
        self._clear()
        for request_id, sequence in old.items():
            self.append(request_id, sequence[max(0, len(sequence) - keep) :])

    def occurrences(self, pattern: TokenIds) -> int:
        substring = tuple(check_tokens(pattern, self.vocab_size).tolist())
        if not 1 <= len(substring) <= self.max_depth:
            raise ValueError(f"pattern must have 1..{self.max_depth} tokens, got {len(substring)}")
        return self._count.get(substring, 0)

    def draft(self, request_id: str, options: DraftOptions) -> Draft:
        return self._draft(tuple(self._sequences.get(request_id, [])), options)

    def draft_context(self, context: TokenIds, options: DraftOptions) -> Draft:
        return self._draft(tuple(check_tokens(context, self.vocab_size).tolist()), options)

    def _continued(self, context: Context) -> Context:
        """The longest suffix that something has followed."""
        while context and not self._after.get(context):
            context = context[1:]
        return context

    def _shorter(self, context: Context) -> Context:
        """The longest suffix that occurs more often."""
        count = self._count[context]
        shorter = context[1:]
        while shorter and self._count[shorter] == count:
            shorter = shorter[1:]
        return shorter

    def _probability(self, context: Context, token: int, levels: int, smoothing: float) -> float:
        seen, total = self._count.get((*context, token), 0), self._count[context]
        shorter = self._shorter(context)
        if levels <= 1 or not shorter or smoothing == 0:
            return seen / total
        return (seen + smoothing * self._probability(shorter, token, levels - 1, smoothing)) / (
            total + smoothing
        )

    def _expand(
        self, context: Context, score: float, parent: int, depth: int, options: DraftOptions
    ) -> list[_Candidate]:
        found: dict[int, _Candidate] = {}
        at = context = self._continued(context)
        for _ in range(options.levels):
            at = self._continued(at)
            if not at or len(at) < options.min_match or len(found) >= options.max_paths:
                break
            for token in self._after[at]:
                p = score * self._probability(context, token, options.levels, options.smoothing)
                if token not in found and p >= options.min_score:
                    following = (*at, token)[-(self.max_depth - 1) :]
                    found[token] = _Candidate(p, token, parent, depth, following)
            at = self._shorter(at)
        return sorted(found.values(), key=lambda c: (-c.score, c.token))[: options.max_paths]

    def _draft(self, context: Context, options: DraftOptions) -> Draft:
        context = self._continued(context[-(self.max_depth - 1) :])
        if len(context) < options.min_match or options.token_limit == 0:
            return EMPTY_DRAFT
        tokens: list[int] = []
        parents: list[int] = []
        scores: list[float] = []
        paths = 0
        candidates = self._expand(context, 1.0, -1, 1, options)
        while candidates and len(tokens) < options.token_limit:
            best = max(candidates, key=lambda c: c.score)
            candidates.remove(best)
            if best.parent < 0 or best.parent in parents:  # not the first child of a token: a path of its own
                if paths == options.max_paths:
                    continue
                paths += 1
            tokens.append(best.token)
            parents.append(best.parent)
            scores.append(best.score)
            if best.depth < options.max_length:
                candidates += self._expand(best.context, best.score, len(tokens) - 1, best.depth + 1, options)
        return Draft(tokens, parents, scores, len(context))
