"""Whose class serves, the short name, and the rows of upstream symbols."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_stack.compat import Hook, LiveSource, SnapshotSource, TreeSource, missing, snapshot
from vllm_kimi import compat, redirect, state_copy
from vllm_kimi.choice import choose_model, read_option


@pytest.mark.parametrize(
    ("device", "environment", "option", "expected"),
    [
        ("cpu", None, None, "ours"),
        ("cuda", None, None, "upstream"),
        ("xpu", None, None, "upstream"),
        ("cuda", "auto", "auto", "upstream"),
        ("cpu", "upstream", None, "upstream"),
        ("cuda", "ours", None, "ours"),
        ("cuda", None, "ours", "ours"),
        ("cuda", "auto", "ours", "ours"),
        ("cpu", None, "upstream", "upstream"),
        ("cuda", "ours", "ours", "ours"),
    ],
)
def test_rule(device: str, environment: str | None, option: str | None, expected: str) -> None:
    assert choose_model(device, environment, option) == expected


def test_rule_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="KIMI_STACK_VLLM_MODEL must be one of auto, ours, upstream, got 'mine'"):
        choose_model("cpu", "mine")
    with pytest.raises(ValueError, match="model is 'ours' but KIMI_STACK_VLLM_MODEL is 'upstream': remove one"):
        choose_model("cuda", "upstream", "ours")


def test_a_gpu_keeps_upstreams_class_until_ours_is_asked_for() -> None:
    program = """
from types import SimpleNamespace
from vllm.platforms import current_platform
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import ModelRegistry
type(current_platform).device_type = "cuda"
name = "KimiLinearForCausalLM"
whose = lambda: ModelRegistry.models[name].module_name
upstream = ModelRegistry.models[name]
from vllm_kimi import plugin, settings
plugin.register(); plugin.register()
assert ModelRegistry.models[name] is upstream, whose()
untouched = SimpleNamespace(additional_config={})
MODELS_CONFIG_MAP[name].verify_and_update_config(untouched)
assert vars(untouched) == {"additional_config": {}} and ModelRegistry.models[name] is upstream
settings.kimi_config = lambda model_config: 1 / 0
try:
    asked = SimpleNamespace(additional_config={"kimi_stack": {"model": "ours"}}, model_config=None)
    MODELS_CONFIG_MAP[name].verify_and_update_config(asked)
except ZeroDivisionError:
    assert whose() == "vllm_kimi.model"
    settings.register_class("upstream")
    print("RESULT", ModelRegistry.models[name] is upstream)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "RESULT True" in out.stdout, out.stderr[-3000:]


def test_option() -> None:
    assert read_option({"kimi_stack": {"model": "ours"}, "other": 1}) == "ours"
    assert read_option({}) is None
    with pytest.raises(ValueError, match="unknown entry 'modle'"):
        read_option({"kimi_stack": {"modle": "ours"}})
    with pytest.raises(ValueError, match="must be an object"):
        read_option({"kimi_stack": "ours"})


def test_every_row_holds_for_the_installed_version_and_0_33() -> None:
    """0.33 cannot run here: its facts were read from its wheel, by the command that the file names."""
    assert compat.problems() == []
    source = SnapshotSource(compat.SNAPSHOTS / "vllm-0.33.0.json")
    assert compat.problems(source.version, source) == []


def test_static_reading_agrees_with_the_live_symbols() -> None:
    root = Path(str(importlib.util.find_spec("vllm").origin)).parent.parent  # type: ignore[union-attr]
    program = (
        "import json; from kimi_stack.compat import LiveSource, missing; from vllm_kimi.compat import HOOKS\n"
        "print(json.dumps(missing(HOOKS, LiveSource())))"
    )
    live = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(live.stdout.splitlines()[-1]) == missing(compat.HOOKS, TreeSource(root)) == []


@pytest.mark.parametrize("version", ["0.31.1", "0.34.0", "1.0", "dev"])
def test_other_versions_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_kimi import plugin

    monkeypatch.setattr(compat, "installed_version", lambda: version)
    with pytest.raises(RuntimeError, match=rf"vLLM {version} is not supported.*\n.*Install vLLM 0\.32\.x or 0\.33\.x"):
        plugin.register()


def test_rows_name_what_is_gone(tmp_path: Path) -> None:
    package = tmp_path / "stack"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import *\nfrom .inner import f as g\n")
    (package / "inner.py").write_text(
        "class Base:\n    field: int\n    def __init__(self, a):\n        self.late = a\n"
        "class C(Base):\n    def m(self, x, *, y=1): ...\n"
        "def f(a, **kw): ...\nif True:\n    FLAG = 1\n"
    )
    good = [
        Hook("stack"), Hook("stack:C.m", ("x", "y")), Hook("stack:C.field"), Hook("stack:C.late"),
        Hook("stack:g", ("anything",)), Hook("stack.inner:FLAG"), Hook("stack.inner:Base", ("a",)),
    ]  # fmt: skip
    bad = [Hook("stack:gone", (), "lunch"), Hook("stack:C.m", ("z",)), Hook("stack.other:x"), Hook("stack:C.none")]
    source = TreeSource(tmp_path)
    assert missing(good, source) == []
    assert missing(bad, source) == [
        "stack:gone is missing (used for lunch)",
        "stack:C.m no longer takes z",
        "stack.other:x is missing",
        "stack:C.none is missing",
    ]
    facts = tmp_path / "facts.json"
    facts.write_text(snapshot([*good, *bad], source, version="1", command="-"))
    assert missing([*good, *bad], SnapshotSource(facts)) == missing([*good, *bad], source)
    sys.path.insert(0, str(tmp_path))
    try:
        assert missing([*good, *bad], LiveSource()) == missing([*good, *bad], source)
    finally:
        sys.path.remove(str(tmp_path))


def test_importing_the_plugin_imports_no_stack() -> None:
    program = (
        "import sys, vllm_kimi.plugin, vllm_kimi.compat, vllm_kimi.settings\n"
        "print([m for m in ('vllm', 'triton', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_short_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    published = "moonshotai/Kimi-Linear-48B-A3B-Instruct"
    monkeypatch.chdir(tmp_path)
    assert redirect.resolve("moonshotai/Kimi-Linear") == published
    assert redirect.resolve(published) == published
    (tmp_path / "moonshotai" / "Kimi-Linear").mkdir(parents=True)
    assert redirect.resolve("moonshotai/Kimi-Linear") == "moonshotai/Kimi-Linear", "a local folder stays itself"


def test_short_name_reaches_the_published_repository_through_vllm(tmp_path: Path) -> None:
    """In vLLM's own argument processing, offline, with the repository in the hub cache."""
    from kimi_models.tiny import tiny_config, write_tiny

    repository = tmp_path / "hub" / "models--moonshotai--Kimi-Linear-48B-A3B-Instruct"
    snapshot_folder = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    write_tiny(snapshot_folder, tiny_config(dtype="float32"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot_folder.name)
    program = (
        "from vllm.engine.arg_utils import EngineArgs\n"
        "c = EngineArgs(model='moonshotai/Kimi-Linear').create_engine_config()\n"
        "print('RESULT', c.model_config.model, c.model_config.hf_config.hidden_size)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert f"RESULT {snapshot_folder} 128" in out.stdout, out.stderr[-3000:]


def test_copy_of_states() -> None:
    import torch

    data = torch.arange(32, dtype=torch.uint8)
    expected = data.clone()
    expected[16:24], expected[2:6] = data[:8], data[:4]
    base = data.data_ptr()
    state_copy.copy_ranges(
        torch.tensor([base, base]), torch.tensor([base + 16, base + 2]), torch.tensor([8, 4], dtype=torch.int32)
    )
    assert torch.equal(data, expected)
