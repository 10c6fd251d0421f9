"""The trainer's parts: the text and its split, the n-gram baseline, the optimizer, and a run from end to end."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kimi_models.cli import app
from kimi_models.reference import KimiLinearForCausalLM
from kimi_models.tiny import tiny_config
from kimi_models.tokenizer import BOS_ID, MIN_VOCAB, train_tokenizer
from kimi_models.training.corpus import Document, fingerprint, load_corpus, shared_lines, split
from kimi_models.training.evaluate import bits_of_text, bits_per_byte
from kimi_models.training.ngram import KneserNey
from kimi_models.training.optim import MuonAdamW, orthogonalise
from kimi_models.training.train import Recipe


def test_the_corpus_holds_out_whole_modules():
    corpus = load_corpus()
    training, held_out = split(corpus)
    assert sum(len(d.text) for d in training) > 5_000_000
    assert 100_000 < sum(len(d.text) for d in held_out) < 1_000_000
    assert not {d.module for d in training} & {d.module for d in held_out}
    assert not any("test" in d.name.split("/") for d in corpus)
    assert shared_lines(training, held_out) < 0.05
    assert [d.name for d in corpus] == sorted(d.name for d in corpus if d.module != "topics") + [
        d.name for d in corpus if d.module == "topics"
    ]
    assert fingerprint(corpus) == fingerprint(load_corpus())


def test_shared_lines_counts_only_long_lines_seen_in_training():
    line = "x" * 40
    held = [Document("b", "b", f"{line}\nshort\n{'y' * 40}")]
    assert shared_lines([Document("a", "a", f"{line}\nshort")], held) == pytest.approx(40 / len(held[0].text))


def test_the_ngram_model_is_a_distribution():
    rng = np.random.default_rng(0)
    model = KneserNey([rng.integers(0, 7, n) for n in (50, 200, 3)], vocab_size=7, order=3)
    for context in ([1, 2], [6, 6], [0, 0]):
        before = model.bits(np.array(context))
        total = sum(2.0 ** -(model.bits(np.array([*context, w])) - before) for w in range(7))
        assert total == pytest.approx(1.0, abs=1e-9)


def test_the_ngram_model_equals_the_formulas_written_with_dictionaries():
    """Chen and Goodman (1999), modified Kneser-Ney, order 3, term by term."""
    rng = np.random.default_rng(1)
    vocab, order = 5, 3
    data = rng.choice(vocab, 400, p=[0.5, 0.2, 0.15, 0.1, 0.05])
    padded = [0] * (order - 1) + data.tolist()
    counts = {order: Counter(tuple(padded[i : i + order]) for i in range(len(data)))}
    for n in range(order - 1, 0, -1):
        counts[n] = Counter(g[1:] for g in counts[n + 1])

    def discount(n, c):
        n1, n2, n3, n4 = (sum(v == k for v in counts[n].values()) or 1 for k in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        raw = {1: 1 - 2 * y * n2 / n1, 2: 2 - 3 * y * n3 / n2, 3: 3 - 4 * y * n4 / n3}[min(c, 3)]
        return min(max(raw, 0.05), min(c, 3))

    def p(gram):
        n = len(gram)
        if n == 0:
            return 1 / vocab
        after = {g: c for g, c in counts[n].items() if g[:-1] == gram[:-1]}
        if not after:
            return p(gram[1:])
        total = sum(after.values())
        own = after.get(gram, 0)
        left = sum(discount(n, c) for c in after.values()) / total
        return (own - (discount(n, own) if own else 0)) / total + left * (p(gram[1:]) if n > 1 else 1 / vocab)

    fresh = rng.integers(0, vocab, 30)
    line = [0, 0, *fresh.tolist()]
    want = -sum(math.log2(p(tuple(line[i : i + order]))) for i in range(len(fresh)))
    assert KneserNey([data], vocab, order).bits(fresh) == pytest.approx(want, rel=1e-9)


def test_an_order_too_high_for_the_keys_is_refused():
    with pytest.raises(ValueError, match="below 2"):
        KneserNey([np.zeros(3, np.int64)], vocab_size=2048, order=6)


def test_orthogonalise_brings_singular_values_near_one():
    for shape in ((3, 24, 40), (2, 40, 24)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonalise(x).float())
        assert values.min() > 0.6 and values.max() < 1.3


def test_the_optimizer_treats_stacked_matrices_apart_and_leaves_no_parameter_out():
    config = tiny_config(attn_res_block_size=1)
    model = KimiLinearForCausalLM(config, dtype=torch.float32)
    model.init_weights(0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = MuonAdamW(model, config, weight_decay=0.0)
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=rng)
    optimizer.step(0.1)
    changed = {n: p - before[n] for n, p in model.named_parameters()}
    assert all(c.abs().max() > 0 for c in changed.values())
    assert all(p.grad is None for p in model.parameters())
    q, k, v = changed["layers.0.self_attn.qkv_proj.weight"].chunk(3)
    size = 0.1 * 0.2 * math.sqrt(128)
    for part in (q, k, v, changed["layers.1.mlp.experts_down"][5]):
        values = torch.linalg.svdvals(part / size)
        # A square random matrix has a few singular values too small for five steps to lift.
        assert values.quantile(0.05) > 0.6 and values.max() < 1.3


def test_bits_of_text_are_the_same_whatever_the_windows_while_one_holds_the_text():
    config = tiny_config(vocab_size=300)
    model = KimiLinearForCausalLM(config, dtype=torch.float64).eval()
    model.init_weights(0)
    tokenizer = train_tokenizer(["def f(x):\n    return x\n"] * 20, MIN_VOCAB + 10)
    text = "def g(y):\n    return y + 1\n"
    ids = torch.tensor([[BOS_ID, *tokenizer.encode(text, add_special_tokens=False).ids]])
    with torch.no_grad():
        want = -model(ids[:, :-1])[0].log_softmax(-1).gather(1, ids[0, 1:, None]).sum() / math.log(2)
    for window, stride in ((1024, 512), (64, 1), (64, 7)):
        assert bits_of_text(model, tokenizer, text, window, stride) == pytest.approx(float(want), rel=1e-5)
    total, each = bits_per_byte(model, tokenizer, [Document("a", "a", text), Document("b", "b", text * 3)])
    assert min(each.values()) <= total <= max(each.values())


def test_the_learning_rate_rises_holds_and_falls_to_zero():
    recipe = Recipe(tokens=100 * 4096, lr=1.0, warmup=0.1, cooldown=0.5)
    rates = [recipe.rate(i) for i in range(recipe.steps)]
    assert recipe.steps == 100 and rates[0] == pytest.approx(0.1)
    assert rates[9:50] == pytest.approx([1.0] * 41)
    assert rates[-1] == pytest.approx(0.02) and rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)


def test_train_tiny_learns_and_writes_a_whole_checkpoint(tmp_path, monkeypatch):
    """A few steps on the command line, on a twelfth of the text: the loss falls, and the folder says what made it."""
    pytest.importorskip("matplotlib")
    training, held_out = split(load_corpus())
    some = training[::12] + [d for d in held_out if len(d.text) < 10_000]
    monkeypatch.setattr("kimi_models.training.train.load_corpus", lambda: some)
    out = tmp_path / "tiny"
    command = ["train-tiny", str(out), "--tokens", "20000", "--length", "128", "--batch", "4", "--hidden-size", "64",
               "--expert-size", "32", "--vocab-size", "512", "--attn-res", "2", "--seed", "3"]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "training.json").read_text())
    assert report["train_loss"][-1][1] < report["train_loss"][0][1] - 0.5
    assert report["recipe"]["seed"] == 3 and report["tokens"] == 39 * 512
    assert 0 < report["ngram_bits_per_byte"] < report["byte_ngram_bits_per_byte"] < 3
    assert {f.name for f in out.iterdir()} == {
        "config.json", "loss.png", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json",
    }  # fmt: skip
