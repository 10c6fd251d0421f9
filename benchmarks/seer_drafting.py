"""Grouped drafting: accepted lengths on real sibling texts, and what the index costs, against arctic-inference.

python -m benchmarks.seer_drafting [--quick] [--out FILE]

The traces are `benchmarks/data/siblings.xz`: groups of 16 samples of the committed tiny-linear model
(`benchmarks.sample_siblings` made them). A response is replayed with 0, 1, 5 or 15 of its siblings known in full: at
each step a draft of up to 8 tokens a path is made, and what agrees with the response is accepted. For a draft chosen
without looking at the response, this is what speculative sampling accepts on average. The accepted length
counts the model's own token too. These are counts, the same on every machine.

The peer is arctic-inference's SuffixDecodingCache (pip install arctic-inference==0.1.1 --no-deps), which vLLM's
`suffix` method uses, on the same texts with the same limits on drafted tokens: at vLLM's defaults (drafts no longer
than the match, least probability 0.1), and with both limits off. Its tree drafts have as many tokens as ours.

Times are processor time of one thread, per token inserted and per draft, medians of repeats taken in turn.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Ratio, machine, paired_ratio, print_result, table
from benchmarks.sample_siblings import load
from verl_seer.drafting.native import NativeIndex
from verl_seer.drafting.store import PROMPT_TAIL, replay
from verl_seer.drafting.types import Draft, DraftOptions

LENGTH = 8  # gamma_max of Seer's Algorithm 1
KNOWN = (0, 1, 5, 15)
PATHS = (1, 2, 4)
PAPER = {1: (1.70, 2.04, 2.32, 2.53), 2: (1.77, 2.14, 2.44, 2.69), 4: (1.85, 2.25, 2.59, 2.85)}
VOCABULARY = 1024

Drafter = Callable[[np.ndarray, list[np.ndarray], np.ndarray, int], tuple[int, int]]
"""(prompt, known siblings, response, paths) -> (steps, drafted tokens)."""


def _replayed(
    response: list[int], draft: Callable[[list[int]], Draft], add: Callable[[list[int]], Any]
) -> tuple[int, int]:
    at = steps = drafted = 0
    while at < len(response):
        guess = draft(response[:at])
        new = response[at : at + replay(guess, response[at:]) + 1]
        add(new)
        at += len(new)
        steps += 1
        drafted += len(guess.tokens)
    return steps, drafted


def ours(prompt: np.ndarray, siblings: list[np.ndarray], response: np.ndarray, paths: int) -> tuple[int, int]:
    index = NativeIndex(VOCABULARY)
    index.append("prompt", prompt)
    for i, sibling in enumerate(siblings):
        index.append(f"sibling {i}", np.concatenate([prompt[-PROMPT_TAIL:], sibling]))
    index.append("me", prompt[-PROMPT_TAIL:])
    options = DraftOptions(max_length=LENGTH, max_paths=paths)
    return _replayed(
        response.tolist(), lambda _: index.draft("me", options), lambda new: index.append("me", new)
    )


def arctic(limits: dict[str, float]) -> Drafter:
    from arctic_inference.suffix_decoding import SuffixDecodingCache

    def run(
        prompt: np.ndarray, siblings: list[np.ndarray], response: np.ndarray, paths: int
    ) -> tuple[int, int]:
        cache = SuffixDecodingCache(64)
        for i, sibling in enumerate(siblings):
            cache.start_request(i, prompt)
            cache.add_active_response(i, sibling.astype(np.int32))
        cache.start_request("me", prompt)
        start = prompt.tolist()

        def draft(before: list[int]) -> Draft:
            d = cache.speculate(
                "me",
                (start + before)[-64:],
                max_spec_tokens=LENGTH * paths,
                use_tree_spec=paths > 1,
                **limits,
            )
            return Draft(list(d.token_ids), list(d.parents), list(d.probs), d.match_len)

        return _replayed(response.tolist(), draft, lambda new: cache.add_active_response("me", new))

    return run


def accepted(
    drafter: Drafter, prompts: np.ndarray, responses: np.ndarray, groups: Sequence[int], targets: int
) -> dict[int, list[tuple[float, float]]]:
    """Paths -> for each number of known siblings (mean accepted length, drafted tokens a step)."""
    out: dict[int, list[tuple[float, float]]] = {}
    for paths in PATHS:
        out[paths] = []
        for known in KNOWN:
            steps = tokens = drafted = 0
            for g in groups:
                for target in range(targets):
                    siblings = [responses[g][(target + 1 + i) % len(responses[g])] for i in range(known)]
                    s, d = drafter(prompts[g], siblings, responses[g][target], paths)
                    steps, drafted, tokens = steps + s, drafted + d, tokens + responses.shape[2]
            out[paths].append((tokens / steps, drafted / steps))
    return out


def _seconds(run: Callable[[], None]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


def _our_costs(prompt: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
    """Microseconds per token inserted and per draft, tokens arriving one by one in all rows by turns."""
    index, options = NativeIndex(VOCABULARY), DraftOptions(max_length=LENGTH)
    names = [f"r{i}" for i in range(len(rows))]
    steps = [[row[i : i + 1] for row in rows.astype(np.int32)] for i in range(rows.shape[1])]

    def insert() -> None:
        for step in steps:
            for name, token in zip(names, step):
                index.append(name, token)

    def draft() -> None:
        for _ in range(50):
            for name in names:
                index.draft(name, options)

    return _seconds(insert) / rows.size * 1e6, _seconds(draft) / (50 * len(names)) * 1e6


def _our_bulk_costs(prompt: np.ndarray, rows: np.ndarray) -> float:
    """Microseconds per token inserted, a response in one call: what a sync does."""
    index = NativeIndex(VOCABULARY)

    def insert() -> None:
        for i, row in enumerate(rows.astype(np.int32)):
            index.append(str(i), row)

    return _seconds(insert) / rows.size * 1e6


def _arctic_costs(prompt: np.ndarray, rows: np.ndarray) -> tuple[float, float, float]:
    """The same three of the peer."""
    from arctic_inference.suffix_decoding import SuffixDecodingCache

    cache, bulk = SuffixDecodingCache(64), SuffixDecodingCache(64)
    steps = [[row[i : i + 1] for row in rows.astype(np.int32)] for i in range(rows.shape[1])]
    contexts = [row[-64:].astype(np.int32) for row in rows]
    for i in range(len(rows)):
        cache.start_request(i, prompt[:1])
        bulk.start_request(i, prompt[:1])

    def insert() -> None:
        for step in steps:
            for i, token in enumerate(step):
                cache.add_active_response(i, token)

    def draft() -> None:
        for _ in range(50):
            for i, context in enumerate(contexts):
                cache.speculate(i, context, max_spec_tokens=LENGTH)

    def insert_all() -> None:
        for i, row in enumerate(rows.astype(np.int32)):
            bulk.add_active_response(i, row)

    single = _seconds(insert) / rows.size * 1e6
    return single, _seconds(draft) / (50 * len(rows)) * 1e6, _seconds(insert_all) / rows.size * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer groups and repeats; under 50 seconds")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    header, prompts, responses = load()
    groups = range(0, header["groups"], 6 if options.quick else 1)
    targets = 2  # responses of a group that are replayed
    drafters: dict[str, Drafter] = {"ours": ours}
    try:
        drafters["arctic, vLLM's limits"] = arctic({"max_spec_factor": 1.0, "min_token_prob": 0.1})
        drafters["arctic, no limits"] = arctic({"max_spec_factor": 1e6, "min_token_prob": 0.0})
        peer = f"arctic-inference {importlib.metadata.version('arctic-inference')}"
    except ImportError:
        peer = None
        print("arctic-inference is not installed: no peer. pip install arctic-inference==0.1.1 --no-deps")

    lengths: dict[str, dict[str, dict[int, list[tuple[float, float]]]]] = {}
    ratios: list[Ratio] = []
    for temperature, texts in responses.items():
        found = {name: accepted(d, prompts, texts, groups, targets) for name, d in drafters.items()}
        lengths[str(temperature)] = found
        table(
            f"mean accepted length, temperature {temperature} (drafted tokens a step)",
            ["drafter, paths", *(f"{n} siblings" for n in KNOWN)],
            [
                [f"{name}, {paths}", *(f"{a:.3f} ({d:.1f})" for a, d in row)]
                for name, rows in found.items()
                for paths, row in rows.items()
            ],
        )
        grouped = [found["ours"][p][-1][0] / found["ours"][p][0][0] for p in PATHS]
        name = f"accepted length, 15 siblings against none, temperature {temperature}"
        ratios.append(Ratio(name, grouped[0], min(grouped), max(grouped), PAPER[1][-1] / PAPER[1][0]))
        if peer:
            against = [
                found["ours"][p][i][0] / max(found[n][p][i][0] for n in found if n != "ours")
                for p in PATHS
                for i in range(len(KNOWN))
            ]
            name = f"accepted length against the better arctic setting, temperature {temperature}"
            ratios.append(Ratio(name, statistics.median(against), min(against), max(against), 1.0))
    table(
        "the paper's table, for comparison of its shape (another model, other texts)",
        ["paths", *(f"{n} siblings" for n in KNOWN)],
        [[str(p), *(f"{x:.2f}" for x in row)] for p, row in PAPER.items()],
    )

    # Two prompts' groups in one index make it as large as a group of 32: 12,000 tokens.
    texts = responses[header["temperatures"][0]]
    times: dict[str, list[float]] = {}
    for repeat in range(3 if options.quick else 9):
        prompt, rows = prompts[repeat].astype(np.int32), np.concatenate([texts[repeat], texts[repeat + 1]])
        row = {"our insert": 0.0, "our draft": 0.0}
        row["our insert"], row["our draft"] = _our_costs(prompt, rows)
        row["our insert, in bulk"] = _our_bulk_costs(prompt, rows)
        if peer:
            single, draft, bulk = _arctic_costs(prompt, rows)
            row |= {"arctic insert": single, "arctic draft": draft, "arctic insert, in bulk": bulk}
        for name, value in row.items():
            times.setdefault(name, []).append(value)
    table(
        "microseconds of processor time, one thread, call from Python included",
        ["what", "median", "low", "high"],
        [[n, *(f"{v:.2f}" for v in (statistics.median(x), min(x), max(x)))] for n, x in times.items()],
    )
    if peer:
        for what in ("insert", "draft", "insert, in bulk"):
            name = f"{what}: arctic's time over ours"
            ratios.append(paired_ratio(name, times[f"arctic {what}"], times[f"our {what}"], 1.0))
    extra: dict[str, Any] = {
        "peer": peer,
        "traces": header,
        "accepted": lengths,
        "microseconds": {n: round(statistics.median(x), 3) for n, x in times.items()},
    }
    if options.out:
        body = {"machine": machine(), "ratios": {r.name: r.value for r in ratios}, **extra}
        options.out.write_text(json.dumps(body, indent=1) + "\n")
    print_result("seer_drafting", ratios, **extra)


if __name__ == "__main__":
    main()
