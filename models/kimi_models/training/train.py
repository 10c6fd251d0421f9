"""Trains a tiny Kimi Linear on the standard library's text, on one machine, in minutes."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kimi_models.config import KimiLinearConfig
from kimi_models.reference import KimiLinearForCausalLM, MoE
from kimi_models.tiny import tiny_config
from kimi_models.tokenizer import BOS_ID, EOS_ID, save_tokenizer, train_tokenizer
from kimi_models.training.corpus import Document, fingerprint, load_corpus, shared_lines, shuffled, split
from kimi_models.training.evaluate import bits_per_byte
from kimi_models.training.ngram import KneserNey
from kimi_models.training.optim import MuonAdamW
from kimi_models.weights import load_weights, save_weights

# The routers' biases move by this much a step (DeepSeek-V3 report, 4.2).
BALANCE_RATE = 1e-3
NGRAM_ORDER = 5
# Steps whose gradient is not finite are left out; more than this many mean that the run has diverged.
MAX_SKIPPED = 10


@dataclass(frozen=True)
class Recipe:
    """What a run depends on, besides the text of the Python it runs under."""

    seed: int = 0
    tokens: int = 5_000_000
    batch: int = 4
    length: int = 1024
    lr: float = 1e-2
    table_scale: float = 3.0
    vector_scale: float = 0.2
    weight_decay: float = 0.1
    warmup: float = 0.01
    cooldown: float = 0.7
    vocab_size: int = 1024
    layers: int = 4
    hidden_size: int = 192
    experts: int = 8
    expert_size: int = 96
    dense_size: int = 512
    heads: int = 4
    head_dim: int = 32
    attn_res: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return max(1, self.tokens // (self.batch * self.length))

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, constant, then linear to zero over the last `cooldown` part."""
        done = (step + 1) / self.steps
        return self.lr * min(
            1.0, done / max(self.warmup, 1e-9), (1 + 1 / self.steps - done) / max(self.cooldown, 1e-9)
        )

    def config(self) -> KimiLinearConfig:
        """The config of the model this recipe trains."""
        return tiny_config(
            self.layers,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.dense_size,
            moe_intermediate_size=self.expert_size,
            num_experts=self.experts,
            num_attention_heads=self.heads,
            num_heads=self.heads,
            head_dim=self.head_dim,
            v_head_dim=48,
            attn_res_block_size=self.attn_res or None,
        )


def train(
    recipe: Recipe, out: str | os.PathLike[str], command: str, console: Console | None = None
) -> dict[str, Any]:
    """Trains, evaluates and writes a checkpoint folder; returns what is written to its training.json."""
    console = console or Console()
    out = Path(out)
    torch.manual_seed(recipe.seed)
    config = recipe.config()
    training, held_out = split(load_corpus())
    tokenizer = train_tokenizer((d.text for d in training), recipe.vocab_size)
    console.print(
        f"{len(training)} documents to train on, {len(held_out)} held out; {recipe.steps} steps of "
        f"{recipe.batch} x {recipe.length} tokens"
    )
    # bfloat16 products are three times as fast as float32 ones on a CPU that has them; the optimizer is float32.
    model = KimiLinearForCausalLM(config, dtype=torch.bfloat16)
    model.init_weights(recipe.seed)
    model.train()
    batches = _batches(_stream(training, tokenizer, recipe), recipe)
    began = time.perf_counter()
    losses = _fit(model, recipe, batches, console)
    seconds = time.perf_counter() - began

    config.save(out)
    save_weights(model, out, config)
    save_tokenizer(tokenizer, out, config.model_max_length)
    report = {
        "command": command,
        "recipe": asdict(recipe),
        "tokens": recipe.steps * recipe.batch * recipe.length,
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "text": {
            "training_bytes": sum(len(d.text.encode()) for d in training),
            "training_sha256": fingerprint(training),
            "held_out_sha256": fingerprint(held_out),
            "held_out_lines_also_in_training": round(shared_lines(training, held_out), 4),
        },
        "train_loss": losses,
    } | evaluate(out, training, held_out, console)
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def evaluate(
    folder: Path, training: list[Document], held_out: list[Document], console: Console
) -> dict[str, Any]:
    """Held-out bits per byte of the checkpoint as saved, and of the n-gram baselines on the same text."""
    from tokenizers import Tokenizer

    config = KimiLinearConfig.from_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = KimiLinearForCausalLM(config, dtype=torch.float32)
    load_weights(model, folder, config)
    total, each = bits_per_byte(model, tokenizer, held_out)
    sizes = {d.name: len(d.text.encode()) for d in held_out}

    def encode(docs: list[Document]) -> list[np.ndarray]:
        return [
            np.array(e.ids) for e in tokenizer.encode_batch([d.text for d in docs], add_special_tokens=False)
        ]

    def as_bytes(docs: list[Document]) -> list[np.ndarray]:
        return [np.frombuffer(d.text.encode(), np.uint8) for d in docs]

    tokens = KneserNey(encode(training), config.vocab_size, NGRAM_ORDER, pad=BOS_ID)
    token_bits = {d.name: tokens.bits(s) for d, s in zip(held_out, encode(held_out))}
    byte_model = KneserNey(as_bytes(training), 256, NGRAM_ORDER)
    byte_bits = sum(byte_model.bits(s) for s in as_bytes(held_out))
    result = {
        "held_out_bits_per_byte": round(total, 4),
        "ngram_bits_per_byte": round(sum(token_bits.values()) / sum(sizes.values()), 4),
        "byte_ngram_bits_per_byte": round(byte_bits / sum(sizes.values()), 4),
        "ngram": f"{NGRAM_ORDER}-gram, interpolated modified Kneser-Ney, same tokens and training text",
        "held_out": {
            d.name: {
                "bytes": sizes[d.name],
                "sha256": fingerprint([d]),
                "bits_per_byte": round(each[d.name], 4),
                "ngram_bits_per_byte": round(token_bits[d.name] / sizes[d.name], 4),
            }
            for d in held_out
        },
    }
    console.print(
        f"held-out bits per byte: model {result['held_out_bits_per_byte']}, {NGRAM_ORDER}-gram over tokens "
        f"{result['ngram_bits_per_byte']}, over bytes {result['byte_ngram_bits_per_byte']}"
    )
    return result


def _stream(training: list[Document], tokenizer: Any, recipe: Recipe) -> Iterator[torch.Tensor]:
    """One tensor of tokens an epoch, its documents in a new order each time."""
    encoded = [e.ids for e in tokenizer.encode_batch([d.text for d in training], add_special_tokens=False)]
    at = {d.name: i for i, d in enumerate(training)}
    epoch = 0
    while True:
        order = shuffled(training, recipe.seed + epoch)
        yield torch.tensor([t for d in order for t in (BOS_ID, *encoded[at[d.name]], EOS_ID)])
        epoch += 1


def _batches(stream: Iterator[torch.Tensor], recipe: Recipe) -> Iterator[torch.Tensor]:
    """[batch, length + 1] pieces of the stream in random order; every token of an epoch is a target once."""
    rng = torch.Generator().manual_seed(recipe.seed)
    rest: list[torch.Tensor] = []
    for tokens in stream:
        pieces = list(tokens.unfold(0, recipe.length + 1, recipe.length).unbind())
        rest += [pieces[i] for i in torch.randperm(len(pieces), generator=rng).tolist()]
        while len(rest) >= recipe.batch:
            yield torch.stack(rest[: recipe.batch])
            rest = rest[recipe.batch :]


def _fit(
    model: KimiLinearForCausalLM, recipe: Recipe, batches: Iterator[torch.Tensor], console: Console
) -> list[list[float]]:
    """The training loop; returns [tokens seen, mean loss in nats] points."""
    optimizer = MuonAdamW(
        model,
        model.config,
        recipe.weight_decay,
        table_scale=recipe.table_scale,
        vector_scale=recipe.vector_scale,
    )
    routers = [m for m in model.modules() if isinstance(m, MoE)]
    every = max(1, recipe.steps // 100)
    points: list[list[float]] = []
    window: list[float] = []
    skipped = 0
    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:.0f} tokens/s"), TimeRemainingColumn(),
    )  # fmt: skip
    began = time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=recipe.steps, loss=float("nan"), speed=0.0)
        for step in range(recipe.steps):
            batch = next(batches)
            logits = model(batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not torch.isfinite(norm):
                skipped += 1
                bad = [
                    n
                    for n, p in model.named_parameters()
                    if p.grad is not None and not p.grad.isfinite().all()
                ]
                console.print(
                    f"step {step}: loss {loss.item():.3f}, no finite gradient for {', '.join(bad[:4])}"
                )
                if skipped > MAX_SKIPPED:
                    raise FloatingPointError(
                        f"{skipped} steps without a finite gradient: lower the learning rate (--lr)"
                    )
                model.zero_grad(set_to_none=True)
                continue
            optimizer.step(recipe.rate(step))
            for router in routers:
                router.balance(BALANCE_RATE)
            window.append(loss.item())
            seen = (step + 1) * recipe.batch * recipe.length
            speed = seen / (time.perf_counter() - began)
            bar.update(task, advance=1, loss=window[-1], speed=speed)
            if (step + 1) % every == 0 or step + 1 == recipe.steps:
                points.append([seen, round(sum(window) / len(window), 4)])
                window = []
                if not console.is_terminal:
                    console.print(f"{seen} tokens, loss {points[-1][1]:.3f}, {speed:.0f} tokens/s")
                    sys.stdout.flush()
    return points
