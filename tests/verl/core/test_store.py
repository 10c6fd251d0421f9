"""The draft server and its clients: nothing lost, nothing twice, bounded, gone with the weights."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_seer.drafting.reference import ReferenceIndex
from verl_seer.drafting.store import PROMPT_TAIL, Delta, DraftServer, GroupDrafter
from verl_seer.drafting.types import DraftOptions

PROMPT = list(range(20))


def client(**kw) -> GroupDrafter:
    return GroupDrafter(lambda: ReferenceIndex(50, 6), **kw)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), responses=st.integers(1, 4), instances=st.integers(1, 3))
def test_after_a_sync_every_client_holds_every_response_once(seed, responses, instances):
    """Requests grow on, and move between, several instances; updates are late and repeated; syncs come any time."""
    rng = random.Random(seed)
    server, clients = DraftServer(50), [client() for _ in range(instances)]
    truth = {f"r{i}": [] for i in range(responses)}
    for c in clients:
        c.open("g", PROMPT)
    for _ in range(30):
        r, c = rng.choice(list(truth)), rng.choice(clients)
        if c.cursors("g").get(r, 0) == len(truth[r]):  # this instance can go on with the request
            new = [rng.randrange(50) for _ in range(rng.randint(1, 4))]
            truth[r] += new
            c.append("g", r, new)
            held = server.fetch("g", {}, 0).tokens.get(r, [])
            start = rng.randint(0, len(held))
            server.append("g", r, start, truth[r][start:])
        c.sync("g", server.fetch("g", c.cursors("g"), c.epoch))
    whole = ReferenceIndex(50, 6)
    whole.append("prompt", PROMPT)
    for r, tokens in truth.items():
        if tokens:
            whole.append(r, [*PROMPT[-PROMPT_TAIL:], *tokens])
    for c in clients:
        c.sync("g", server.fetch("g", c.cursors("g"), c.epoch))
        assert c.cursors("g") == {r: len(t) for r, t in truth.items() if t}
        for r, tokens in truth.items():
            if tokens:
                assert c.draft("g", r, DraftOptions()) == whole.draft(r, DraftOptions())
        assert c.sync("g", server.fetch("g", c.cursors("g"), c.epoch)) == 0


def test_groups_are_kept_apart():
    c = client()
    c.open("g", PROMPT)
    c.open("h", PROMPT)
    c.append("g", "a", [40, 41, 42])
    c.append("h", "b", [40, 41])
    c.append("g", "c", [40, 41])
    assert c.draft("g", "c", DraftOptions()).tokens[:1] == [42]
    assert c.draft("h", "b", DraftOptions()).tokens == []
    assert c.draft("h", "c", DraftOptions()).tokens == c.draft("?", "c", DraftOptions()).tokens == []


def test_the_server_drops_the_group_used_longest_ago_when_it_is_full():
    server = DraftServer(50, max_tokens=10)
    for group in "abc":
        server.append(group, "r", 0, [1, 2, 3])
    server.fetch("a", {}, 0)
    server.append("d", "r", 0, [1, 2])
    assert server.groups == ["c", "a", "d"] and server.tokens == 8
    server.append("a", "r", 3, [1] * 30)  # one group alone is kept, whatever its size
    assert server.groups == ["a"] and server.tokens == 33


def test_groups_live_as_long_as_they_are_used():
    now = 0.0
    server = DraftServer(50, ttl=10, clock=lambda: now)
    server.append("a", "r", 0, [1])
    server.register_group("b", ttl_seconds=30)
    now = 8.0
    server.fetch("a", {}, 0)
    now = 17.0
    assert server.sweep() == []
    now = 20.0
    assert server.sweep() == ["a"] and server.tokens == 0
    now = 31.0
    assert server.sweep() == ["b"]


def test_new_weights_clear_the_server_and_then_the_clients():
    server, c = DraftServer(50), client()
    c.open("g", PROMPT)
    server.append("g", "r", 0, [1, 2, 3])
    assert c.sync("g", server.fetch("g", c.cursors("g"), c.epoch)) == 3
    server.new_weights()
    assert server.tokens == 0
    server.append("g", "r", 0, [4])
    assert c.sync("g", server.fetch("g", c.cursors("g"), c.epoch)) == 0
    assert c.groups == [] and c.epoch == 1
    c.open("g", PROMPT)
    assert c.sync("g", server.fetch("g", c.cursors("g"), c.epoch)) == 1


def test_a_client_forgets_old_tokens_and_old_groups():
    c = client(max_group_tokens=200, max_groups=2)
    c.open("g", PROMPT)
    for i in range(100):
        c.append("g", "r", [i % 50] * 5)
    assert c.cursors("g") == {"r": 500}  # positions go on counting
    assert c._groups["g"].held <= 200 and c._groups["g"].index.tokens("response r") <= 200
    c.open("h", PROMPT)
    c.open("i", PROMPT)
    assert c.groups == ["h", "i"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: DraftServer(50).append("g", "r", 1, [1]), r"position of 'r' must be in 0\.\.0"),
        (lambda: DraftServer(50).append("g", "r", -1, [1]), r"position of 'r' must be in 0\.\.0"),
        (lambda: DraftServer(50).append("g", "r", 0, [50]), r"tokens must be in \[0, 50\), got 50"),
        (lambda: DraftServer(50, max_tokens=0), "max_tokens must be at least 1"),
        (lambda: DraftServer(50, ttl=0), "ttl must be positive"),
        (lambda: DraftServer(50).register_group("g", -1), "ttl_seconds must be positive"),
        (lambda: client().append("g", "r", [1]), "group_id 'g' is not open"),
        (lambda: client(max_groups=0), "max_groups must be at least 1"),
        (lambda: client(max_group_tokens=0), "max_group_tokens must be at least 1"),
    ],
)
def test_bad_calls_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_a_bad_token_leaves_a_client_as_it_was():
    c = client()
    c.open("g", PROMPT)
    with pytest.raises(ValueError, match="got 99"):
        c.sync("g", Delta(0, {"r": array("i", [1, 99])}))
    assert c.cursors("g") == {} and c.draft("g", "r", DraftOptions()).tokens == []
    assert c.append("g", "r", [1]) == 1
