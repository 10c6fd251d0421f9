"""The native index under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[3] / "plugins/verl_seer/csrc").glob("*.cpp"))
PROGRAM = """
import random
from verl_seer.drafting.native import NativeIndex, draft_batch
from verl_seer.drafting.types import DraftOptions
for seed in range(120):
    rng = random.Random(seed)
    vocabulary = rng.choice([1, 2, 5, 40])
    index = NativeIndex(vocabulary, rng.choice([2, 5, 64]))
    for _ in range(30):
        index.append(rng.choice("abc"), [rng.randrange(vocabulary) for _ in range(rng.randint(0, 40))])
        if rng.random() < 0.05:
            index.trim(rng.randint(0, 20))
        how = DraftOptions(max_length=rng.randint(0, 9), max_paths=rng.randint(1, 4), levels=rng.randint(1, 4))
        draft_batch([index] * 3, list("abc"), [how] * 3)
        index.draft_context([rng.randrange(vocabulary) for _ in range(rng.randint(0, 80))], how)
print("done")
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_no_invalid_access_and_no_undefined_behaviour(tmp_path: Path) -> None:
    library = tmp_path / "libkimi_seer.so"
    flags = ["-std=c++20", "-O1", "-g", "-fPIC", "-shared", "-fsanitize=address,undefined"]
    subprocess.run(
        ["g++", *flags, "-fno-sanitize-recover=all", *map(str, SOURCES), "-o", str(library)], check=True
    )
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    environment = {
        **os.environ,
        "KIMI_SEER_LIBRARY": str(library),
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks at exit
    }
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and run.stdout.strip() == "done", run.stderr[-3000:]
