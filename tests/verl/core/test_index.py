"""The native index against the plain-Python one, and both against what is meant: counts, isolation, limits."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_seer.drafting.native import NativeIndex, draft_batch, unavailable
from verl_seer.drafting.reference import ReferenceIndex
from verl_seer.drafting.store import replay
from verl_seer.drafting.types import DraftOptions

INDICES = (NativeIndex, ReferenceIndex)
both = pytest.mark.parametrize("make", INDICES)


@pytest.fixture(autouse=True, scope="module")
def native():
    reason = unavailable()
    assert reason is None, reason


options = st.builds(
    DraftOptions,
    max_length=st.integers(0, 6),
    max_paths=st.integers(1, 4),
    max_tokens=st.none() | st.integers(0, 9),
    min_match=st.integers(1, 3),
    levels=st.integers(1, 4),
    smoothing=st.sampled_from([0.0, 0.5, 2.0]),
    min_score=st.sampled_from([0.0, 0.1, 0.4]),
)


@settings(max_examples=250, deadline=None)
@given(data=st.data(), vocab=st.sampled_from([1, 2, 3, 8]), depth=st.sampled_from([2, 3, 5, 12]))
def test_native_is_the_reference(data, vocab, depth):
    """The same counts, tokens, parents, matches and (to the bit) scores after any appends and trims."""
    native, reference = NativeIndex(vocab, depth), ReferenceIndex(vocab, depth)
    tokens = st.lists(st.integers(0, vocab - 1), max_size=8)
    for _ in range(data.draw(st.integers(1, 10))):
        request, new = data.draw(st.sampled_from("abc")), data.draw(tokens)
        assert native.append(request, new) == reference.append(request, new)
        if data.draw(st.integers(0, 9)) == 0:
            keep = data.draw(st.integers(0, 8))
            native.trim(keep)
            reference.trim(keep)
        how = data.draw(options)
        for r in "abc":
            assert native.draft(r, how) == reference.draft(r, how)
            assert native.tokens(r) == reference.tokens(r)
        context = data.draw(tokens)
        assert native.draft_context(context, how) == reference.draft_context(context, how)
        pattern = data.draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=depth))
        assert native.occurrences(pattern) == reference.occurrences(pattern)


@both
def test_a_requests_draft_is_the_draft_of_its_text(make):
    rng = np.random.default_rng(0)
    index, texts = make(20), {}
    for name in "ab":
        texts[name] = rng.integers(0, 6, 150)
        index.append(name, texts[name])
    for name in "ab":
        how = DraftOptions(max_paths=2)
        assert index.draft(name, how) == index.draft_context(texts[name], how)


@both
def test_counts_are_occurrences_within_requests_and_never_across(make):
    index = make(10)
    index.append("a", [1, 2, 3])
    index.append("b", [4, 1])
    index.append("a", [1])
    index.append("b", [2, 9])
    assert [index.occurrences(p) for p in ([1], [1, 2], [3, 1], [4, 1, 2, 9])] == [3, 2, 1, 1]
    # a ends with 1 and b starts with 4; neither of these stands in one request.
    assert index.occurrences([3, 4]) == index.occurrences([1, 4]) == 0


@both
def test_a_sibling_predicts_and_the_more_frequent_continuation_wins(make):
    index = make(100)
    index.append("one", [7, 8, 1, 2, 3])
    index.append("two", [7, 8, 5, 6])
    index.append("three", [7, 8, 5, 6])
    index.append("me", [7, 8])
    linear = index.draft("me", DraftOptions(max_length=2))
    assert linear.tokens == [5, 6] and linear.parents == [-1, 0] and linear.match == 2
    tree = index.draft("me", DraftOptions(max_length=3, max_paths=2))
    assert sorted(tree.paths()) == [[1, 2, 3], [5, 6]]
    assert replay(tree, [1, 2, 4]) == 2 and replay(linear, [1, 2]) == 0
    assert tree.scores == sorted(tree.scores, reverse=True)


@both
def test_limits_of_a_draft_are_kept(make):
    rng = np.random.default_rng(1)
    index = make(4, 16)
    index.append("a", rng.integers(0, 4, 400))
    for paths in (1, 2, 4):
        how = DraftOptions(max_length=5, max_paths=paths, max_tokens=7)
        d = index.draft("a", how)
        assert 0 < len(d.tokens) <= 7 and len(d.paths()) <= paths
        assert max(len(p) for p in d.paths()) <= 5
        assert all(parent < i for i, parent in enumerate(d.parents))
        assert len({(p, t) for p, t in zip(d.parents, d.tokens)}) == len(d.tokens)


@both
def test_nothing_is_drafted_where_nothing_is_known(make):
    index = make(10)
    assert index.draft("unseen", DraftOptions()).tokens == []
    index.append("a", [1, 2, 3])
    assert index.draft("a", DraftOptions()).tokens == []
    assert index.draft("a", DraftOptions(max_length=0)).tokens == []
    assert index.draft_context([], DraftOptions()).tokens == []
    assert index.draft_context([9], DraftOptions()).tokens == []


@both
@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([1, 2, -1], r"tokens must be in \[0, 10\), got -1 at index 2"),
        ([10], r"got 10 at index 0"),
        ([2**40], r"tokens must be in \[0, 10\)"),
        ([1.5], "one row of integers"),
        ([[1], [2]], "one row of integers"),
    ],
)
def test_bad_tokens_are_named_and_nothing_is_added(make, tokens, said):
    index = make(10)
    index.append("a", [1])
    with pytest.raises(ValueError, match=said):
        index.append("a", tokens)
    assert index.tokens("a") == 1 and index.append("a", [1]) == 2


@both
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda make: make(10, 1), "max_depth must be at least 2"),
        (lambda make: make(0), "vocab_size must be in 1"),
        (lambda make: make(10).trim(-1), "keep must not be negative"),
        (lambda make: make(10).occurrences([]), r"pattern must have 1\.\.64 tokens, got 0"),
        (lambda make: DraftOptions(max_length=-1), "max_length must be at least 0"),
        (lambda make: DraftOptions(max_paths=0), "max_paths must be at least 1"),
        (lambda make: DraftOptions(max_tokens=-2), "max_tokens must not be negative"),
        (lambda make: DraftOptions(smoothing=-1), "smoothing must not be negative"),
        (lambda make: DraftOptions(min_score=2), r"min_score must be in \[0, 1\]"),
    ],
)
def test_bad_arguments_are_named(make, call, said):
    with pytest.raises(ValueError, match=said):
        call(make)


def test_a_batch_of_drafts_is_the_drafts_one_by_one():
    rng = np.random.default_rng(2)
    indices = [NativeIndex(5) for _ in range(3)]
    for index in indices:
        index.append("a", rng.integers(0, 5, 80))
        index.append("b", rng.integers(0, 5, 80))
    names = ["a", "b", "nobody"]
    hows = [DraftOptions(max_length=3), DraftOptions(max_paths=3), DraftOptions()]
    assert draft_batch(indices, names, hows) == [i.draft(n, h) for i, n, h in zip(indices, names, hows)]
    with pytest.raises(ValueError, match="of one length, got 3, 2 and 3"):
        draft_batch(indices, names[:2], hows)


def test_memory_is_in_proportion_to_the_tokens_and_trimming_gives_it_back():
    """At most two states (20 bytes) and three edges (12, hashed 12) a token, and up to as much room to spare."""
    for period in (1, 7, 30_000):
        index = NativeIndex(30_000)
        index.append("a", np.arange(20_000) % period)
        full = index.bytes
        assert full < 250 * 20_000
        index.trim(100)
        assert index.bytes < full / 20 and index.tokens("a") == 100


def test_importing_loads_no_library_and_a_wrong_one_is_named(tmp_path):
    broken = tmp_path / "libkimi_seer.so"
    broken.write_bytes(b"not a library")
    program = (
        "import os, verl_seer, verl_seer.drafting.native as n, verl_seer.simulate.rollout\n"
        f"os.environ['KIMI_SEER_LIBRARY'] = {str(broken)!r}\n"
        "print(n.unavailable())\n"
        f"os.environ['KIMI_SEER_LIBRARY'] = {str(tmp_path / 'none.so')!r}\n"
        "print(n.unavailable())\n"
        "import sys; print([m for m in ('ray', 'verl', 'vllm', 'torch') if m in sys.modules])\n"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, second, third = out.stdout.strip().splitlines()
    assert "cannot load" in first and "rebuild it" in first
    assert "is not a file" in second
    assert third == "[]"
