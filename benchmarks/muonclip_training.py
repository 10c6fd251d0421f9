"""What MuonClip does to a training run: attention logits held at tau, and fewer steps than AdamW needs.

python -m benchmarks.muonclip_training [--quick] [--threads N] [--out FOLDER]

A small decoder (bytes, rotary attention without norms on query or key, SwiGLU) learns the standard library's text.

Logits, driven up in two ways, each with Muon alone and with MuonClip, same data and start: by a learning rate far
above the best one, and by first weights whose logits are beyond 1000 already, at an ordinary rate. A step's largest
logit is measured in its forward pass, thus before its own clip: after the clip of the step before and one update, on
tokens that no clip has seen. The second pair is measured again after each step, on the tokens of that step.
Steps: AdamW and MuonClip each with its best learning rate of a sweep; then MuonClip in shorter runs, each with its
own whole schedule, and the length at which it reaches AdamW's held-out loss, by interpolation; repeated with other
starts and data. Losses and steps are no timings; they repeat on one machine for one number of threads.

Each run is kept in FOLDER/muonclip_training.partial.jsonl as it ends, so that a stopped command goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Ratio, print_result, table
from kimi_kernels import qk_max_logits
from kimi_models.training.corpus import Document, load_corpus, shuffled, split
from megatron_kimi.optimizer import MuonClip, MuonClipConfig
from megatron_kimi.qk_clip import attention_factors, scale_rows_
from megatron_kimi.splits import Split, fused_qkv, row_factors, stacked

TAU = 100.0
PAPER_RATIO = 0.52  # FLOPs of Muon to AdamW's loss, Moonlight, section 3.3
STEPS = 200  # of the tuned runs
SEEDS = (0, 1)  # of the final comparison; rates are tuned with the first
SHOW_EVERY = 50  # steps


@dataclass(frozen=True)
class Run:
    """One training run."""

    optimizer: str  # "adamw", "muon" (no clip) or "muonclip"
    lr: float
    steps: int
    batch: int = 16
    length: int = 128
    warmup: int = 20
    cooldown: float = 0.6  # the last part of the run, in which the learning rate falls to zero
    seed: int = 0
    scale: float = 1.0  # of the first query and key weights
    again: bool = False  # also measure each step's logits after it

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        left = (self.steps - step) / self.steps
        return self.lr * min(1.0, (step + 1) / self.warmup, left / self.cooldown if self.cooldown else 1.0)


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.layout = fused_qkv(heads, heads, hidden // heads, hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.max_logits: Tensor | None = None

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, self.heads, -1).chunk(3, -1)
        q, k = _rotate(q, rotary), _rotate(k, rotary)
        if self.training:
            self.max_logits = qk_max_logits(q, k)
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, hidden))


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2 = (
            Attention(hidden, heads),
            nn.RMSNorm(hidden),
            nn.RMSNorm(hidden),
        )
        self.layout = stacked({"gate": ffn, "up": ffn}, hidden)
        self.fc1 = nn.Linear(hidden, 2 * ffn, bias=False)
        self.fc2 = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), rotary)
        gate, up = self.fc1(self.norm2(x)).chunk(2, -1)
        return x + self.fc2(F.silu(gate) * up)


class Decoder(nn.Module):
    def __init__(self, hidden: int = 128, layers: int = 4, heads: int = 4, ffn: int = 384) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads, ffn) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, 256, bias=False)
        self.width = hidden // heads
        for name, p in self.named_parameters():
            if p.dim() == 2:
                deep = name.endswith(("out.weight", "fc2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if deep else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        angles = torch.outer(
            torch.arange(tokens.shape[1]), 10000.0 ** (-torch.arange(0, self.width, 2) / self.width)
        )
        rotary = torch.polar(torch.ones_like(angles), angles)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, rotary)
        return self.head(self.norm(x))


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotary[:, None]).flatten(-2)


def as_bytes(documents: list[Document]) -> Tensor:
    text = "".join(d.text + "\n" for d in shuffled(documents, 0))
    return torch.from_numpy(np.frombuffer(text.encode(), np.uint8).astype(np.int64))


def sample(data: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(data) - length - 1, (count,), generator=generator)
    return torch.stack([data[s : s + length + 1] for s in starts.tolist()])


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Tensor, length: int, batches: int = 8) -> float:
    generator = torch.Generator().manual_seed(1)
    model.eval()
    losses = [loss_of(model, sample(data, 32, length, generator)).item() for _ in range(batches)]
    model.train()
    return sum(losses) / len(losses)


def build_optimizer(model: Decoder, run: Run) -> torch.optim.Optimizer:
    """torch's AdamW on everything, or MuonClip with Muon on the matrices inside the blocks; one decay for all."""
    inside = [p for p in model.blocks.parameters() if p.dim() == 2]
    ids = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in ids]
    if run.optimizer == "adamw":
        return torch.optim.AdamW([*inside, *rest], run.lr, betas=(0.9, 0.95), weight_decay=0.1)
    layouts: dict[Tensor, Split] = {}
    for block in model.blocks:
        layouts |= {block.attention.qkv.weight: block.attention.layout, block.fc1.weight: block.layout}
    return MuonClip(inside, rest, run.lr, MuonClipConfig(tau=TAU), layouts)


@torch.no_grad()
def clip(model: Decoder) -> None:
    for n, block in enumerate(model.blocks):
        attention = block.attention
        factors = attention_factors(attention.max_logits, TAU, f"layer {n}")
        scale_rows_(attention.qkv.weight, row_factors(attention.layout, factors))


def largest_logit(model: Decoder) -> float:
    """Of the last forward pass."""
    return round(max(block.attention.max_logits.max().item() for block in model.blocks), 2)


@torch.no_grad()
def scale_logits(model: Decoder, scale: float) -> None:
    """Multiply query and key weights by `scale`, thus logits by its square."""
    for block in model.blocks:
        attention = block.attention
        factors = {name: torch.full((attention.heads,), scale) for name in ("q", "k")}
        scale_rows_(attention.qkv.weight, row_factors(attention.layout, factors))


def train(run: Run, data: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Loss and largest logit of each step, and the held-out loss at the end; `data` is (training, held out)."""
    torch.manual_seed(run.seed)
    model = Decoder()
    scale_logits(model, run.scale)
    optimizer = build_optimizer(model, run)
    generator = torch.Generator().manual_seed(run.seed)
    losses, logits, after = [], [], []
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group["lr"] = run.rate(step)
        batch = sample(data[0], run.batch, run.length, generator)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if run.optimizer == "muonclip":
            clip(model)
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
        logits.append(largest_logit(model))
        if run.again:
            with torch.no_grad():
                model(batch[:, :-1])
            after.append(largest_logit(model))
        if (step + 1) % SHOW_EVERY == 0:
            print(f"  step {step + 1} of {run.steps}: loss {losses[-1]}", flush=True)
    held_out = round(held_out_loss(model, data[1], run.length), 4)
    return {**asdict(run), "loss": losses, "max_logit": logits, "logit_after": after, "held_out": held_out}


class Trainer:
    """Trains each run once: what is in `file` is taken from there, and each new run is added to it as it ends.

    Lines of another torch or another number of threads are left alone; their sums are not ours.
    """

    def __init__(self, data: tuple[Tensor, Tensor], file: Path) -> None:
        self.data, self.file = data, file
        self.setting = {"torch": torch.__version__, "threads": torch.get_num_threads()}

    def __call__(self, run: Run) -> dict[str, Any]:
        result = self._known(run)
        note = " (kept from before)" if result else ""
        if result is None:
            result = train(run, self.data)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**self.setting, "run": result}) + "\n")
        print(
            f"{run.optimizer} lr {run.lr:g}, {run.steps} steps, seed {run.seed}, scale {run.scale:g}: held-out loss "
            f"{result['held_out']}, largest logit {max(result['max_logit']):.0f}{note}",
            flush=True,
        )
        return result

    def _known(self, run: Run) -> dict[str, Any] | None:
        if not self.file.is_file():
            return None
        lines = (json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines())
        same = [
            line["run"] for line in lines if line.items() >= self.setting.items() and _is(line["run"], run)
        ]
        return same[0] if same else None


def _is(result: dict[str, Any], run: Run) -> bool:
    return all(result[name] == value for name, value in asdict(run).items())


def tune(start: Run, trained: Trainer) -> list[dict[str, Any]]:
    """Runs at learning rates a factor of two apart, until the best one has a worse one on both sides; best first."""
    runs = {factor: trained(replace(start, lr=start.lr * factor)) for factor in (1.0, 2.0, 0.5)}
    while True:
        best = min(runs, key=lambda factor: runs[factor]["held_out"])
        missing = [factor for factor in (best / 2, best * 2) if factor not in runs]
        if not missing:
            return sorted(runs.values(), key=lambda run: run["held_out"])
        for factor in missing:
            runs[factor] = trained(replace(start, lr=start.lr * factor))


def bracket(start: Run, target: float, trained: Trainer) -> list[dict[str, Any]]:
    """Runs like `start`, longest first: the last one falls short of the loss `target`, the one before reaches it."""
    runs = [trained(start)]
    while runs[0]["held_out"] > target:
        runs.insert(0, trained(replace(start, steps=round(runs[0]["steps"] / 0.7))))
    while runs[-1]["held_out"] <= target:
        runs.append(trained(replace(start, steps=round(0.7 * runs[-1]["steps"]))))
    return runs


def single(name: str, value: float, goal: float, better: Literal["higher", "lower"] = "lower") -> Ratio:
    return Ratio(name, value, value, value, goal, better)


def loss_ratio(pair: dict[str, dict[str, Any]]) -> float:
    return pair["muonclip"]["held_out"] / pair["muon"]["held_out"]


def longest_over(logits: Sequence[float]) -> int:
    """The most steps in a row with a logit over tau."""
    return max(
        (len(list(run)) for over, run in itertools.groupby(x > TAU for x in logits) if over), default=0
    )


def steps_to(target: float, runs: list[dict[str, Any]]) -> float:
    """Length of a run that ends at loss `target`, from those of `bracket`: linear in the logs of both."""
    long, short = next((a, b) for a, b in itertools.pairwise(runs) if b["held_out"] > target >= a["held_out"])
    fraction = math.log(short["held_out"] / target) / math.log(short["held_out"] / long["held_out"])
    return short["steps"] * (long["steps"] / short["steps"]) ** fraction


def draw(
    hot: list[dict],
    high: list[dict],
    adamw: list[dict],
    muonclip: list[dict],
    reached: list[tuple[dict, list[dict]]],
    path: Path,
) -> None:
    """Plot the runs with large logits, the sweeps, and for each seed (AdamW's run, MuonClip's of several lengths)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {"muon": "Muon alone", "muonclip": "MuonClip", "adamw": "AdamW"}
    figure, axes = plt.subplots(3, 2, figsize=(11, 11))
    sweep, reach = axes[2]
    titles = (f"Learning rate {hot[0]['lr']:g}", f"First weights of large logits, rate {high[0]['lr']:g}")
    for (logits, losses), pair, title in zip(axes, (hot, high), titles):
        for color, run in zip(("C0", "C1"), pair):
            steps, name = range(1, len(run["loss"]) + 1), names[run["optimizer"]]
            logits.plot(steps, run["max_logit"], color, label=name)
            if run["again"]:
                logits.plot(steps, run["logit_after"], color, linestyle="--", label=f"{name}, after the step")
            losses.plot(steps, run["loss"], color, label=f"{name}, held out {run['held_out']:.3f}")
        logits.axhline(TAU, color="k", linestyle=":", label="tau")
        logits.set(yscale="log", xlabel="step", ylabel="largest attention logit", title=title)
        losses.set(xlabel="step", ylabel="training loss (nats per byte)", title="The same two runs")
    for runs in (adamw, muonclip):
        ordered = sorted(runs, key=lambda run: run["lr"])
        sweep.plot(
            [r["lr"] for r in ordered],
            [r["held_out"] for r in ordered],
            "o-",
            label=names[runs[0]["optimizer"]],
        )
    sweep.set(
        xscale="log", xlabel="learning rate", ylabel="held-out loss (nats per byte)",
        title=f"Tuning, {adamw[0]['steps']} steps",
    )  # fmt: skip
    for n, (target, runs) in enumerate(reached):
        labels = ("AdamW", "MuonClip") if n == 0 else (None, None)
        reach.plot([target["steps"]], [target["held_out"]], "s", color="C0", label=labels[0])
        reach.axhline(target["held_out"], color="C0", linestyle=":", linewidth=0.8)
        reach.plot(
            [r["steps"] for r in runs], [r["held_out"] for r in runs], "o-", color="C1", label=labels[1]
        )
    reach.set(
        xlabel="steps of the whole run", ylabel="held-out loss", title="Each point is a run at its best rate"
    )
    for axis in axes.flat:
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short runs, no tuning: under 50 seconds")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; sums and so losses depend on it a little"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of the results and the plot",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = tuple(as_bytes(part) for part in split(load_corpus()))
    name = "muonclip_training_quick" if arguments.quick else "muonclip_training"
    trained = Trainer(data, arguments.out / f"{name}.partial.jsonl")
    small = {"batch": 8, "length": 64} if arguments.quick else {}
    length = 60 if arguments.quick else 150
    hot = {n: trained(Run(n, 0.2, length, **small)) for n in ("muon", "muonclip")}
    high = {n: trained(Run(n, 0.01, length, scale=60.0, again=True, **small)) for n in ("muon", "muonclip")}
    logits, largest = hot["muonclip"]["max_logit"], {n: max(run["max_logit"]) for n, run in hot.items()}
    high_after = {n: max(run["logit_after"]) for n, run in high.items()}
    ratios = [
        single("high rate: largest logit, Muon alone, to 1000", largest["muon"] / 1000, 1.0, "higher"),
        single("high rate: largest logit, MuonClip, to tau", largest["muonclip"] / TAU, 1.5),
        single("high rate: held-out loss, MuonClip to Muon alone", loss_ratio(hot), 1.01),
        single(
            "high start: largest logit of the first step, to 1000",
            high["muonclip"]["max_logit"][0] / 1000,
            1.0,
            "higher",
        ),
        single(
            "high start: least of a later step, Muon alone, to tau",
            min(high["muon"]["max_logit"]) / TAU,
            1.0,
            "higher",
        ),
        single(
            "high start: largest after a step on its tokens, MuonClip, to tau",
            high_after["muonclip"] / TAU,
            1.05,
        ),
        single("high start: held-out loss, MuonClip to Muon alone", loss_ratio(high), 1.01),
    ]
    reached: list[tuple[dict, list[dict]]] = []
    if arguments.quick:
        adamw, muonclip = (
            [trained(Run(n, lr, 30, **small))] for n, lr in (("adamw", 4e-3), ("muonclip", 2e-2))
        )
        quotient = muonclip[0]["held_out"] / adamw[0]["held_out"]
        ratios.append(single("held-out loss, MuonClip to AdamW, 30 steps, rates not tuned", quotient, 1.0))
    else:
        adamw, muonclip = (
            tune(Run(n, lr, STEPS), trained) for n, lr in (("adamw", 4e-3), ("muonclip", 2e-2))
        )
        quotients = []
        for seed in SEEDS:
            target = trained(Run("adamw", adamw[0]["lr"], STEPS, seed=seed))
            runs = bracket(Run("muonclip", muonclip[0]["lr"], STEPS, seed=seed), target["held_out"], trained)
            reached.append((target, runs))
            quotients.append(steps_to(target["held_out"], runs) / STEPS)
        ratios.append(
            Ratio(
                "steps to AdamW's final loss, MuonClip to AdamW, both tuned",
                statistics.median(quotients),
                min(quotients),
                max(quotients),
                PAPER_RATIO,
                "lower",
            )
        )

    everything = [
        *hot.values(),
        *high.values(),
        *adamw,
        *muonclip,
        *(r for target, runs in reached for r in (target, *runs)),
    ]
    distinct = list({tuple(run[f.name] for f in fields(Run)): run for run in everything}.values())
    table(
        "Runs: far above the best rate, from large logits, each sweep from best to worst, other seeds and lengths",
        ["run", "learning rate", "steps", "seed", "held-out loss", "largest logit"],
        [
            [
                r["optimizer"],
                f"{r['lr']:g}",
                str(r["steps"]),
                str(r["seed"]),
                f"{r['held_out']:.4f}",
                f"{max(r['max_logit']):.0f}",
            ]
            for r in distinct
        ],
    )
    draw(list(hot.values()), list(high.values()), adamw, muonclip, reached, arguments.out / f"{name}.png")
    over = [x / TAU for x in logits if x > TAU]
    print_result(
        "muonclip_training",
        ratios,
        arguments.out / f"{name}.json",
        threads=arguments.threads,
        logits={
            "steps": len(logits),
            "over_tau": len(over),
            "longest_over_tau": longest_over(logits),
            "largest": largest,
        },
        high_start={
            n: {
                "first": run["max_logit"][0],
                "later": [min(run["max_logit"][1:]), max(run["max_logit"][1:])],
                "after_a_step": high_after[n],
            }
            for n, run in high.items()
        },
        best_rates={runs[0]["optimizer"]: runs[0]["lr"] for runs in (adamw, muonclip)},
        runs=[
            {k: v for k, v in run.items() if k not in ("loss", "max_logit", "logit_after")}
            for run in distinct
        ],
    )
    trained.file.unlink()


if __name__ == "__main__":
    main()
