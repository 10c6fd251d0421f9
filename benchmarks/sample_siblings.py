"""Samples groups of sibling continuations from a committed tiny model, as traces for `benchmarks.seer_drafting`.

python -m benchmarks.sample_siblings [--out FILE] [--groups N]

Each group is one prompt, cut from the held-out modules of this Python's standard library, and 16 continuations
of it, drawn with `kimi_models.reference.generate` at each temperature. The text is what the checkpoint
writes: real in that the siblings agree and differ as samples of one trained model do, small in every other way.
"""

from __future__ import annotations

import argparse
import json
import lzma
import platform
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from kimi_models import KimiLinearConfig
from kimi_models.reference import KimiLinearForCausalLM, generate
from kimi_models.training.corpus import load_corpus, split
from kimi_models.weights import load_weights

ROOT = Path(__file__).parent.parent
CHECKPOINT = "models/checkpoints/tiny-linear"
TRACES = Path(__file__).parent / "data" / "siblings.xz"
GROUP_SIZE = 16
PROMPT_TOKENS = 128
RESPONSE_TOKENS = 384
TEMPERATURES = (1.0, 0.6)


def prompts(tokenizer: Tokenizer, count: int) -> np.ndarray:
    """[count, PROMPT_TOKENS] token ids, spread evenly over the held-out documents."""
    _, held_out = split(load_corpus())
    ids = [tokenizer.encode(document.text, add_special_tokens=False).ids for document in held_out]
    windows = [x[i : i + PROMPT_TOKENS] for x in ids for i in range(0, len(x) - PROMPT_TOKENS, PROMPT_TOKENS)]
    chosen = np.linspace(0, len(windows) - 1, count).round().astype(int)
    return np.array([windows[i] for i in chosen])


def sample(count: int) -> dict[float, np.ndarray]:
    """Temperature -> [count, GROUP_SIZE, PROMPT_TOKENS + RESPONSE_TOKENS] token ids."""
    folder = ROOT / CHECKPOINT
    config = KimiLinearConfig.from_pretrained(folder)
    model = KimiLinearForCausalLM(config, dtype=torch.float32)
    load_weights(model, folder, config)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    groups = prompts(tokenizer, count)
    out = {}
    for temperature in TEMPERATURES:
        drawn = []
        for index, prompt in enumerate(groups):
            batch = torch.tensor(prompt).repeat(GROUP_SIZE, 1)
            drawn.append(generate(model, batch, RESPONSE_TOKENS, temperature=temperature, seed=index).numpy())
            print(f"temperature {temperature}: group {index + 1}/{count}", flush=True)
        out[temperature] = np.stack(drawn)
    return out


def save(path: Path, drawn: dict[float, np.ndarray], command: str) -> None:
    """One xz file: a line of JSON, then the prompts (uint16, once a group) and the responses of every temperature."""
    first = next(iter(drawn.values()))
    header = {
        "command": command,
        "checkpoint": CHECKPOINT,
        "temperatures": list(drawn),
        "groups": first.shape[0],
        "group_size": GROUP_SIZE,
        "prompt_tokens": PROMPT_TOKENS,
        "response_tokens": RESPONSE_TOKENS,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    arrays = [first[:, 0, :PROMPT_TOKENS], *(x[:, :, PROMPT_TOKENS:] for x in drawn.values())]
    body = b"".join(np.ascontiguousarray(x, dtype="<u2").tobytes() for x in arrays)
    path.write_bytes(
        lzma.compress(json.dumps(header).encode() + b"\n" + body, preset=9 | lzma.PRESET_EXTREME)
    )


def load(path: Path = TRACES) -> tuple[dict, np.ndarray, dict[float, np.ndarray]]:
    """(header, prompts [groups, P], temperature -> responses [groups, group size, R]), as int32."""
    head, _, body = lzma.decompress(path.read_bytes()).partition(b"\n")
    header = json.loads(head)
    tokens = np.frombuffer(body, dtype="<u2").astype(np.int32)
    groups, size = header["groups"], header["group_size"]
    cut = groups * header["prompt_tokens"]
    shape = (len(header["temperatures"]), groups, size, header["response_tokens"])
    responses = dict(zip(header["temperatures"], tokens[cut:].reshape(shape)))
    return header, tokens[:cut].reshape(groups, -1), responses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=TRACES, help="file to write")
    parser.add_argument("--groups", type=int, default=24, help="prompts to sample (default 24)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save(
        options.out, sample(options.groups), f"python -m benchmarks.sample_siblings --groups {options.groups}"
    )
    print(f"wrote {options.out} ({options.out.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
