"""`kimi-stack models`: what it prints, and what it says when something is wrong."""

import pytest
from typer.testing import CliRunner

from kimi_models import KimiLinearConfig
from kimi_models.cli import app
from kimi_models.hub import INSTRUCT_REPO, FetchError, fetch, resolve_name


def run(*args):
    # A wide terminal, so that no figure is broken over two lines.
    return CliRunner().invoke(app, args, env={"COLUMNS": "160"})


def test_inspect_the_published_model_offline():
    result = run("inspect", "moonshotai/Kimi-Linear")
    assert result.exit_code == 0
    for figure in (
        "49.12 B",
        "3.48 B",
        "20 KDA, 7 MLA",
        "41.4 MiB",
        "74% saved",
        "7.9 KiB",
        "1,048,576 tokens",
    ):
        assert figure in result.output, figure
    assert result.output.count("KDA  ") >= 20


def test_tiny_writes_what_was_asked_and_inspect_reads_it(tmp_path):
    result = run(
        "tiny",
        str(tmp_path / "m"),
        "--layers",
        "8",
        "--attn-res",
        "2",
        "--gate-lower-bound",
        "-5",
        "--seed",
        "4",
    )
    assert result.exit_code == 0, result.output
    config = KimiLinearConfig.from_pretrained(tmp_path / "m")
    assert config.attn_res_block_size == 2 and config.linear_attn_config.gate_lower_bound == -5
    shown = run("inspect", str(tmp_path / "m"))
    assert shown.exit_code == 0
    assert "6 KDA, 2 MLA" in shown.output and "blocks of 2 decoder layers" in shown.output
    assert "lower-bounded at -5" in shown.output


def test_tiny_is_the_same_for_the_same_seed(tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run("tiny", str(tmp_path / name), "--seed", seed).exit_code == 0
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("inspect", "no/such/folder"), "neither a folder nor a checkpoint on this machine"),
        (("inspect", "."), "has no config.json"),
        (("tiny", "out", "--head-dim", "40"), "head_dim must be a multiple of 16 up to 256, got 40"),
        (("tiny", "out", "--top-k", "9"), "num_experts_per_token must be 1..num_experts (8), got 9"),
        (("tiny", "out", "--attn-res", "many"), "--attn-res must be none, full or a block size"),
        (("tiny", "out", "--gate-lower-bound", "1"), "gate_lower_bound must be"),
    ],
)
def test_mistakes_are_explained_on_stderr(args, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert result.exit_code == 2 and said in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_short_name_is_the_instruct_repository():
    assert resolve_name("moonshotai/Kimi-Linear") == INSTRUCT_REPO
    assert resolve_name("someone/else") == "someone/else"


def test_fetch_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FetchError, match=r"Kimi-Linear-48B-A3B-Instruct .*(network|offline)"):
        fetch("moonshotai/Kimi-Linear")
    with pytest.raises(FetchError, match="is not a repository name"):
        fetch("a/b/c/d")


def test_fetch_takes_no_pickles_and_no_code_unless_asked(monkeypatch, tmp_path):
    asked = {}

    def pretend(repo, **options):
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", pretend)
    assert fetch("moonshotai/Kimi-Linear", revision="main") == tmp_path
    assert asked["repo"] == INSTRUCT_REPO and asked["revision"] == "main"
    patterns = asked["allow_patterns"]
    assert "*.safetensors" in patterns and not any("bin" in p or ".py" in p or "pt" in p for p in patterns)
    fetch("moonshotai/Kimi-Linear", with_code=True)
    assert "*.py" in asked["allow_patterns"]


def test_help_teaches():
    for command in ("inspect", "tiny", "train-tiny", "fetch"):
        result = run(command, "--help")
        assert result.exit_code == 0 and "Example: kimi-stack models" in result.output
