"""Upstream symbols that a plugin relies on, as data: check them live, in an unpacked wheel, or in a snapshot.

A plugin lists one `Hook` row per symbol it uses. `missing(rows, source)` says which rows a version of the stack
does not satisfy. Three sources answer: `LiveSource` imports the module, `TreeSource` parses the files of an
unpacked wheel without importing anything (so versions that cannot run here are checked too), and
`SnapshotSource` reads the facts that `snapshot` wrote earlier.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Hook:
    """A symbol of the stack that a plugin uses.

    Args:
        path: ``"package.module:attribute.attribute"``; ``"package.module"`` alone is the module.
        parameters: names that a call passes by keyword, or relies on; each must be accepted. Empty: existence.
        used_for: what breaks without it, a few words for the message.
    """

    path: str
    parameters: tuple[str, ...] = ()
    used_for: str = ""

    @property
    def module(self) -> str:
        return self.path.partition(":")[0]

    @property
    def attributes(self) -> tuple[str, ...]:
        return tuple(filter(None, self.path.partition(":")[2].split(".")))


@dataclass(frozen=True)
class Fact:
    """What a source knows of one symbol.

    `parameters` is None where the symbol is not callable or its signature cannot be read; `any_keyword` is set
    where it takes ``**kwargs``, so that a name cannot be ruled out.
    """

    exists: bool
    parameters: tuple[str, ...] | None = None
    any_keyword: bool = False


class Source(Protocol):
    """Something that answers for the symbols of one version of a stack."""

    def fact(self, hook: Hook) -> Fact: ...


def missing(hooks: Iterable[Hook], source: Source) -> list[str]:
    """One line for each row that `source` does not satisfy: the symbol, what is wrong, what it is used for."""
    lines = []
    for hook in hooks:
        fact = source.fact(hook)
        use = f" (used for {hook.used_for})" if hook.used_for else ""
        if not fact.exists:
            lines.append(f"{hook.path} is missing{use}")
        elif fact.parameters is not None and not fact.any_keyword:
            absent = [name for name in hook.parameters if name not in fact.parameters]
            if absent:
                lines.append(f"{hook.path} no longer takes {', '.join(absent)}{use}")
    return lines


class LiveSource:
    """Answers by importing. Importing a stack is slow and may touch devices: use it in the stack's process."""

    def fact(self, hook: Hook) -> Fact:
        try:
            value: Any = importlib.import_module(hook.module)
            for name in hook.attributes:
                value = _attribute(value, name)
        except (ImportError, AttributeError):
            return Fact(exists=False)
        return _signature_fact(value)


class TreeSource:
    """Answers by parsing the .py files under `root`, an unpacked wheel. Follows ``from x import y`` re-exports."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(
                f"root must be the folder of an unpacked wheel, got {root}: unzip the wheel first"
            )

    def fact(self, hook: Hook) -> Fact:
        if not hook.attributes:
            return Fact(exists=self._file(hook.module) is not None)
        found = self._resolve(hook.module, hook.attributes, depth=0)
        return Fact(exists=False) if found is None else _node_fact(found)

    def _file(self, module: str) -> Path | None:
        base = self.root.joinpath(*module.split("."))
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
        return None

    def _resolve(self, module: str, names: Sequence[str], depth: int) -> ast.AST | None:
        file = self._file(module)
        if file is None or depth > 8:
            return None
        scope = _parse(file)
        node = _lookup(scope.body, names[0])
        if node is None:
            for star in _star_imports(scope.body):
                target, _ = self._import_target(module, file, star, "*")
                found = self._resolve(target, names, depth + 1)
                if found is not None:
                    return found
        if isinstance(node, ast.ImportFrom):
            target, original = self._import_target(module, file, node, names[0])
            if self._file(f"{target}.{original}") is not None:
                return self._resolve(f"{target}.{original}", names[1:], depth + 1) if names[1:] else node
            return self._resolve(target, (original, *names[1:]), depth + 1)
        if node is None and self._file(f"{module}.{names[0]}") is not None:
            child = f"{module}.{names[0]}"
            return self._resolve(child, names[1:], depth + 1) if names[1:] else ast.Module([], [])
        for name in names[1:]:
            if isinstance(node, ast.ClassDef):
                node = self._member(module, node, name, depth)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                # An attribute of a value: its class is not known here, so existence of the value has to do.
                return node
            else:
                return None
        return node

    def _member(self, module: str, cls: ast.ClassDef, name: str, depth: int) -> ast.AST | None:
        """`name` in `cls` or, failing that, in the bases whose definition can be found."""
        node = _lookup(cls.body, name) or _instance_attribute(cls, name)
        if node is not None:
            return node
        for base in cls.bases:
            parts = ast.unparse(base).split("[")[0].split(".")
            found = self._resolve(module, (*parts, name), depth + 1)
            if found is not None:
                return found
        return None

    def _import_target(self, module: str, file: Path, node: ast.ImportFrom, name: str) -> tuple[str, str]:
        original = next(a.name for a in node.names if (a.asname or a.name) == name)
        if node.level == 0:
            return node.module or "", original
        package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
        package = package[: len(package) - (node.level - 1)]
        return ".".join([*package, *filter(None, [node.module])]), original


class SnapshotSource:
    """Answers from a file that `snapshot` wrote. A row that was not in the snapshot counts as missing."""

    def __init__(self, path: str | Path) -> None:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        self.version: str = content["version"]
        self._facts: dict[str, Any] = content["symbols"]

    def fact(self, hook: Hook) -> Fact:
        row = self._facts.get(hook.path)
        if row is None:
            return Fact(exists=False)
        parameters = row.get("parameters")
        return Fact(
            exists=row["exists"],
            parameters=None if parameters is None else tuple(parameters),
            any_keyword=row.get("any_keyword", False),
        )


def snapshot(hooks: Iterable[Hook], source: Source, *, version: str, command: str) -> str:
    """The facts of `source` about `hooks` as JSON text, with the version and the command that made it."""
    symbols: dict[str, dict[str, Any]] = {}
    for hook in sorted(hooks, key=lambda h: h.path):
        fact = source.fact(hook)
        row: dict[str, Any] = {"exists": fact.exists}
        if fact.parameters is not None:
            row["parameters"] = list(fact.parameters)
        if fact.any_keyword:
            row["any_keyword"] = True
        symbols[hook.path] = row
    return json.dumps({"version": version, "command": command, "symbols": symbols}, indent=1) + "\n"


def _attribute(value: Any, name: str) -> Any:
    """`value.name`, a submodule, or None for an annotated field: that one exists on instances only."""
    if hasattr(value, name):
        return getattr(value, name)
    if inspect.ismodule(value):
        return importlib.import_module(f"{value.__name__}.{name}")
    for cls in getattr(value, "__mro__", ()):
        if name in vars(cls).get("__annotations__", {}) or f"self.{name} = " in _class_source(cls):
            return None
    raise AttributeError(name)


def _class_source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


def _signature_fact(value: Any) -> Fact:
    if not callable(value):
        return Fact(exists=True)
    try:
        parameters = inspect.signature(value).parameters
    except (TypeError, ValueError):
        return Fact(exists=True)
    kinds = [p.kind for p in parameters.values()]
    return Fact(
        exists=True,
        parameters=tuple(parameters),
        any_keyword=inspect.Parameter.VAR_KEYWORD in kinds,
    )


@lru_cache(maxsize=256)
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def _lookup(body: Sequence[ast.stmt], name: str) -> ast.AST | None:
    """The statement that binds `name` in `body`, looking into if/try branches too."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in node.targets
        ):
            return node
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            return node
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            return node
        if isinstance(node, ast.Import) and any(
            (a.asname or a.name).split(".")[0] == name for a in node.names
        ):
            return node
        inner: list[ast.stmt] = []
        if isinstance(node, ast.If | ast.For | ast.While):
            inner = [*node.body, *node.orelse]
        elif isinstance(node, ast.Try):
            inner = [*node.body, *(s for h in node.handlers for s in h.body), *node.orelse, *node.finalbody]
        elif isinstance(node, ast.With):
            inner = list(node.body)
        if inner and (found := _lookup(inner, name)) is not None:
            return found
    return None


def _star_imports(body: Sequence[ast.stmt]) -> list[ast.ImportFrom]:
    return [n for n in body if isinstance(n, ast.ImportFrom) and any(a.name == "*" for a in n.names)]


def _instance_attribute(cls: ast.ClassDef, name: str) -> ast.AST | None:
    """The assignment to ``self.name`` in one of the methods of `cls`."""
    for node in ast.walk(cls):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AnnAssign) and any(
            isinstance(t, ast.Attribute) and t.attr == name and ast.unparse(t.value) == "self" for t in targets
        ):
            return node
    return None


def _node_fact(node: ast.AST) -> Fact:
    """The parameters of a function; those of ``__init__`` or of the fields for a class."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return _arguments_fact(node)
    if isinstance(node, ast.ClassDef):
        init = _lookup(node.body, "__init__")
        if isinstance(init, ast.FunctionDef):
            fact = _arguments_fact(init)
            return Fact(True, tuple(p for p in fact.parameters or () if p != "self"), fact.any_keyword)
        fields = tuple(
            s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
        )
        is_dataclass = any("dataclass" in ast.unparse(d) for d in node.decorator_list)
        # Fields of bases are not gathered: leave names open unless this class alone declares them.
        return Fact(True, fields, any_keyword=bool(node.bases)) if is_dataclass else Fact(True)
    return Fact(exists=True)


def _arguments_fact(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Fact:
    a = node.args
    names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return Fact(True, tuple(names), any_keyword=a.kwarg is not None)
