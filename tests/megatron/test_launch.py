"""`--use-muonclip` in scripts that do not know of it: what start-up costs, what the flag does, what it refuses."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jobs
import pytest
from launcher import HERE, torchrun

PTH = "kimi_stack_megatron.pth"
SCRIPT, STANDIN = HERE / "mini_pretrain.py", HERE / "standin" / "pretrain.py"
FLAGS = [
    *("--num-layers=2", "--hidden-size=32", "--num-attention-heads=4", "--seq-length=16"),
    *("--max-position-embeddings=16", "--micro-batch-size=2", "--global-batch-size=8", "--train-iters=6"),
    *("--lr=0.02", "--min-lr=0.001", "--lr-decay-style=cosine", "--normalization=RMSNorm", "--swiglu"),
    *("--disable-bias-linear", "--tokenizer-type=NullTokenizer", "--vocab-size=63"),
    *("--make-vocab-size-divisible-by=64", "--transformer-impl=local", "--distributed-backend=gloo"),
    *("--use-cpu-initialization", "--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"),
    *(
        "--no-bias-gelu-fusion",
        "--no-bias-swiglu-fusion",
        "--no-bias-dropout-fusion",
        "--no-persist-layer-norm",
    ),
    *("--no-rope-fusion", "--position-embedding-type=rope", "--eval-iters=0", "--eval-interval=1000"),
    *("--log-interval=1", "--num-workers=0", "--bf16", "--attention-backend=unfused"),
    *("--dataloader-type=single", "--hidden-dropout=0", "--attention-dropout=0", "--ckpt-format=torch_dist"),
]
MUON = ["--use-muonclip", "--muonclip-tau", "0.05", "--muonclip-dtype", "float32"]


def installed() -> bool:
    """From a wheel, as users have it; a source tree on PYTHONPATH has no .pth file."""
    try:
        files = importlib.metadata.files("kimi-stack") or []
    except importlib.metadata.PackageNotFoundError:
        return False
    return any(str(f) == PTH for f in files)


needs_wheel = pytest.mark.skipif(
    not installed(), reason="needs kimi-stack installed from its wheel: nox -s megatron"
)


def python(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, check=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.stderr == "", done.stderr  # an error in a .pth file goes there, and Python goes on
    return done.stdout.strip()


LOADED = "import sys; print(sorted(m for m in sys.modules if m.split('.')[0] in ('megatron_kimi', 'torch', 'numpy')))"


@needs_wheel
def test_without_the_flag_nothing_is_imported() -> None:
    assert python(LOADED, "--use-something-else") == "[]"
    assert python(LOADED, MEGATRON_KIMI="0") == "[]"


@needs_wheel
@pytest.mark.parametrize(
    ("arguments", "environment"), [(["--use-muonclip"], {}), ([], {"MEGATRON_KIMI": "1"})]
)
def test_with_the_flag_only_a_hook_is_set(arguments: list[str], environment: dict[str, str]) -> None:
    assert python(LOADED, *arguments, **environment) == "['megatron_kimi', 'megatron_kimi.autoload']"


def test_start_up_costs_next_to_nothing() -> None:
    """The line that every Python start runs, without the flag: under 1 ms."""
    package = importlib.util.find_spec("megatron_kimi")
    assert package is not None and package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0])
    line = next(f for f in (folder.parent / PTH, folder / PTH) if f.is_file()).read_text()
    assert len(line.splitlines()) == 1 and line.startswith("import ")  # else Python takes it for a path
    code, took = compile(line, PTH, "exec"), []
    for _ in range(200):
        start = time.perf_counter()
        exec(code, {})
        took.append(time.perf_counter() - start)
    assert sorted(took)[100] < 1e-3


def losses(output: str) -> list[float]:
    return [float(x) for x in re.findall(r"lm loss: (\S+)", output)]


def reports(output: str) -> list[str]:
    return re.findall(r"\[MuonClip\] iteration .*", output)


real = pytest.mark.skipif(not jobs.newer(), reason="megatron.training 0.16 is in no wheel: see the stand-in")


@real
@needs_wheel
@pytest.mark.slow
def test_a_script_trains_saves_and_resumes(tmp_path: Path) -> None:
    """Six steps at once, and three after a restart from the third, by the flag and by the wrapper: the same bits."""
    save = ["--save", str(tmp_path), "--save-interval", "3"]
    first = torchrun(1, [str(SCRIPT), *FLAGS, *MUON, *save])
    assert first.returncode == 0, first.stdout[-5000:]
    assert "MuonClip: Muon for" in first.stdout
    assert "[MuonClip] iteration 6: largest attention logit" in first.stdout
    for line in ("weight_decay .* 0.1", "adam_beta2 .* 0.95"):
        assert re.search(line, first.stdout)
    whole = losses(first.stdout)
    assert len(whole) == 6 and whole[-1] < whole[0] - 0.3

    again = ["--load", str(tmp_path), "--ckpt-step", "3"]
    second = torchrun(1, ["-m", "megatron_kimi.launch", str(SCRIPT), *FLAGS, *MUON, *again])
    assert second.returncode == 0, second.stdout[-5000:]
    restarted = losses(second.stdout)
    # Megatron's first report after a restart is repeated in the mean of the second
    assert (restarted[0], restarted[2]) == (whole[3], whole[5])
    assert reports(second.stdout) == reports(first.stdout)[3:]


@real
@needs_wheel
@pytest.mark.slow
def test_two_processes_by_the_environment() -> None:
    """No flag on the command line; the distributed optimizer, overlapped."""
    sharded = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    done = torchrun(2, [str(SCRIPT), *FLAGS, *sharded, *MUON[1:]], {"MEGATRON_KIMI": "1"})
    assert done.returncode == 0, done.stdout[-5000:]
    assert "MuonClip: Muon for" in done.stdout
    assert len(losses(done.stdout)) == len(reports(done.stdout)) == 6


@real
@needs_wheel
@pytest.mark.slow
def test_refusals_come_before_training() -> None:
    refused = torchrun(1, [str(SCRIPT), *FLAGS, "--use-muonclip", "--muonclip-tau", "0"])
    assert refused.returncode != 0
    assert "tau must be positive" in refused.stdout and "--muonclip-tau" in refused.stdout
    assert "iteration" not in refused.stdout
    without = torchrun(1, [str(SCRIPT), *FLAGS, "--train-iters", "1"])
    assert without.returncode == 0, without.stdout[-5000:]
    assert "MuonClip" not in without.stdout


@pytest.mark.slow
def test_the_hook_on_a_stand_in_of_016() -> None:
    """The import hook on the names of 0.16's `megatron.training`, with the real core of either version below it."""
    hooked = torchrun(
        1, ["-m", "megatron_kimi.launch", str(STANDIN), "--use-muonclip", "--muonclip-tau", "0.05"]
    )
    assert hooked.returncode == 0, hooked.stdout[-5000:]
    assert "MuonClip: Muon for 18,432 of 22,688" in hooked.stdout
    assert "[MuonClip] iteration 3" in hooked.stdout
    assert "decay 0.1" in hooked.stdout
    plain = torchrun(1, [str(STANDIN)])
    assert plain.returncode == 0, plain.stdout[-5000:]
    assert "MuonClip" not in plain.stdout and "decay 0.01" in plain.stdout
    refused = torchrun(
        1, ["-m", "megatron_kimi.launch", str(STANDIN), "--use-muonclip", "--optimizer", "sgd"]
    )
    assert refused.returncode != 0 and "--optimizer must be adam" in refused.stdout


def test_the_wrapper_lists_the_flags() -> None:
    """Megatron 0.19's own --help fails on Python 3.11 and 3.12, on a stray per cent sign."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_kimi.launch", "--help"], capture_output=True, text=True, check=True
    )
    for flag in ("--use-muonclip", "--muonclip-tau", "--no-muonclip-nesterov", "--muonclip-adamw"):
        assert flag in done.stdout


def test_the_wrapper_says_what_it_needs() -> None:
    for arguments, words in (([], "usage"), (["no-such-script.py"], "no such file")):
        done = subprocess.run(
            [sys.executable, "-m", "megatron_kimi.launch", *arguments], capture_output=True, text=True
        )
        assert done.returncode != 0 and words in done.stderr
