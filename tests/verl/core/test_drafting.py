"""An engine's drafting without vLLM: names, lengths, what an engine takes in, and the way to the draft server."""

from __future__ import annotations

import itertools
import random
import time
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_seer.budget import BudgetConfig, draft_budget
from verl_seer.drafting.engine import EngineDrafter, EngineOptions
from verl_seer.drafting.lengths import DraftLengths, MadeDrafts, StepTimes
from verl_seer.drafting.names import chunk_name, parse_chunk, response_name
from verl_seer.drafting.reference import ReferenceIndex
from verl_seer.drafting.store import PROMPT_TAIL, DraftServer, GroupDrafter
from verl_seer.drafting.types import TOKEN_LIMIT, DraftOptions

VOCABULARY = 50


# -- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["3f2a-11", "a:b:1:c", "x"])
@pytest.mark.parametrize("suffix", ["", "-0a1b2c3d"])
@pytest.mark.parametrize("probe", [False, True])
def test_a_name_is_read_as_it_was_written(group, suffix, probe):
    response = response_name(group, 3, "9f", 1)
    chunk = parse_chunk(chunk_name(response, 2, 40, 5, probe) + suffix, list(range(41)))
    assert (chunk.group, chunk.generated, chunk.probe) == (group, 40, probe)
    assert chunk.response == f"{response}~2"


def test_other_names_group_by_prompt():
    a, b, c = (parse_chunk(n, p) for n, p in (("cmpl-1", [1, 2]), ("g:0:r:0~0:2:0", [1, 2]), ("x", [1, 3])))
    assert a.group == b.group != c.group
    assert (a.response, b.response) == ("cmpl-1", "g:0:r:0~0:2:0"), "a chunk cannot be all response"
    assert parse_chunk("x", np.array([1, 3], np.int64)).group == c.group


# -- lengths -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(0, 10)), max_size=60))
def test_step_times_never_fall_and_stay_between_what_was_seen(steps):
    times = StepTimes()
    for tokens, seconds in steps:
        times.record(tokens, seconds)
    curve = [times.seconds(n) for n in (*range(1, 64), 100, 500, 1000, 4096, 10_000)]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(curve))
    if steps:
        assert min(s for _, s in steps) - 1e-9 <= curve[0] <= max(s for _, s in steps) + 1e-9
        assert (
            times.seconds(max(n for n, _ in steps)) <= max(s for _, s in steps) * 1.000001 + 1e-9
            or len(steps) > 1
        )


def test_step_times_find_a_line_under_outliers():
    rng, times = random.Random(0), StepTimes()
    for _ in range(2000):
        n = rng.randint(1, 500)
        stopped = 100.0 if rng.random() < 0.1 else 0.0  # a process that was held for a while
        times.record(n, 0.01 + 1e-4 * n + stopped)
    for n in (4, 40, 400):
        assert times.seconds(n) == pytest.approx(0.01 + 1e-4 * n, rel=0.06)  # a bucket is a fifth wide


@pytest.mark.parametrize(
    ("per_token", "right", "least", "most"), [(0.0, 0.8, 8, 8), (1.0, 0.1, 0, 0), (1e-4, 0.0, 0, 0)]
)
def test_lengths_follow_costs_and_acceptance(per_token, right, least, most):
    """Free tokens: the longest drafts. Tokens that cost as much as a step, or are never right: none."""
    rng, lengths = random.Random(1), DraftLengths(BudgetConfig(gamma_max=8), explore=7)
    chosen = (8, 8)
    for _ in range(1500):
        chosen = lengths.next(1, 3)
        lengths.ran(4 * (1 + chosen[1]), 4 * chosen[1], 1e-2 + per_token * 4 * (1 + chosen[1]))
        lengths.drafted(4, 1e-6)
        for _ in range(4):
            n = chosen[1]
            lengths.verified(n, next((i for i in range(n) if rng.random() >= right), n))
    lengths.explore = 0
    assert least <= lengths.next(1, 3)[1] <= most


@pytest.mark.parametrize(
    ("share", "drafts"), [(1.0, True), (0.1, False)], ids=["every request has a draft", "one in ten has"]
)
def test_drafts_that_few_requests_have_do_not_pay_for_slower_steps(share, drafts):
    """Verifying costs 2 ms a step, whatever it verifies: worth it for 4 accepted tokens a request, not for 0.4."""
    rng, lengths = random.Random(1), DraftLengths(BudgetConfig(gamma_max=4), explore=7)
    for _ in range(2000):
        allowed = lengths.next(2, 14)[1]
        made = [allowed if rng.random() < share else 0 for _ in range(16)] if allowed else []
        lengths.ran(16 + sum(made), sum(made), 6e-3 if sum(made) else 4e-3)
        for n in made:
            lengths.made.record(allowed, n)
            lengths.verified(n, n)
    lengths.explore = 0
    assert (lengths.next(2, 14)[1] > 0) == drafts


def test_made_drafts_are_counted_by_position():
    made = MadeDrafts(3, keep=1.0)
    for allowed, length in 1000 * [(2, 2), (2, 1), (2, 0), (1, 1), (1, 0)]:
        made.record(allowed, length)
    assert made.shares() == pytest.approx([3 / 5, 1 / 3, 1 / 3], rel=2e-3)  # beyond 2 like 2


def test_lengths_are_those_of_the_algorithm():
    lengths = DraftLengths(BudgetConfig(gamma_max=4), explore=0)
    for n in (4, 8, 12, 16, 20):
        lengths.ran(n, n - 4, 0.01 + 0.001 * n)
    for _ in range(200):
        lengths.verified(4, 2)

    class Costs:
        def draft(self, batch, length):
            return 0.0

        def forward(self, batch, length):
            return lengths.with_drafts.seconds(batch * (length + 1))

    want = draft_budget(1, 3, lengths.acceptance.chained(), Costs(), lengths.config, [1.0] * 4)
    assert lengths.next(1, 3) == (want.high, want.low)


# -- engines -----------------------------------------------------------------------------------------------


class Direct:
    """A link without a network: an exchange happens when the test says so."""

    def __init__(self, server):
        self.server, self.epoch, self.void, self.news = server, 0, False, []
        self.updates, self.cursors = [], {}

    def offer(self, updates, cursors, counts):
        self.updates += updates
        self.cursors = cursors

    def take(self):
        out = self.void, self.news
        self.void, self.news = False, []
        return out

    def exchange(self):
        updates, self.updates = self.updates, []
        if self.epoch != self.server.epoch:
            self.epoch, self.void, self.news = self.server.epoch, True, []
            return
        for update in updates:
            self.server.append(*update)
        for group, cursors in self.cursors.items():
            for name, tokens in self.server.fetch(group, cursors, self.epoch).tokens.items():
                self.news.append((group, name, cursors.get(name, 0), tokens))


class Engine:
    """Rows of requests that a test steps on; tokens of a response are given by its truth."""

    def __init__(self, link=None, **options):
        self.now = 0.0
        groups = GroupDrafter(lambda: ReferenceIndex(VOCABULARY, 6))
        options = {"adaptive": False, "min_score": 0.0, "update_seconds": 0.5, **options}
        self.drafter = EngineDrafter(groups, EngineOptions(**options), link, clock=lambda: self.now)
        self.groups = groups
        self.rows: dict[str, tuple[list[int], list[int]]] = {}  # name -> prompt of the engine, tokens since

    def step(self, new: dict[str, list[int]]) -> dict[str, list[int]]:
        self.now += 1.0
        names = list(self.rows)
        for name, tokens in new.items():
            self.rows[name][1].extend(tokens)
        ids = np.zeros((len(names), 400), np.int32)
        totals = []
        for i, name in enumerate(names):
            whole = [*self.rows[name][0], *self.rows[name][1]]
            ids[i, : len(whole)] = whole
            totals.append(len(whole))
        prompts = [len(self.rows[name][0]) for name in names]
        sampled = [new.get(name, []) for name in names]
        drafts = self.drafter.step(names, sampled, totals, prompts, ids, {}, len(names), lambda name: 400)
        return dict(zip(names, drafts))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), engines=st.integers(1, 3), rests=st.booleans())
def test_engines_hold_what_their_groups_have_said(seed, engines, rests):
    """Responses grow in chunks on any engine, leave the batch and come back, weights change; exchanges come any time.
    Engines draft in every step, or rest in most and flush in one of three.

    At the end each engine that runs a response of a group drafts from every response of that group, whole and once.
    """
    rng, server = random.Random(seed), DraftServer(VOCABULARY)
    links = [Direct(server) for _ in range(engines)]
    all_engines = [Engine(link, update_seconds=3.0 if rests else 0.5, adaptive=rests) for link in links]
    for engine in all_engines:
        engine.drafter.lengths.next = lambda high, low: (8, 8) if rng.random() < 0.2 else (0, 0)
    prompts = {g: [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 30))] for g in "gh"}
    truth: dict[tuple[str, int], list[int]] = {(g, s): [] for g in "gh" for s in range(3)}
    place: dict[tuple[str, int], tuple[Engine, str]] = {}
    attempt = 0

    def put(key):
        nonlocal attempt
        attempt += 1
        group, session = key
        name = chunk_name(response_name(group, session, "r", 0), 0, len(truth[key]), attempt, False)
        engine = rng.choice(all_engines)
        engine.rows[name] = ([*prompts[group], *truth[key]], [])
        place[key] = (engine, name)

    def step(engine, keys):
        new = {}
        for key in keys:
            tokens = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 4))]
            truth[key] += tokens
            new[place[key][1]] = tokens
        engine.step(new)

    for _ in range(40):
        event = rng.random()
        key = rng.choice(list(truth))
        if event < 0.3:
            if key in place:
                engine, name = place.pop(key)
                del engine.rows[name]
            put(key)
        elif event < 0.8:
            engine = rng.choice(all_engines)
            step(engine, [k for k, (e, _) in place.items() if e is engine and rng.random() < 0.7])
        elif event < 0.97:
            rng.choice(links).exchange()
        else:
            server.new_weights()
            for key in truth:  # as in synchronous training, no response lives on
                truth[key] = []
            for engine in all_engines:
                engine.rows.clear()
                engine.drafter.new_weights()
            place.clear()
    for key in truth:
        if key not in place:
            put(key)
    for _ in range(9 if rests else 3):  # learn the epoch, send, fetch
        for engine, link in zip(all_engines, links):
            step(engine, [k for k, (e, _) in place.items() if e is engine])
            link.exchange()
    for _ in range(6 if rests else 2):
        for engine, link in zip(all_engines, links):
            engine.step({})
            link.exchange()
    for engine in all_engines:
        engine.step({})
        for group in {g for (g, _), (e, _) in place.items() if e is engine}:
            whole = ReferenceIndex(VOCABULARY, 6)
            whole.append("prompt", prompts[group])
            names = {s: f"{response_name(group, s, 'r', 0)}~0" for s in range(3)}
            assert engine.groups.cursors(group) == {names[s]: len(truth[group, s]) for s in range(3)}
            for s, name in names.items():
                whole.append(name, [*prompts[group][-PROMPT_TAIL:], *truth[group, s]])
            for name in names.values():
                options = DraftOptions()
                assert engine.groups.draft(group, name, options) == whole.draft(name, options)


def test_tokens_that_the_model_does_not_have_are_not_taken(caplog):
    server = DraftServer(TOKEN_LIMIT)
    engine = Engine(Direct(server))
    engine.rows["a"] = ([1, 2, 3], [])
    engine.step({"a": [4]})
    group = engine.drafter._groups.groups[0]
    engine.drafter._news.extend(
        [(group, "x", 0, array("i", [VOCABULARY])), (group, "y", -1, array("i", [1, 2]))]
    )
    engine.step({"a": [5]})
    assert "what the draft server sent is not taken" in caplog.text
    engine.drafter._news.append((group, "y", -1, array("i", [1, 2])))
    engine.step({"a": [6]})
    assert list(engine.drafter._groups.cursors(group).values()) == [3], "its own tokens alone"


def test_a_draft_ends_at_the_requests_limit():
    engine = Engine(max_draft=8)
    engine.rows = {"g:0:r:0~0:0:0": ([1, 2, 3], [])}
    draft = engine.step({"g:0:r:0~0:0:0": [5, 6, 5, 6, 5, 6, 5]})
    assert draft["g:0:r:0~0:0:0"] == [6, 5, 6, 5, 6, 5, 6, 5]
    ids = np.array([[1, 2, 3, 5, 6, 5, 6, 5, 6, 5, 6]], np.int32)
    row = [["g:0:r:0~0:0:0"], [[6]], [11], [3], ids, {}, 1]
    for limit, tokens in ((12, 0), (13, 1), (15, 3)):
        fresh = Engine()
        assert len(fresh.drafter.step(*row, lambda name, limit=limit: limit)[0]) == tokens


def test_idle_groups_are_forgotten():
    for options in ({"ttl_seconds": 5.0}, {"max_tokens": 8}):
        engine = Engine(**options)
        engine.rows = {"g:0:r:0~0:0:0": ([1, 2, 3], [])}
        engine.step({"g:0:r:0~0:0:0": [5, 6, 5]})
        engine.rows = {"h:0:r:0~0:0:1": ([1, 2, 3], [])}
        for token in range(10):
            engine.step({"h:0:r:0~0:0:1": [token]})
        assert engine.groups.groups == ["h"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_draft": 0}, "max_draft must be an integer of at least 1, got 0"),
        ({"max_draft": True}, "max_draft must be an integer"),
        ({"rule": "best"}, "rule must be one of printed, conditional, cumulative, got 'best'"),
        ({"min_score": 1.5}, r"min_score must be in \[0, 1\], got 1.5"),
        ({"update_seconds": 0}, "update_seconds must be a positive number"),
        ({"adaptive": "yes"}, "adaptive must be true or false, got 'yes'"),
        ({"server": "localhost:5"}, "server must be null or tcp://host:port"),
        ({"servers": "x"}, r"unknown drafting options \['servers'\]"),
    ],
)
def test_bad_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        EngineOptions.of(options)


# -- the way to the server ---------------------------------------------------------------------------------


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


@pytest.fixture
def link_module():
    pytest.importorskip("zmq")
    pytest.importorskip("msgspec")
    from verl_seer.drafting import link

    return link


def test_links_carry_tokens_and_new_weights(link_module):
    service = link_module.DraftService(DraftServer(VOCABULARY), "tcp://127.0.0.1:0")
    a, b = (link_module.DraftLink(service.address, name) for name in "ab")
    try:
        a.offer([("g", "r", 0, array("i", [1, 2, 3]))], {}, {"steps": 1})
        until(lambda: service.stats()["tokens"] == 3)
        b.offer([], {"g": {"r": 1}}, {"steps": 2})
        until(lambda: b._news)
        assert b.take() == (False, [("g", "r", 1, array("i", [2, 3]))])
        assert service.stats()["engines"] == {"a": {"steps": 1}, "b": {"steps": 2}}
        assert isinstance(service.stats()["engines"]["a"]["steps"], int), "a count stays one"
        service.new_weights()
        for link in (a, b):
            link.offer([("g", "r", 3, array("i", [4]))], {"g": {}}, {})
            until(lambda link=link: link._void)
            assert link.take() == (True, [])
        assert service.stats()["tokens"] == 0
        a.offer([("g", "r", 0, array("i", [9]))], {}, {})
        until(lambda: service.stats()["tokens"] == 1)
        assert not a.lost and not b.lost
    finally:
        for closing in (a, b, service):
            closing.close()


def test_a_dead_server_is_warned_of_once_and_found_again(link_module, monkeypatch, caplog):
    monkeypatch.setattr(link_module, "RETRY_SECONDS", 0.05)
    service = link_module.DraftService(DraftServer(VOCABULARY), "tcp://127.0.0.1:0")
    address = service.address
    link = link_module.DraftLink(address, "a", timeout=0.3)
    try:
        link.offer([("g", "r", 0, array("i", [1, 2, 3]))], {}, {})
        until(lambda: service.stats()["tokens"] == 3)
        service.close()
        for i in range(5):
            link.offer([("g", "r", 3 + i, array("i", [1]))], {}, {})
            time.sleep(0.2)
        until(lambda: link.lost)
        assert [r.message for r in caplog.records if "no answer" in r.message] == [
            f"Seer: no answer from the draft server at {address} (Resource temporarily unavailable): drafting goes on "
            "from this engine's own responses alone"
        ]
        service = link_module.DraftService(DraftServer(VOCABULARY), address)
        until(lambda: not link.lost)
        assert link.take() == (True, []), "what was sent before is not there: all of it anew"
        link.offer([("g", "r", 0, array("i", [7]))], {}, {})
        until(lambda: service.stats()["tokens"] == 1)
    finally:
        link.close()
        service.close()


def test_the_service_answers_nonsense_and_goes_on(link_module, monkeypatch):
    import msgspec
    import zmq

    service = link_module.DraftService(DraftServer(VOCABULARY), "tcp://127.0.0.1:0")
    context = zmq.Context()
    socket = context.socket(zmq.REQ)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVTIMEO, 60_000)
    socket.connect(service.address)
    good = {"engine": "a", "epoch": 0, "updates": [], "cursors": {}, "counts": {}}
    late = {**good, "updates": [("g", "r", 5, b"\1\0\0\0")]}
    odd = {**good, "updates": [("g", "r", 0, b"\1\0\0")]}
    wrong = {**good, "updates": [("g", "r", 0, array("i", [99]).tobytes())]}
    named = {**good, "engine": 3}
    first = {**good, "updates": [("g", "r", 0, array("i", [1]).tobytes())]}
    before = {**good, "cursors": {"g": {"r": -1}}}
    try:
        socket.send(msgspec.msgpack.encode(first))
        assert msgspec.msgpack.decode(socket.recv())["error"] == ""
        bad = map(msgspec.msgpack.encode, ([1], {}, late, odd, wrong, named, before))
        for message in (b"", b"\xff\xff", *bad):
            socket.send(message)
            assert msgspec.msgpack.decode(socket.recv())["error"]
        socket.send(msgspec.msgpack.encode(good))
        assert msgspec.msgpack.decode(socket.recv()) == {"epoch": 0, "rows": [], "error": ""}
        monkeypatch.setattr(link_module, "MAX_MESSAGE", 1000)
        small = link_module.DraftService(DraftServer(VOCABULARY), "tcp://127.0.0.1:0")
        link = link_module.DraftLink(small.address, "a", timeout=0.3)
        link.offer([("g", "r", 0, array("i", [1] * 1000))], {}, {})
        until(lambda: link.lost)
        assert small.stats()["tokens"] == 0
        link.close()
        small.close()
    finally:
        socket.close()
        context.term()
        service.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"\xc1",
        {"epoch": 0},
        {"epoch": 0, "rows": [("g", "r", "0", b"")], "error": ""},
        {"epoch": 0, "rows": [("g", "r", 0, b"123")], "error": ""},
    ],
    ids=["no message", "no rows", "a position that is no number", "half a token"],
)
def test_an_answer_that_is_none_is_a_lost_server(link_module, answer, caplog):
    import msgspec
    import zmq

    context = zmq.Context()
    server = context.socket(zmq.REP)
    server.setsockopt(zmq.RCVTIMEO, 60_000)
    port = server.bind_to_random_port("tcp://127.0.0.1")
    link = link_module.DraftLink(f"tcp://127.0.0.1:{port}", "a")
    try:
        link.offer([], {}, {})
        server.recv()
        server.send(answer if isinstance(answer, bytes) else msgspec.msgpack.encode(answer))
        until(lambda: link.lost)
        assert link.take() == (False, [])
        assert "drafting goes on from this engine's own responses alone" in caplog.text
    finally:
        link.close()
        context.destroy(0)


def test_a_service_says_that_its_address_is_taken(link_module):
    service = link_module.DraftService(DraftServer(VOCABULARY), "tcp://127.0.0.1:0")
    try:
        with pytest.raises(ValueError, match="bind must be a free address of this machine"):
            link_module.DraftService(DraftServer(VOCABULARY), service.address)
    finally:
        service.close()
