"""The two benchmarks of MuonClip: how steps are counted, and that each command ends with its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
pytest.importorskip("matplotlib", reason="the benchmarks draw: nox -s muonclip")
from benchmarks.muonclip_training import Run, bracket, longest_over, steps_to, tune

ROOT = Path(__file__).parents[2]


class Law:
    """A trainer whose held-out loss follows a formula; `asked` has the runs in order."""

    def __init__(self, best_rate: float) -> None:
        self.best_rate, self.asked = best_rate, []

    def __call__(self, run: Run) -> dict[str, Any]:
        self.asked.append(run)
        away = max(run.lr / self.best_rate, self.best_rate / run.lr)
        return {"lr": run.lr, "steps": run.steps, "held_out": (run.steps / 200) ** -0.5 * away**0.1}


@pytest.mark.parametrize("best_rate", [0.004, 0.001, 0.03])
def test_a_sweep_ends_with_a_worse_rate_on_both_sides(best_rate):
    runs = tune(Run("adamw", 0.004, 200), Law(best_rate))
    best, rates = runs[0]["lr"], sorted(run["lr"] for run in runs)
    assert best == min(rates, key=lambda rate: max(rate / best_rate, best_rate / rate))
    assert rates[0] < best < rates[-1]


@pytest.mark.parametrize("target", [1.3, 1.0, 0.8])
def test_steps_to_a_loss_are_those_of_the_law(target):
    """Held-out loss is (steps / 200)^-1/2, so `target` takes 200 / target^2 steps; run lengths are whole steps."""
    runs = bracket(Run("muonclip", 0.01, 200), target, Law(0.01))
    assert runs[-1]["held_out"] > target >= runs[0]["held_out"]
    assert steps_to(target, runs) == pytest.approx(200 / target**2, rel=1e-9)


def test_steps_over_tau_are_counted_in_a_row():
    assert longest_over([99, 101, 102, 100, 103, 5]) == 2
    assert longest_over([1.0]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ratio", "bound"),
    [
        ("muonclip_training", "high start: largest after a step on its tokens, MuonClip, to tau", 1.5),
        ("muonclip", "bytes sent, 2 ranks, weights gathered in bfloat16: against AdamW", 1.25),
    ],
)
def test_the_quick_command_ends_with_its_result(tmp_path, name, ratio, bound):
    """Figures that do not depend on the machine's speed: counted bytes, and logits."""
    out = tmp_path if name == "muonclip_training" else tmp_path / "muonclip.json"
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.strip().splitlines()[-1]
    result = json.loads(last.removeprefix("RESULT "))
    assert 0 < result["ratios"][ratio]["value"] < bound
    file = out if out.is_file() else out / f"{name}_quick.json"
    assert json.loads(file.read_text())["ratios"] == result["ratios"]
