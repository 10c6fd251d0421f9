"""Joining chunks: budgets, ends at the boundary, seeds, log-probabilities."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from verl_seer.chunks import (
    Parts,
    chunk_params,
    chunk_seed,
    divisible,
    ended,
    request_seed,
    stop_token_ids,
    token_budget,
)

LENGTHS = {"prompt_length": 100, "response_length": 50, "max_model_len": 128}


@pytest.mark.parametrize(
    ("params", "prompt", "want"),
    [
        ({}, 10, 50),
        ({}, 90, 38),  # the model's context ends
        ({}, 120, 8),
        ({"max_tokens": 7}, 10, 7),
        ({"max_new_tokens": 9}, 10, 9),
        ({"max_tokens": 70}, 100, 28),
        ({"max_tokens": 0}, 10, 1),
    ],
)
def test_the_budget_is_what_verls_server_would_take(params, prompt, want):
    assert token_budget(params, prompt, **LENGTHS) == want


def test_a_prompt_that_fills_the_context_is_refused():
    with pytest.raises(ValueError, match="prompt_ids has 128 tokens, which leaves none"):
        token_budget({}, 128, **LENGTHS)
    assert token_budget({}, 128, **{**LENGTHS, "max_model_len": None}) == 22


@pytest.mark.parametrize(
    ("params", "want"),
    [
        ({"temperature": 1.0, "top_p": 0.9, "top_k": -1, "repetition_penalty": 1.1, "logprobs": True}, True),
        ({"max_tokens": 5, "seed": 3, "stop_token_ids": [2], "n": 1, "stop": None, "min_tokens": 0}, True),
        ({"stop": ["\n"]}, False),
        ({"presence_penalty": 0.5}, False),
        ({"frequency_penalty": 0.0}, True),
        ({"min_tokens": 4}, False),
        ({"n": 2}, False),
        ({"structured_outputs": {"json": "{}"}}, False),
    ],
)
def test_only_requests_whose_options_do_not_look_back_are_divided(params, want):
    assert divisible(params) is want


@pytest.mark.parametrize(
    ("tokens", "params", "want"),
    [
        ([5, 6], {}, True),  # shorter than allowed
        ([5, 6, 7], {}, False),  # the budget is used up
        ([5, 6, 2], {}, True),  # and its last token is the model's stop
        ([5, 6, 2], {"ignore_eos": True}, False),
        ([5, 6, 9], {"stop_token_ids": [9], "ignore_eos": True}, True),
        ([2, 6, 7], {"ignore_eos": True}, False),
        ([], {}, True),
    ],
)
def test_where_a_response_ends(tokens, params, want):
    assert ended(tokens, 3, {2}, params) is want


def test_stop_ids_come_as_none_one_or_many():
    assert stop_token_ids(None, 3, [4, 5], (3,)) == {3, 4, 5}


def test_every_chunk_draws_other_numbers_and_a_run_repeats():
    seeds = [chunk_seed(11, generated) for generated in range(0, 4000, 8)]
    assert seeds[0] == 11 and len(set(seeds)) == len(seeds) and all(0 <= s < 2**31 for s in seeds)
    assert seeds == [chunk_seed(11, generated) for generated in range(0, 4000, 8)]
    assert request_seed(1, "a") != request_seed(1, "b") != request_seed(2, "b")
    assert chunk_params({"max_new_tokens": 99, "top_p": 0.5}, 8, 0, None) == {"max_tokens": 8, "top_p": 0.5}
    assert chunk_params({"seed": 11}, 8, 16, 11) == {"max_tokens": 8, "seed": chunk_seed(11, 16)}


def output(tokens, log_probs=None, preempted=None, **extra):
    return SimpleNamespace(
        token_ids=tokens,
        log_probs=log_probs,
        routed_experts=None,
        stop_reason="completed",
        num_preempted=preempted,
        extra_fields=extra,
    )


def test_parts_are_joined_in_order():
    parts = Parts()
    parts.add(
        output([1, 2], [-0.1, -0.2], 1, global_steps=4, min_global_steps=4, max_global_steps=4, cached=7)
    )
    parts.add(output([3], [-0.3], None, global_steps=4, min_global_steps=4, max_global_steps=4, cached=9))
    parts.add(output([4], [-0.4], 2, global_steps=4, min_global_steps=4, max_global_steps=4, cached=9))
    assert parts.tokens == [1, 2, 3, 4] and parts.log_probs == [-0.1, -0.2, -0.3, -0.4]
    assert parts.num_preempted == 3 and parts.chunks == 3
    assert parts.extra == {"global_steps": 4, "min_global_steps": 4, "max_global_steps": 4, "cached": 7}
    with pytest.raises(ValueError, match="weights of steps 4 and 5: all servers must have the same"):
        parts.add(output([5], [-0.5], global_steps=5))
    assert parts.tokens == [1, 2, 3, 4] and parts.chunks == 3


def test_parts_without_log_probs_have_none():
    parts = Parts()
    parts.add(output([1]))
    parts.add(output([2]))
    assert parts.log_probs is None
    with pytest.raises(ValueError, match="with every chunk"):
        parts.add(output([3], [-1.0]))
    with pytest.raises(ValueError, match="got 1 of 2"):
        parts.add(output([3, 4], [-1.0]))


def test_routing_of_later_chunks_keeps_only_its_tail():
    np = pytest.importorskip("numpy")
    parts = Parts()
    first, second = output([1, 2]), output([3])
    first.routed_experts, second.routed_experts = np.arange(5)[:, None], np.arange(100, 106)[:, None]
    parts.add(first)
    parts.add(second)
    assert parts.routed_experts.ravel().tolist() == [0, 1, 2, 3, 4, 105]
