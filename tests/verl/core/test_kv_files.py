"""Blocks as files: named by all tokens up to their end, whole or absent, bounded."""

from __future__ import annotations

import os

import pytest

from verl_seer.kv_files import BlockFiles, block_keys


def test_a_key_names_everything_up_to_the_blocks_end():
    tokens = list(range(100))
    keys = block_keys(tokens, 16, b"model")
    assert len(keys) == len(set(keys)) == 6
    assert block_keys(tokens[:64], 16, b"model") == keys[:4]
    assert block_keys([1, *tokens[1:]], 16, b"model")[0] != keys[0]
    other = block_keys([*tokens[:20], 0, *tokens[21:]], 16, b"model")
    assert other[0] == keys[0] and not set(other[1:]) & set(keys)
    assert not set(block_keys(tokens, 16, b"another")) & set(keys)
    assert block_keys(tokens[:15], 16, b"") == []


def test_blocks_are_whole_or_absent(tmp_path):
    a, b = BlockFiles(tmp_path / "x", 1 << 20), BlockFiles(tmp_path / "x", 1 << 20)
    assert not a.has("k", 1) and not a.pin("k", 1, "t")
    a.write("k", 0, b"one")
    b.write("k", 0, b"two")
    assert b.pin("k", 1, "t") and b.pin("k", 1, "t") and not b.pin("k", 2, "u")
    assert bytes(b.take("k", 0, "t")) == b"one"
    with pytest.raises(RuntimeError, match="is gone: leave the folder of a KV pool to its engines"):
        b.take("k", 0, "t")
    assert b.has("k", 1) and not b.has("k", 2)
    (tmp_path / "x" / "tmp123").write_bytes(b"half")  # of a process that was killed
    assert not a.has("tmp123", 1)
    b.clear()
    assert not a.has("k", 1)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o700


def test_the_blocks_used_longest_ago_go(tmp_path):
    files = BlockFiles(tmp_path, 1000)
    for i in range(10):
        files.write(f"k{i}", 0, bytes(90))
        os.utime(files.path(f"k{i}", 0), (i, i))
    assert files.pin("k0", 1, "t") and files.pin("k1", 1, "t")
    os.utime(files.path("k1", 0), (1, 1))
    files.write("new", 0, bytes(280))
    files.sweep()
    assert sum(f.stat().st_size for f in tmp_path.glob("*.kv")) <= 1000
    assert len(files.take("k1", 0, "t")) == 90, "what is pinned stays"
    files.unpin(["k0", "k1"], 1, "t")
    assert not list(tmp_path.glob("*.pin"))
    assert files.has("k0", 1) and files.has("new", 1) and not files.has("k1", 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("relative", 5), "folder must be an absolute path, got 'relative'"),
        (("/tmp/x", 0), "max_bytes must be an integer of at least 1, got 0"),
        (("/tmp/x", 1.5), "max_bytes must be an integer of at least 1, got 1.5"),
    ],
)
def test_bad_arguments_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        BlockFiles(*arguments)
