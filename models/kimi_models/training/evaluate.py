"""Bits per byte of a text under a model."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from kimi_models.reference import KimiLinearForCausalLM
from kimi_models.tokenizer import BOS_ID
from kimi_models.training.corpus import Document


@torch.inference_mode()
def bits_of_text(
    model: KimiLinearForCausalLM, tokenizer: Tokenizer, text: str, window: int = 1024, stride: int = 512
) -> float:
    """-log2 of the probability of `text` after a begin-of-sequence token.

    Each window of `window` tokens scores its last `stride` ones, so that all but the first of a document have at
    least `window - stride` tokens before them.
    """
    ids = torch.tensor([BOS_ID, *tokenizer.encode(text, add_special_tokens=False).ids])
    total, scored = 0.0, 1
    for end in range(min(window, len(ids)), len(ids) + stride, stride):
        end = min(end, len(ids))
        start = max(0, end - window)
        logits = model(ids[start : end - 1].unsqueeze(0))[0, scored - start - 1 :].float()
        total += float(F.cross_entropy(logits, ids[scored:end], reduction="sum"))
        scored = end
        if end == len(ids):
            break
    return total / math.log(2)


def bits_per_byte(
    model: KimiLinearForCausalLM, tokenizer: Tokenizer, documents: list[Document]
) -> tuple[float, dict[str, float]]:
    """(bits per byte over all documents, bits per byte of each)."""
    was = model.training
    model.eval()
    bits = {d.name: bits_of_text(model, tokenizer, d.text) for d in documents}
    model.train(was)
    sizes = {d.name: len(d.text.encode()) for d in documents}
    return sum(bits.values()) / sum(sizes.values()), {name: bits[name] / sizes[name] for name in bits}
