"""The GPU benchmark where there is no GPU: its accounting, over a timer that is a fake, and its command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
import torch
from benchmarks.gpu import attnres, kda, max_logit, muon, vision
from benchmarks.gpu.__main__ import chosen
from benchmarks.gpu.case import OURS, Absent, Case
from benchmarks.gpu.measure import check, run
from benchmarks.gpu.plots import plot
from benchmarks.gpu.timing import Deadline, Machine

ROOT = Path(__file__).resolve().parents[2]
MACHINE = Machine("a GPU that is not here", copy=1e12, gemm=1e14)


class FakeTimer:
    """What `Timer` does, without a GPU: a call's time is the number that it returns as its second result."""

    device = torch.device("cpu")

    def __init__(self):
        self.emptied = 0

    def captured(self, call):
        if call()[1] > 0.5:
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: (call()[0], call()[1] / 2)

    def in_turn(self, calls):
        return {who: [0.9 * call()[1], call()[1], 1.2 * call()[1]] for who, call in calls.items()}

    def host(self, call):
        return call()[1] / 10


def contender(seconds, value=1.0):
    return lambda: lambda: (torch.full((3,), value), seconds)


def case(shape="s", **more):
    makers = {OURS: contender(0.1), **more.pop("makers", {})}
    return Case("op", shape, lambda device: makers, bytes=10**10, flops=10**12, **more)


def test_rows_ratios_and_ceilings():
    report = run(
        [case(makers={"peer": contender(0.3)}, goals={"peer": 2.0}, floors={"copy": (5 * 10**10, 0.4)})],
        FakeTimer(), MACHINE, Deadline(60), lambda _: None,
    )  # fmt: skip
    assert not report.absent and not report.not_run
    ours = next(r for r in report.rows if r.who == OURS and r.mode == "eager")
    assert (ours.seconds, ours.low, ours.high) == pytest.approx((0.1, 0.09, 0.12))
    assert ours.of_copy == pytest.approx(0.1) and ours.of_gemm == pytest.approx(0.1)
    assert {(r.who, r.mode) for r in report.rows} == {(w, m) for w in (OURS, "peer") for m in ("eager", "graph")}
    ratios = {r.name: r for r in report.ratios}
    peer = ratios["op s, eager: peer over ours"]
    assert peer.value == pytest.approx(3.0) and peer.goal == 2.0 and peer.better == "higher"
    floor = ratios["op s, eager: copy over ours"]
    assert floor.value == pytest.approx(0.5) and floor.low == pytest.approx(0.05 / 0.12) and floor.goal == 0.4
    assert ratios["op s, graph: copy over ours"].value == pytest.approx(1.0)
    assert report.host == {"op s": {OURS: pytest.approx(0.01), "peer": pytest.approx(0.03)}}


def test_who_cannot_take_part_is_named_and_the_others_go_on():
    def missing():
        raise Absent("elsewhere: not installed")

    def broken():
        def call():
            raise ValueError("needs a power of two\nand more")

        return call

    makers = {"missing": missing, "broken": broken, "slow": contender(0.7)}
    report = run(
        [case(makers=makers), case("wrong", makers={"peer": contender(0.1, value=2.0)}), case("last")],
        FakeTimer(), MACHINE, Deadline(60), lambda _: None,
    )  # fmt: skip
    assert report.absent == {
        "missing, op s": "elsewhere: not installed",
        "broken, op s": "ValueError: needs a power of two",
        "slow as a graph, op s": "operation not permitted when stream is capturing",
    }
    assert report.not_run == ["op wrong: AssertionError: op wrong: peer differs from ours by 1 > 0.02"]
    assert {r.shape for r in report.rows} == {"s", "last"}
    assert json.loads(json.dumps(report.as_json()))["not_run"] == report.not_run


def test_nothing_begins_after_the_time_is_up():
    now = iter([0.0, 1.0, 61.0, 62.0])
    report = run(
        [case("a"), case("b"), case("c")], FakeTimer(), MACHINE, Deadline(60, lambda: next(now)), lambda _: None
    )
    assert {r.shape for r in report.rows} == {"a"}
    assert report.not_run == ["op b: the time was up", "op c: the time was up"]


def test_ours_failing_is_no_peer_missing():
    def broken():
        raise RuntimeError("ours is broken")

    with pytest.raises(RuntimeError, match="ours is broken"):
        check([Case("op", "s", lambda device: {OURS: broken}, 1)], torch.device("cpu"))
    report = run(
        [Case("op", "s", lambda device: {OURS: broken}, 1)], FakeTimer(), MACHINE, Deadline(9), lambda _: None
    )
    assert report.not_run == ["op s: RuntimeError: ours is broken"] and not report.rows


def test_what_is_asked_of_it_is_there():
    """The shapes of the table that users look for; those that tell most come first."""
    names = [f"{c.op} {c.shape}" for c in chosen("full", [])]
    assert len(names) == len(set(names))
    for tokens in (1024, 8192, 65536):
        assert {f"KDA forward H{h} T{tokens}" for h in (16, 32, 96)} <= set(names)
    assert {f"KDA decode N{n} H32" for n in (1, 8, 32, 128, 256)} <= set(names)
    assert {f"AttnRes n{n} d{d} T8192" for n in (1, 8, 10) for d in (2304, 7168)} <= set(names)
    quick = [f"{c.op} {c.shape}" for c in chosen("quick", [])]
    assert set(quick) <= set(names[:20])
    assert all("KDA" in f"{c.op}" for c in chosen("full", ["kda"]))
    for module in (kda, attnres, muon, max_logit, vision):
        assert all(c.bytes > 0 for c in module.cases("full"))


def test_plots_are_drawn(tmp_path):
    report = run(
        [case("a", makers={"peer": contender(0.3)}), case("b")], FakeTimer(), MACHINE, Deadline(60), lambda _: None
    )
    plot(report.rows, "title", tmp_path / "deep" / "gpu.png")
    assert (tmp_path / "deep" / "gpu.png").read_bytes()[:4] == b"\x89PNG"


def command(*arguments, **environment):
    paths = [str(ROOT / folder) for folder in ("kernels", "models", ".")]
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]), **environment},
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so only where there is no GPU")
def test_without_a_gpu_it_says_so_and_ends():
    done = command("--quick")
    assert done.returncode == 0, done.stderr
    assert "torch sees no GPU here" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith("RESULT ") and json.loads(last[7:])["machine"] == {"gpu": None}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--only", "moe"), "invalid choice: 'moe'"), (("--seconds", "0"), "must be above 0, got 0")],
)
def test_mistakes_are_explained(arguments, said):
    done = command(*arguments)
    assert done.returncode == 2 and said in done.stderr
