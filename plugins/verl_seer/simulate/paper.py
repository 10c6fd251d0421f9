"""Figures of the Seer paper (arXiv 2511.14617) that a simulated rollout stands beside."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperFigures:
    """One workload's row.

    Args:
        baseline: (rollout, tail) seconds of the group-level baseline; what the presets are fitted to.
        seer: the same of Seer.
        ablation: throughput against the baseline as divided rollout, context scheduling and grouped speculative
            decoding are added in turn.
        accepted_length: tokens a step under Seer's drafting.
    """

    baseline: tuple[float, float]
    seer: tuple[float, float]
    ablation: tuple[float, float, float]
    accepted_length: float


FIGURES = {
    "Moonlight": PaperFigures((3910, 1817), (2181, 278), (1.41, 1.47, 1.90), 1.89),
    "Qwen2-VL-72B": PaperFigures((3957, 2301), (1922, 123), (1.42, 1.56, 2.04), 2.15),
    "Kimi-K2": PaperFigures((12202, 3144), (8267, 850), (1.16, 1.27, 1.53), 1.77),
}
ABLATION = ("divided", "divided+context", "seer")  # our policies in the order of PaperFigures.ablation
# The scheduling study (one workload): throughput and tail time against the baseline.
SCHEDULING_STUDY = {
    "group-level": (1.0, 1.0), "divided": (1.42, 0.79), "divided+context": (1.56, 0.11), "oracle": (1.63, 0.0),
}  # fmt: skip
GAIN_AIM = (1.74, 1.97)  # throughput of Seer against the baseline, first version's abstract
TAIL_AIM = (0.75, 0.93)  # part of the tail time that goes away, ibid.
