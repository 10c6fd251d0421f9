"""The committed checkpoints: small, of the published shape, served as they are, and better than a 5-gram."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from kimi_models import KimiLinearConfig
from kimi_models.reference import KimiLinearForCausalLM, generate
from kimi_models.tokenizer import BOS_ID
from kimi_models.training.corpus import fingerprint, load_corpus, split
from kimi_models.training.evaluate import bits_per_byte
from kimi_models.weights import load_weights

ROOT = Path(__file__).parents[2] / "models" / "checkpoints"
MAX_BYTES = 8_000_000
# "Clearly better" than the 5-gram: at least this part fewer bits.
MARGIN = 0.1


@pytest.fixture(scope="module", params=["tiny-linear", "tiny-attnres"])
def checkpoint(request):
    folder = ROOT / request.param
    config = KimiLinearConfig.from_pretrained(folder)
    model = KimiLinearForCausalLM(config, dtype=torch.float32).eval()
    load_weights(model, folder, config)
    return folder, config, model, Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_it_is_small_and_of_the_published_shape(checkpoint):
    folder, config, _, tokenizer = checkpoint
    assert sum(f.stat().st_size for f in folder.iterdir()) <= MAX_BYTES
    la = config.linear_attn_config
    assert len(la.kda_layers) == 3 * len(la.full_attn_layers) and not config.is_moe_layer(0)
    assert config.is_moe_layer(1) and config.num_shared_experts == 1 and config.mla_use_nope
    assert config.use_attn_res == (folder.name == "tiny-attnres")
    assert tokenizer.get_vocab_size() == config.vocab_size


def test_it_says_what_made_it(checkpoint):
    folder, _, _, _ = checkpoint
    report = json.loads((folder / "training.json").read_text())
    assert report["command"].startswith("kimi-stack models train-tiny ")
    assert {"seed", "tokens", "lr"} <= report["recipe"].keys() and report["versions"]["torch"]
    assert report["held_out_bits_per_byte"] < (1 - MARGIN) * report["ngram_bits_per_byte"]
    assert report["ngram_bits_per_byte"] < report["byte_ngram_bits_per_byte"]
    assert (folder / "loss.png").stat().st_size < 100_000


def test_it_beats_the_5_gram_on_held_out_modules_of_this_python(checkpoint):
    """Recomputed on a small module. Its text may differ between Python versions, its difficulty hardly does."""
    folder, _, model, tokenizer = checkpoint
    recorded = json.loads((folder / "training.json").read_text())["held_out"]
    _, held_out = split(load_corpus())
    known = [d for d in held_out if d.name in recorded and recorded[d.name]["bytes"] < 30_000]
    chosen = sorted(known, key=lambda d: len(d.text))[-1]
    got, _ = bits_per_byte(model, tokenizer, [chosen])
    assert got < recorded[chosen.name]["ngram_bits_per_byte"]
    if fingerprint([chosen]) == recorded[chosen.name]["sha256"]:
        assert got == pytest.approx(recorded[chosen.name]["bits_per_byte"], abs=0.005)


def test_it_writes_python(checkpoint):
    _, _, model, tokenizer = checkpoint
    prompt = "import os\n\ndef main():\n    for i in"
    ids = torch.tensor([[BOS_ID, *tokenizer.encode(prompt, add_special_tokens=False).ids]])
    text = tokenizer.decode(generate(model, ids, 12)[0].tolist())
    assert ":" in text[len(prompt) :], text


def test_transformers_reads_it(checkpoint):
    """Config, weights and tokenizer as any user would load them; AttnRes is not in transformers."""
    transformers = pytest.importorskip("transformers")
    folder, config, model, _ = checkpoint
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("def f(x):", return_tensors="pt").input_ids
    assert ids[0, 0] == BOS_ID and tokenizer.decode(ids[0, 1:]) == "def f(x):"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<s># User: hi\n# Assistant:"
    if config.use_attn_res:
        return
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=0)
