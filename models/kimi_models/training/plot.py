"""The loss curve of a training run."""

from __future__ import annotations

import importlib.util
import os
from typing import Any


def require_matplotlib() -> None:
    """Raises ImportError with the package to install, before a run rather than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the loss plot needs matplotlib: pip install 'kimi-stack[bench]'")


def plot_losses(report: dict[str, Any], file: str | os.PathLike[str]) -> None:
    """Draws training loss against tokens, with the held-out results, from what `train` returned."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), dpi=100)
    seen, loss = zip(*report["train_loss"])
    axes.plot([n / 1e6 for n in seen], loss, linewidth=1)
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_title(
        f"held-out bits per byte: {report['held_out_bits_per_byte']:.3f}, "
        f"5-gram with back-off {report['ngram_bits_per_byte']:.3f}",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)
