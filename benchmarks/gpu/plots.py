"""Times of all contenders, a panel an operation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.measure import Row


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """One panel an operation: microseconds over shapes, a line a contender; graphs where there are some."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ops = list(dict.fromkeys(row.op for row in rows))
    figure, axes = plt.subplots(len(ops), 1, figsize=(10, 3.2 * len(ops)), squeeze=False)
    for axis, op in zip(axes[:, 0], ops):
        of_op = [row for row in rows if row.op == op]
        shapes = list(dict.fromkeys(row.shape for row in of_op))
        for mode, style in (("eager", "o--"), ("graph", "s-")):
            for who in dict.fromkeys(row.who for row in of_op):
                points = [r for r in of_op if r.who == who and r.mode == mode]
                if points:
                    x = [shapes.index(r.shape) for r in points]
                    spread = [[r.seconds - r.low for r in points], [r.high - r.seconds for r in points]]
                    axis.errorbar(
                        x, [1e6 * r.seconds for r in points], yerr=[[1e6 * s for s in side] for side in spread],
                        fmt=style, capsize=3, label=f"{who}, {mode}",
                    )  # fmt: skip
        axis.set_yscale("log")
        axis.set_xticks(range(len(shapes)), shapes, rotation=20, ha="right", fontsize=7)
        axis.set_ylabel("us")
        axis.set_title(op, fontsize=9)
        axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
