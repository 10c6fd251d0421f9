"""One response made of several chunks: which requests may be divided, where a response ends, how parts are joined.

verl's server answers ``completed`` both when a response ended by itself and when its budget was used up, so the end
is read off the tokens (`ended`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Options whose effect on a token depends on its context alone, so that a chunk boundary changes nothing. The others
# (penalties on the output only, stop strings, min_tokens, grammars, ...) would start afresh in every chunk.
DIVISIBLE = frozenset(
    {
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logprobs", "seed", "ignore_eos",
        "stop_token_ids", "max_tokens", "max_new_tokens",
    }
)  # fmt: skip
_NEUTRAL: tuple[Any, ...] = (None, False, 0, 0.0, "", [], {}, ())
_LIMITS = ("max_tokens", "max_new_tokens")


def divisible(sampling_params: Mapping[str, Any]) -> bool:
    """Whether chunks of a request with these options sample what the whole request would."""
    return all(
        name in DIVISIBLE or (name == "n" and value == 1) or value in _NEUTRAL
        for name, value in sampling_params.items()
    )


def token_budget(
    sampling_params: Mapping[str, Any],
    prompt_tokens: int,
    *,
    prompt_length: int,
    response_length: int,
    max_model_len: int | None,
) -> int:
    """Most tokens of the whole response, by the rule of verl's server: the request's limit, else what the
    configured lengths leave, and no more than the model's context; at least 1.

    Raises:
        ValueError: the prompt fills the model's context.
    """
    if max_model_len is not None and prompt_tokens >= max_model_len:
        raise ValueError(
            f"prompt_ids has {prompt_tokens} tokens, which leaves none of the context of {max_model_len} "
            "(rollout.max_model_len) for a response"
        )
    limit = next((sampling_params[name] for name in _LIMITS if name in sampling_params), None)
    if limit is None:
        limit = min(response_length, prompt_length + response_length - prompt_tokens)
    if max_model_len is not None:
        limit = min(limit, max_model_len - prompt_tokens)
    return max(1, int(limit))


def chunk_params(
    sampling_params: Mapping[str, Any], max_tokens: int, generated: int, seed: int | None
) -> dict[str, Any]:
    """The options of one chunk. `seed` is that of the whole request; a later chunk gets its own (`chunk_seed`)."""
    params = {name: value for name, value in sampling_params.items() if name not in _LIMITS}
    params["max_tokens"] = max_tokens
    if seed is not None:
        params["seed"] = chunk_seed(seed, generated)
    return params


def chunk_seed(seed: int, generated: int) -> int:
    """Seed of the chunk that starts after `generated` tokens; the first keeps the request's.

    The same seed in every chunk would draw the same random numbers again.
    """
    return seed if generated == 0 else _hash(f"{seed}:{generated}")


def request_seed(base: int, request_id: str) -> int:
    """A request's own seed where runs must repeat: the same on whatever server it lands."""
    return _hash(f"{base}:{request_id}")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


def ended(
    tokens: Sequence[int], allowed: int, stop_ids: Collection[int], sampling_params: Mapping[str, Any]
) -> bool:
    """Whether a chunk of at most `allowed` tokens ended by a stop token and not by its budget.

    A chunk that is shorter than allowed did. One that used all of its budget did if its last token is a stop token:
    the request's own, or the model's unless ``ignore_eos``.
    """
    if len(tokens) < allowed:
        return True
    stops = set(sampling_params.get("stop_token_ids") or ())
    if not sampling_params.get("ignore_eos"):
        stops |= set(stop_ids)
    return tokens[-1] in stops


def stop_token_ids(*sources: Any) -> frozenset[int]:
    """The ids of several places that may hold none, one or a list (tokenizer, generation config)."""
    ids: set[int] = set()
    for source in sources:
        if source is not None:
            ids.update([source] if isinstance(source, int) else source)
    return frozenset(ids)


@dataclass
class Parts:
    """The chunks of one response, joined as they come.

    `extra` holds the first chunk's extra fields: what was cached of the prompt, the step of the weights.
    """

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] | None = None
    routed_experts: Any = None
    num_preempted: int | None = None
    stop_reason: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    chunks: int = 0

    def add(self, output: Any) -> None:
        """Appends a verl ``TokenOutput``.

        Raises:
            ValueError: the chunk's log-probabilities do not go with its tokens, only some chunks have them, or the
                chunk was sampled with other weights than those before it.
        """
        new = list(output.token_ids)
        self._same_weights(output.extra_fields)
        if output.log_probs is not None and len(output.log_probs) != len(new):
            raise ValueError(
                f"log_probs must have one value a token, got {len(output.log_probs)} of {len(new)}"
            )
        if self.chunks and new and (output.log_probs is None) != (self.log_probs is None):
            raise ValueError("log_probs must come with every chunk of a response or with none")
        if output.log_probs is not None:
            self.log_probs = [*(self.log_probs or []), *output.log_probs]
        if output.routed_experts is not None and new:
            self.routed_experts = _joined(self.routed_experts, output.routed_experts, len(new))
        if output.num_preempted is not None:
            self.num_preempted = (self.num_preempted or 0) + output.num_preempted
        self.tokens += new
        self.stop_reason = output.stop_reason
        self.chunks += 1

    def _same_weights(self, fields: Mapping[str, Any]) -> None:
        if not self.chunks:
            self.extra = dict(fields)
        elif fields.get("global_steps") != self.extra.get("global_steps"):
            raise ValueError(
                f"chunks of one response were sampled with weights of steps {self.extra.get('global_steps')} and "
                f"{fields.get('global_steps')}: all servers must have the same weights for a whole rollout"
            )


def _joined(before: Any, new: Any, new_tokens: int) -> Any:
    """A chunk's routing covers its prompt too, which an earlier chunk has told already: only its tail is new."""
    if before is None:
        return new
    import numpy as np

    return np.concatenate([before, new[-new_tokens:]])
