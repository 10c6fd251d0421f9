"""The training text: the standard library's sources and its language reference, split by whole modules."""

from __future__ import annotations

import hashlib
import os
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Not sources people read, or not in every Python, or (lib2to3) copies of other modules.
_SKIPPED = frozenset(
    [
        "__phello__",
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "tkinter",
        "turtledemo",
    ]
)
# A module is held out when the hash of its name divides by this.
HELD_OUT_ONE_IN = 17


@dataclass(frozen=True)
class Document:
    """One file or help topic: its name, the module it belongs to, and its text."""

    name: str
    module: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the document is kept for evaluation. Decided by the module's name alone."""
        if self.module == "topics":
            return False
        digest = hashlib.sha256(self.module.encode()).digest()
        return int.from_bytes(digest[:8]) % HELD_OUT_ONE_IN == 0


def load_corpus(root: Path | None = None) -> list[Document]:
    """Every document of this Python's standard library, sorted by name.

    `root` is the folder of the standard library (default: the running Python's). Files that are not UTF-8 and
    generated tables are left out. Raises FileNotFoundError where the sources are not installed.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    out = []
    for file in sorted(_sources(root)):
        parts = file.relative_to(root).parts
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            out.append(Document("/".join(parts), parts[0].removesuffix(".py"), text))
    if not out:
        raise FileNotFoundError(f"no Python sources under {root}: install the standard library's .py files")
    from pydoc_data.topics import topics

    out += [Document(f"topics/{name}", "topics", text) for name, text in sorted(topics.items())]
    return out


def _sources(root: Path) -> Iterator[Path]:
    for folder, inside, files in os.walk(root):
        inside[:] = [n for n in inside if n not in _SKIPPED and not n.startswith("config-")]
        yield from (
            Path(folder, n) for n in files if n.endswith(".py") and not n.startswith("_sysconfigdata")
        )


def split(corpus: list[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents. No module has files in both."""
    return [d for d in corpus if not d.held_out], [d for d in corpus if d.held_out]


def fingerprint(documents: list[Document]) -> str:
    """A SHA-256 of names and texts, to tell whether two Pythons carry the same text."""
    digest = hashlib.sha256()
    for d in documents:
        digest.update(f"{d.name}\0{len(d.text)}\0{d.text}\0".encode())
    return digest.hexdigest()


def shared_lines(training: list[Document], held_out: list[Document], min_length: int = 30) -> float:
    """The part of held-out bytes that stand in lines of `min_length` or more also found in the training text."""
    seen = {line.strip() for d in training for line in d.text.splitlines() if len(line.strip()) >= min_length}
    total = sum(len(d.text) for d in held_out)
    shared = sum(len(line) for d in held_out for line in d.text.splitlines() if line.strip() in seen)
    return shared / max(total, 1)


def shuffled(documents: list[Document], seed: int) -> list[Document]:
    """The documents in an order that depends on `seed` alone."""
    out = list(documents)
    random.Random(seed).shuffle(out)
    return out
