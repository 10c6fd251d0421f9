"""The index of a group's responses in C++ (`csrc/suffix_index.h`), loaded with ctypes.

Nothing is loaded at import. The library is the file next to the package, or the one that `KIMI_SEER_LIBRARY` names.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from array import array
from collections.abc import Sequence
from typing import Any

from kimi_kernels.native_files import NativeLibraryError, find_library
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

ABI_VERSION = 1
FILE_NAME = "libkimi_seer.so"
_BAD_TOKEN = -2


class _Options(ctypes.Structure):
    _fields_ = [
        ("max_length", ctypes.c_int32),
        ("max_tokens", ctypes.c_int32),
        ("max_paths", ctypes.c_int32),
        ("min_match", ctypes.c_int32),
        ("levels", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("smoothing", ctypes.c_double),
        ("min_score", ctypes.c_double),
    ]


@functools.lru_cache(maxsize=256)
def _options(options: DraftOptions) -> _Options:
    return _Options(
        options.max_length,
        options.token_limit,
        options.max_paths,
        options.min_match,
        options.levels,
        0,
        options.smoothing,
        options.min_score,
    )


@functools.cache
def _library() -> Any:
    path = find_library("verl_seer", FILE_NAME, "KIMI_SEER_LIBRARY")
    try:
        handle = ctypes.CDLL(str(path))
        version = handle.kimi_seer_abi_version()
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(f"cannot load {path}: {error}: rebuild it") from error
    if version != ABI_VERSION:
        raise NativeLibraryError(
            f"{path} has ABI version {version}, this package needs {ABI_VERSION}: rebuild it"
        )
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    for name, restype, argtypes in (
        ("new", pointer, [i32]),
        ("free", None, [pointer]),
        ("add_sequence", i64, [pointer]),
        ("append", i64, [pointer, i32, pointer, i64, i32]),
        ("trim", i64, [pointer, i64]),
        ("occurrences", i64, [pointer, pointer, i64]),
        ("bytes", i64, [pointer]),
        ("draft", i64, [pointer, pointer, i64, pointer, i64, *[pointer] * 5]),
        ("draft_context", i64, [pointer, pointer, i64, pointer, *[pointer] * 4]),
    ):
        function = getattr(handle, f"kimi_seer_{name}")
        function.restype, function.argtypes = restype, argtypes
    return handle


def unavailable() -> str | None:
    """Why the native library cannot be used here, or None when it can."""
    try:
        _library()
    except NativeLibraryError as error:
        return str(error)
    return None


def _checked(status: int) -> int:
    if status < 0:
        raise MemoryError("the group's index cannot grow: out of memory, or past 2^30 states; trim it")
    return status


class NativeIndex:
    """All substrings of a group's responses, with their counts and continuations.

    It grows token by token, for any number of requests in any order; no substring crosses from one request into
    another. Not safe for use from several threads at once.

    Args:
        vocab_size: token ids must be in [0, vocab_size).
        max_depth: longest substring that is counted, context and draft together.

    Memory: about 60 to 100 bytes a token.
    """

    def __init__(self, vocab_size: int = TOKEN_LIMIT, max_depth: int = MAX_DEPTH) -> None:
        check_depth(max_depth, vocab_size)
        self.vocab_size, self.max_depth = vocab_size, max_depth
        self._lib = _library()
        self._index = self._lib.kimi_seer_new(max_depth)
        if not self._index:
            raise MemoryError("no memory for a group's index")
        self._finalizer = weakref.finalize(self, self._lib.kimi_seer_free, self._index)
        self._sequences: dict[str, int] = {}
        self._lengths: dict[str, int] = {}

    def append(self, request_id: str, tokens: TokenIds) -> int:
        """Adds tokens to the end of a request's response, which starts empty; returns its length.

        ValueError for a token id outside [0, vocab_size); nothing has been added then.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None:
            check_tokens(tokens, self.vocab_size)
            sequence = _checked(self._lib.kimi_seer_add_sequence(self._index))
            self._sequences[request_id] = sequence
        try:
            # Through array, not numpy: for a few tokens numpy's checks cost more than the insert.
            new = tokens if isinstance(tokens, array) and tokens.typecode == "i" else array("i", tokens)
            address, count = new.buffer_info()
            length = self._lib.kimi_seer_append(self._index, sequence, address, count, self.vocab_size)
        except (TypeError, OverflowError):
            length = _BAD_TOKEN
        if length <= _BAD_TOKEN:
            check_tokens(tokens, self.vocab_size)  # says which token, and why
            raise ValueError(f"tokens must be one row of 32-bit integers, got {type(tokens).__name__}")
        self._lengths[request_id] = _checked(length)
        return length

    def tokens(self, request_id: str) -> int:
        """Tokens of a request that the index holds; 0 for a request that it has not seen."""
        return self._lengths.get(request_id, 0)

    def trim(self, keep: int) -> None:
        """Forgets all but the last `keep` tokens of every request. Costs as much as appending those again."""
        if keep < 0:
            raise ValueError(f"keep must not be negative, got {keep}")
        _checked(self._lib.kimi_seer_trim(self._index, keep))
        self._lengths = {request: min(keep, length) for request, length in self._lengths.items()}

    def occurrences(self, pattern: TokenIds) -> int:
        """How often a substring of 1 to max_depth tokens occurs."""
        substring = check_tokens(pattern, self.vocab_size)
        if not 1 <= len(substring) <= self.max_depth:
            raise ValueError(f"pattern must have 1..{self.max_depth} tokens, got {len(substring)}")
        return self._lib.kimi_seer_occurrences(self._index, substring.ctypes.data, len(substring))

    @property
    def bytes(self) -> int:
        """Memory that the index takes."""
        return self._lib.kimi_seer_bytes(self._index)

    def draft(self, request_id: str, options: DraftOptions) -> Draft:
        """What may follow the request's response so far. Empty for a request that the index has not seen."""
        return draft_batch([self], [request_id], [options])[0]

    def draft_context(self, context: TokenIds, options: DraftOptions) -> Draft:
        """What may follow the context, of which the last max_depth - 1 tokens count."""
        text = check_tokens(context, self.vocab_size)
        most = options.token_limit
        tokens, parents, scores = (
            (ctypes.c_int32 * most)(),
            (ctypes.c_int32 * most)(),
            (ctypes.c_double * most)(),
        )
        match = ctypes.c_int32()
        if most == 0:
            return EMPTY_DRAFT
        n = _checked(
            self._lib.kimi_seer_draft_context(
                self._index,
                text.ctypes.data,
                len(text),
                ctypes.byref(_options(options)),
                tokens,
                parents,
                scores,
                ctypes.byref(match),
            )
        )
        return Draft(tokens[:n], parents[:n], scores[:n], match.value)


def draft_batch(
    indices: Sequence[NativeIndex], request_ids: Sequence[str], options: Sequence[DraftOptions]
) -> list[Draft]:
    """`indices[i].draft(request_ids[i], options[i])` for every i, in one call of the library."""
    if not len(indices) == len(request_ids) == len(options):
        raise ValueError(
            f"indices, request_ids and options must be of one length, got {len(indices)}, {len(request_ids)} "
            f"and {len(options)}"
        )
    out = [EMPTY_DRAFT] * len(indices)
    same = {id(o): _options(o) for o in {id(o): o for o in options}.values()}  # a batch has few of them
    rows = []
    for i, (index, request, o) in enumerate(zip(indices, request_ids, options)):
        sequence, native = index._sequences.get(request), same[id(o)]
        if sequence is not None and native.max_tokens:
            rows.append((i, index._index, sequence, native))
    if not rows:
        return out
    n = len(rows)
    stride = max(native.max_tokens for native in same.values())
    int32s, doubles = ctypes.c_int32 * (n * stride), ctypes.c_double * (n * stride)
    tokens, parents, scores = int32s(), int32s(), doubles()
    lengths, matches = (ctypes.c_int32 * n)(), (ctypes.c_int32 * n)()
    _checked(
        _library().kimi_seer_draft(
            (ctypes.c_void_p * n)(*[row[1] for row in rows]),
            (ctypes.c_int32 * n)(*[row[2] for row in rows]),
            n,
            (_Options * n)(*[row[3] for row in rows]),
            stride,
            tokens,
            parents,
            scores,
            lengths,
            matches,
        )
    )
    for row, (i, *_) in enumerate(rows):
        if length := lengths[row]:
            at = row * stride
            span = slice(at, at + length)
            out[i] = Draft(tokens[span], parents[span], scores[span], matches[row])
        else:
            out[i] = Draft([], [], [], matches[row])
    return out
