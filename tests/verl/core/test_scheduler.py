"""Algorithm 2: every token is generated once, nobody starves, the order is the paper's."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_seer import Instance, Request, Scheduler, SchedulerConfig, Status
from verl_seer.context import LengthContext

ORDERS = ("context", "arrival", "round-robin", "oracle")


def scheduler(lengths, order="context", chunk=8, instances=2, capacity=100, running=4, fairness=4, limit=40):
    """One group a row of `lengths`, prompts of 5 tokens."""
    true = {f"{g}.{i}": n for g, row in enumerate(lengths) for i, n in enumerate(row)}
    config = SchedulerConfig(chunk_size=chunk, order=order, fairness_period=fairness)
    engines = [Instance(f"e{i}", capacity, running) for i in range(instances)]
    out = Scheduler(config, engines, true.__getitem__ if order == "oracle" else None)
    for g, row in enumerate(lengths):
        for i in range(len(row)):
            out.add(Request(f"{g}.{i}", f"g{g}", 5, limit))
    return out, true


def finish(s: Scheduler, true: dict[str, int], assignment) -> bool:
    left = true[assignment.request_id] - s.request(assignment.request_id).generated
    new = min(left, assignment.max_tokens)
    s.completed(assignment.request_id, new, finished=new == left)
    return new == left


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=5),
    order=st.sampled_from(ORDERS),
    chunk=st.integers(1, 50),
    fairness=st.integers(0, 5),
    seed=st.integers(0, 2**32),
)
def test_every_token_is_generated_once_whatever_the_order_and_the_failures(
    lengths, order, chunk, fairness, seed
):
    s, true = scheduler(lengths, order, chunk, fairness=fairness)
    rng = random.Random(seed)
    running, lost = [], 0
    while s.unfinished:
        while (a := s.next_assignment()) is not None:
            request = s.request(a.request_id)
            assert request.status is Status.RUNNING and a.request_id not in {r.request_id for r in running}
            assert a.max_tokens == min(chunk, 40 - request.generated)
            running.append(a)
        for instance in s.instances():
            on = [r for r in running if r.instance_id == instance.instance_id]
            assert instance.running == {r.request_id for r in on} and len(on) <= instance.max_running
            assert instance.kv_reserved <= instance.kv_capacity
        assert running, "no progress"
        if lost < 2 and rng.random() < 0.1:  # an instance dies; another takes its place
            lost += 1
            dead = rng.choice([x.instance_id for x in s.instances()])
            back = s.remove_instance(dead)
            assert sorted(back) == sorted(r.request_id for r in running if r.instance_id == dead)
            running = [r for r in running if r.instance_id != dead]
            s.add_instance(Instance(f"new{lost}", 100, 4))
            continue
        finish(s, true, running.pop(rng.randrange(len(running))))
    assert s.waiting == 0
    assert all(
        s.request(r).generated == n and s.request(r).status is Status.FINISHED for r, n in true.items()
    )
    for g, row in enumerate(lengths):
        assert s.context.estimate(f"g{g}") == max(row)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(2, 30), period=st.integers(1, 6), victim=st.integers(0, 29), seed=st.integers(0, 99))
def test_no_request_waits_longer_than_the_bound(count, period, victim, seed):
    """A request with m before it in the buffer is taken within period * (m + 1) decisions, whatever arrives."""
    rng = random.Random(seed)
    s = Scheduler(SchedulerConfig(chunk_size=1, fairness_period=period), [Instance("e", 10_000, 1)])
    for i in range(count):
        s.add(Request(f"r{i}", f"g{i // 2}", 1, 1000))
    waiting = f"r{victim % count}"
    decisions = 0
    while (a := s.next_assignment()).request_id != waiting:
        decisions += 1
        assert decisions < period * (victim % count + 1)
        if rng.random() < 0.5:  # new probes, which go before it
            s.add(Request(f"n{decisions}", f"n{decisions}", 1, 1000))
        s.completed(a.request_id, rng.randint(0, 1), finished=rng.random() < 0.2)


def test_probes_go_first_and_the_one_with_least_generated_before_the_others():
    s, true = scheduler([[30, 30], [30, 30], [30, 30]], instances=1, running=1, chunk=8, fairness=0)
    order = []
    for _ in range(5):
        a = s.next_assignment()
        order.append(a.request_id)
        finish(s, true, a)
    assert order == ["0.0", "1.0", "2.0", "0.0", "1.0"]


@pytest.mark.parametrize("order", ["context", "arrival"])
def test_priorities_are_the_order_of_the_buffer(order):
    """Handed out at once, chunks have rising numbers: an engine that sorts by them runs them as they were chosen."""
    s, true = scheduler([[40, 9, 9], [20, 30, 9], [50, 50]], instances=1, running=8, chunk=8, fairness=0, order=order)
    seen = set()
    for _ in range(4):
        chunks = []
        while (a := s.next_assignment()) is not None:
            chunks.append(a)
        assert [a.priority for a in chunks] == sorted(a.priority for a in chunks)
        seen |= {a.priority for a in chunks}
        if order == "context":
            assert all((a.priority < -1000) == s.request(a.request_id).probe for a in chunks)
        for a in chunks:
            finish(s, true, a)
    assert len(seen) > 3


def test_others_go_longest_first_and_a_group_without_a_finished_request_counts_as_longest():
    s, true = scheduler([[3, 9], [20, 9], [40, 9]], chunk=40, instances=1, running=1, fairness=0, limit=50)
    for probe in ("0.0", "1.0"):
        a = s.next_assignment()
        assert a.request_id == probe
        finish(s, true, a)
    a = s.next_assignment()
    assert a.request_id == "2.0"
    s.completed("2.0", 1, finished=False)  # not done: it is a probe still, and goes first again
    a = s.next_assignment()
    s.completed(a.request_id, 39, finished=True)
    order = []
    while (a := s.next_assignment()) is not None:
        order.append(a.request_id)
        finish(s, true, a)
    assert order == ["2.1", "1.1", "0.1"]


def test_estimate_only_rises_after_the_first_response():
    s, true = scheduler([[3, 9, 5]], chunk=40, instances=1, running=1, fairness=0, limit=50)
    seen = [s.context.estimate("g0")]
    while (a := s.next_assignment()) is not None:
        finish(s, true, a)
        seen.append(s.context.estimate("g0"))
    assert seen == [50, 3, 9, 9]


def test_oracle_goes_longest_remaining_first():
    s, true = scheduler([[10, 30, 20]], order="oracle", chunk=15, instances=1, running=1, fairness=0)
    order = []
    while (a := s.next_assignment()) is not None:
        order.append(a.request_id)
        finish(s, true, a)
    assert order == ["0.1", "0.2", "0.1", "0.0", "0.2"]


def test_arrival_keeps_a_requests_place_and_round_robin_does_not():
    seen = {}
    for order in ("arrival", "round-robin"):
        s, true = scheduler([[16, 16]], order=order, chunk=8, instances=1, running=1, fairness=0)
        seen[order] = []
        while (a := s.next_assignment()) is not None:
            seen[order].append(a.request_id)
            finish(s, true, a)
    assert seen == {"arrival": ["0.0", "0.0", "0.1", "0.1"], "round-robin": ["0.0", "0.1", "0.0", "0.1"]}


def test_the_estimate_by_exposure_counts_what_has_not_finished():
    """A group of 5, 20 and 30 tokens in chunks of 10, all at once: 5 when the first ends by the paper's estimate,
    though the others are at 10 already; the tokens of all over the finished ones otherwise; the limit before."""
    seen = {}
    for estimate in ("longest", "exposure"):
        s = Scheduler(SchedulerConfig(10, estimate=estimate), [Instance("a", 1000, 8)])
        for name in "xyz":
            s.add(Request(name, "g", 1, 40))
        seen[estimate] = []
        for name, new, finished in [
            ("y", 10, False), ("z", 10, False), ("x", 5, True), ("y", 10, True), ("z", 10, False), ("z", 10, True),
        ]:  # fmt: skip
            while s.next_assignment() is not None:
                pass
            s.completed(name, new, finished)
            seen[estimate].append(s.context.estimate("g"))
        assert s.unfinished == 0
    assert seen == {"longest": [40, 40, 5, 20, 20, 30], "exposure": [40, 40, 25, 17, 22, 18]}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_estimate_by_exposure_is_not_biased_by_who_finishes_first(seed):
    """Exponential lengths of mean 1000, 400 in a group, all run alike until a quarter has finished: within five
    standard errors (mean / sqrt(100 finished)) of the mean; the longest finished one is less than half of it."""
    rng = np.random.default_rng(seed)
    lengths = np.ceil(rng.exponential(1000, 400)).astype(int)
    now = int(np.sort(lengths)[99])
    context = {e: LengthContext(e) for e in ("longest", "exposure")}
    for c in context.values():
        c.add_group("g", 100_000)
        for n in lengths.tolist():
            c.chunk("g", min(n, now), n if n <= now else None)
    assert abs(context["exposure"].estimate("g") - 1000) < 500
    assert context["longest"].estimate("g") == now < 450


def test_a_chunk_returns_to_its_instance_unless_that_is_much_busier():
    config = SchedulerConfig(chunk_size=8, affinity_spread=1, order="arrival")
    s = Scheduler(config, [Instance("a", 1000, 8), Instance("b", 1000, 8)])
    for i in range(4):
        s.add(Request(f"r{i}", "g", 5, 40))
    placed = [s.next_assignment() for _ in range(4)]
    assert [x.instance_id for x in placed] == ["a", "b", "a", "b"]
    s.completed("r0", 8, finished=False)
    again = s.next_assignment()
    assert (again.request_id, again.instance_id, again.previous_instance_id) == ("r0", "a", "a")
    s.completed("r1", 1, finished=True)
    s.completed("r3", 1, finished=True)
    s.completed("r0", 8, finished=False)  # a runs one, b none: within the spread, its KV decides
    assert s.next_assignment().instance_id == "a"


def test_nothing_is_assigned_where_nothing_fits_and_no_instance_can_ever_hold_it_is_an_error():
    s, _ = scheduler([[30, 30]], instances=1, capacity=14, chunk=8)
    assert s.next_assignment() is not None
    assert s.next_assignment() is None
    s.completed("0.0", 8, finished=False)
    with pytest.raises(ValueError, match=r"needs 21 KV tokens .* the largest instance has 14"):
        s.next_assignment()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SchedulerConfig(chunk_size=0), "chunk_size must be at least 1 token, got 0"),
        (lambda: SchedulerConfig(order="shortest"), "order must be one of context, arrival"),
        (lambda: SchedulerConfig(estimate="mean"), "estimate must be one of longest, exposure, got 'mean'"),
        (lambda: SchedulerConfig(fairness_period=-1), "fairness_period must not be negative"),
        (lambda: Scheduler(SchedulerConfig(order="oracle")), "true_length must be given"),
        (lambda: Scheduler(SchedulerConfig(), true_length=len), "true_length must be given"),
        (lambda: Request("r", "g", 0, 4), "prompt_tokens of request 'r' must be at least 1"),
        (lambda: Instance("e", 0, 4), "kv_capacity of instance 'e' must be at least 1"),
    ],
)
def test_bad_options_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_bad_calls_are_named():
    s, _ = scheduler([[30]])
    with pytest.raises(ValueError, match="added before"):
        s.add(Request("0.0", "g", 5, 40))
    with pytest.raises(ValueError, match="only a running chunk completes"):
        s.completed("0.0", 1, finished=False)
    with pytest.raises(ValueError, match="'x' is not known"):
        s.completed("x", 1, finished=False)
    s.next_assignment()
    with pytest.raises(ValueError, match=r"new_tokens of '0.0' must be in 0\.\.8, got 9"):
        s.completed("0.0", 9, finished=False)
    with pytest.raises(ValueError, match="'e7' is not known"):
        s.remove_instance("e7")
    with pytest.raises(ValueError, match="group_id 'q' is not known"):
        s.context.estimate("q")
