"""The simulator: against a token-by-token one, conservation, known answers, traces, the command."""

from __future__ import annotations

import dataclasses
import json
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from verl_seer import SchedulerConfig
from verl_seer.cli import app
from verl_seer.simulate.balancers import LeastInFlight
from verl_seer.simulate.costs import ACCEPTED, SIBLINGS, StepModel, acceptance
from verl_seer.simulate.drafts import Drafting
from verl_seer.simulate.presets import WORKLOADS, policies
from verl_seer.simulate.rollout import Divided, Whole, simulate
from verl_seer.simulate.workload import Cluster, Sample, read_trace, synthesize, write_trace

COSTS = StepModel(0.02, 1e-4, 1e-5, 1e-8, 1e-6, 1e4, 1e6)
ALL = policies(chunk_size=64)


def cluster(instances=2, kv=2000, running=8, **costs):
    return Cluster(instances, kv, running, dataclasses.replace(COSTS, **costs), 1000)


def groups(rows, prompt=4):
    limit = max(max(row) for row in rows)
    return [Sample(f"g{g}", prompt, n, limit) for g, row in enumerate(rows) for n in row]


def token_by_token(lengths, prompt, kv, running, costs):
    """One instance, first come, first served, a step at a time: (makespan, preemptions, tokens computed again)."""
    waiting, active, generated, time = list(range(len(lengths))), [], [0] * len(lengths), 0.0
    preemptions = recomputed = 0
    evicted = set()
    while waiting or active:
        used = sum(prompt + generated[r] for r in active)
        while waiting and len(active) < running:
            need = prompt + generated[waiting[0]]
            if active and used + need + len(active) + 1 > kv:
                break
            r = waiting.pop(0)
            active.append(r)
            used += need
            time += need / costs.prefill_rate
            if r in evicted:
                evicted.remove(r)
                recomputed += need
        time += costs.step(len(active), len(active), used)
        for r in active:
            generated[r] += 1
        active = [r for r in active if generated[r] < lengths[r]]
        if len(active) > 1 and sum(prompt + generated[r] for r in active) + len(active) > kv:
            r = active.pop()
            waiting.insert(0, r)
            evicted.add(r)
            preemptions += 1
    return time, preemptions, recomputed


@pytest.mark.parametrize(("kv", "running"), [(100_000, 64), (100_000, 5), (4000, 64), (2500, 64)])
def test_skipping_to_events_is_stepping_token_by_token(kv, running):
    """An event may fall inside a step here, and another request be its victim: 2 % of the time, 15 % of the counts."""
    lengths = np.random.default_rng(0).integers(50, 900, 40).tolist()
    costs = dataclasses.replace(COSTS, per_kv=1e-6)
    time, preemptions, recomputed = token_by_token(lengths, 20, kv, running, costs)
    o = simulate([Sample("g", 20, n, 900) for n in lengths], Cluster(1, kv, running, costs, 1), Whole())
    assert o.makespan == pytest.approx(time, rel=0.02)
    assert o.preemptions == pytest.approx(preemptions, rel=0.15)
    assert o.recomputed_tokens == pytest.approx(recomputed, rel=0.15)
    assert (preemptions > 10) == (kv < 10_000)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=5), min_size=1, max_size=6),
    instances=st.integers(1, 4),
    name=st.sampled_from(list(ALL)),
)
def test_every_request_finishes_once_under_every_policy(rows, instances, name):
    samples = groups(rows)
    o = simulate(samples, cluster(instances, kv=900), ALL[name])
    assert not np.isnan(o.finish_times).any() and len(o.finish_times) == len(samples)
    assert o.output_tokens == sum(map(sum, rows)) and o.makespan == o.finish_times[-1]
    assert 0 <= o.idle_share < 1 and 0 <= o.kv_use <= 1 and 0 <= o.tail <= o.makespan
    assert max(share for rows in o.occupancy for _, _, share in rows) <= 1 + 1e-9
    if isinstance(ALL[name], Divided):
        assert o.preemptions == o.recomputed_tokens == 0
        assert o.chunks == sum(-(-n // 64) for row in rows for n in row)
    else:
        assert o.chunks == len(samples) + o.preemptions


def test_one_request_takes_its_steps():
    """200 tokens after a prompt of 10: KV from 10 to 210, the closed form of the sum up to half a step's growth."""
    costs = dataclasses.replace(COSTS, per_kv=1e-5)
    o = simulate([Sample("g", 10, 200, 200)], Cluster(1, 1000, 4, costs, 1), Whole())
    want = 10 / costs.prefill_rate + sum(costs.step(1, 1, 10 + i) for i in range(200))
    assert o.makespan == pytest.approx(want, abs=200 * 1e-5 / 2 + 1e-9)


def test_results_repeat_and_differ_by_seed():
    w = dataclasses.replace(WORKLOADS["moonlight"], requests=160)
    small = dataclasses.replace(w.cluster, instances=4)
    samples = synthesize(w, 3)
    assert samples == synthesize(w, 3) != synthesize(w, 4)
    for name in ("stock", "seer"):
        a, b = (simulate(samples, small, policies()[name], seed=1).to_json() for _ in range(2))
        assert a == b


def test_made_lengths_have_the_papers_mean_whatever_the_correlation():
    """3200 lengths in 400 groups: the standard error of the mean is 1 % without and 3 % with full correlation."""
    for w in WORKLOADS.values():
        for rho in (0.0, 0.5, 1.0):
            lengths = [s.tokens for s in synthesize(w, 1, correlation=rho)]
            assert statistics.mean(lengths) == pytest.approx(w.mean_tokens, rel=0.1)
            assert max(lengths) <= w.max_tokens
    rows = np.array([s.tokens for s in synthesize(WORKLOADS["moonlight"], 1, correlation=1.0)]).reshape(-1, 8)
    assert (rows == rows[:, :1]).all()


def test_oracle_order_beats_arrival_and_knowing_nothing_is_not_better():
    """A long request that comes last is the classic tail; the longest-first order has none."""
    samples = groups([[20] * 8] * 8 + [[400]])
    small = Cluster(1, 1_000_000, 4, COSTS, 1)
    arrival = simulate(samples, small, Divided(SchedulerConfig(500, "arrival", fairness_period=0)))
    oracle = simulate(samples, small, Divided(SchedulerConfig(500, "oracle", fairness_period=0)))
    assert oracle.makespan < 0.75 * arrival.makespan


def test_a_move_costs_a_transfer_and_a_stay_does_not():
    samples = groups([[200, 200]])
    stay = simulate(samples, cluster(1), Divided(SchedulerConfig(50)))
    assert stay.transferred_tokens == stay.moved_chunks == 0 and stay.chunks == 8
    crowded = simulate(
        groups([[200] * 6]), cluster(1, running=2), Divided(SchedulerConfig(50, "round-robin"))
    )
    assert crowded.transferred_tokens > 0 and crowded.transfer_seconds > 0


def test_drafting_is_faster_and_grouped_drafts_are_longer_than_an_instances_own():
    samples = groups([[3000] * 8] * 4)
    plain = simulate(samples, cluster(4, kv=200_000), Whole())
    own = simulate(samples, cluster(4, kv=200_000), Whole(drafting=Drafting("instance", length=8)))
    shared = simulate(samples, cluster(4, kv=200_000), Whole(drafting=Drafting("group", length=8)))
    assert plain.accepted_length is None
    assert 1 < own.accepted_length < shared.accepted_length
    assert shared.makespan < own.makespan < plain.makespan


def test_acceptance_gives_back_the_papers_table():
    for paths, row in ACCEPTED.items():
        for n, length in zip(SIBLINGS, row):
            alpha = acceptance(n, paths)
            assert sum(alpha**i for i in range(9)) == pytest.approx(length, abs=1e-6)
        values = [acceptance(n, paths) for n in np.linspace(0, 15, 40)]
        assert values == sorted(values)


def test_our_balancer_spreads_as_it_says():
    balancer = LeastInFlight(["a", "b", "c"], seed=0)
    first = [balancer.acquire_server(str(i))[0] for i in range(6)]
    assert sorted(first) == ["a", "a", "b", "b", "c", "c"]
    balancer.release_server("b")
    assert balancer.acquire_server("x")[0] == "b"


def test_our_balancer_is_verls():
    """Same counts after the same calls, and the same choices from the same random state."""
    pytest.importorskip("verl.workers.rollout.router", reason="needs verl, Ray and their dependencies")
    from verl_seer.simulate.balancers import verl_balancer

    servers = [f"s{i}" for i in range(5)]
    ours, theirs = LeastInFlight(servers, seed=7), verl_balancer(servers, seed=7)
    rng = np.random.default_rng(0)
    live = []
    for i in range(500):
        if live and rng.random() < 0.45:
            server, request = live.pop(int(rng.integers(len(live))))
            ours.release_server(server, request)
            theirs.release_server(server, request)
        else:
            server, _ = ours.acquire_server(f"r{i}")
            assert theirs.acquire_server(f"r{i}")[0] == server
            live.append((server, f"r{i}"))


def test_a_trace_is_read_as_it_was_written(tmp_path):
    samples = groups([[5, 9], [7]])
    write_trace(tmp_path / "t.jsonl", samples)
    assert read_trace(tmp_path / "t.jsonl") == samples
    (tmp_path / "t.jsonl").write_text(
        '{"group": "b", "prompt_tokens": 1, "tokens": 3}\n\n{"group": "a", "prompt_tokens": 2, "tokens": 8}\n'
    )
    assert read_trace(tmp_path / "t.jsonl") == [Sample("a", 2, 8, 8), Sample("b", 1, 3, 8)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no samples"),
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: must be a JSON object, got list"),
        ('{"group": "a", "tokens": 3}', r"line 1: missing \['prompt_tokens'\]"),
        ('{"group": "a", "tokens": 3, "prompt_tokens": 1, "len": 2}', r"unknown \['len'\]"),
        ('{"group": "a", "tokens": 0, "prompt_tokens": 1}', "tokens must be an integer of at least 1, got 0"),
        ('{"group": "a", "tokens": true, "prompt_tokens": 1}', "integer of at least 1, got True"),
        ('{"group": 3, "tokens": 4, "prompt_tokens": 1}', "group must be a string, got 3"),
        ('{"group": "a", "tokens": 4, "prompt_tokens": 1, "max_tokens": 3}', "exceeds max_tokens"),
    ],
)
def test_a_bad_trace_is_named_with_its_line(tmp_path, text, said):
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_trace(tmp_path / "t.jsonl")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: simulate([], cluster(), Whole()), "samples must not be empty"),
        (
            lambda: simulate(groups([[3000]]), cluster(), Whole()),
            r"kv_capacity must hold the longest request",
        ),
        (lambda: synthesize(WORKLOADS["moonlight"], 0, group_size=7), "group_size must divide the 3200"),
        (lambda: synthesize(WORKLOADS["moonlight"], 0, correlation=1.5), r"correlation must be in \[0, 1\]"),
        (lambda: cluster(instances=0), "instances must be at least 1"),
        (lambda: cluster(fixed=0), "fixed must be positive"),
        (lambda: Drafting("group", length=17), r"must be in 1\.\.16, got 17"),
        (lambda: cluster(per_kv=-1), "per_kv must not be negative"),
    ],
)
def test_bad_arguments_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "160"})


def test_the_command_writes_figures_and_a_page(tmp_path):
    out = tmp_path / "r.json"
    shape = ("--requests", 64, "--instances", 4, "-p", "group-level", "-p", "seer")
    result = run("simulate", out, *shape)
    assert result.exit_code == 0, result.output
    body = json.loads(out.read_text())
    assert list(body["policies"]) == ["group-level", "seer"]
    assert body["policies"]["seer"]["output_tokens"] == body["policies"]["group-level"]["output_tokens"]
    page = (tmp_path / "r.html").read_text()
    assert page.count("<img") == 3 and "paper&#x27;s gain" in page.replace("'", "&#x27;") and "1.90" in page
    assert run("report", out, tmp_path / "again.html").exit_code == 0
    assert (tmp_path / "again.html").read_text() == page


def test_the_command_takes_a_trace(tmp_path):
    write_trace(tmp_path / "t.jsonl", groups([[50, 60], [500, 700]]))
    result = run("simulate", tmp_path / "r.json", "--trace", tmp_path / "t.jsonl", "-p", "stock", "--no-html")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "r.json").read_text())["samples"]["requests"] == 4
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("simulate", "r.json", "-w", "gpt"), "--workload must be one of moonlight"),
        (("simulate", "r.json", "-p", "best"), "--policy must be one of group-level"),
        (("simulate", "r.json", "--trace", "t", "--requests", "8"), "do not go with --trace"),
        (("simulate", "r.json", "--trace", "none.jsonl"), "No such file"),
        (("simulate", "r.json", "--correlation", "2"), "correlation must be in [0, 1]"),
        (("simulate", "r.json", "--kv-tokens", "100"), "kv_capacity must hold"),
        (("simulate", "no/r.json"), "no is not a folder"),
        (("simulate", "r.html"), "name the JSON file"),
        (("report", "none.json"), "No such file"),
        (("report", "bad.json"), "not a result of"),
        (("report", "worse.json"), "not JSON"),
        (("report", "cut.json"), "samples is missing"),
    ],
)
def test_mistakes_are_explained_on_stderr(args, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("[]")
    (tmp_path / "worse.json").write_text("{")
    head = {"format": "kimi-stack seer simulate, version 1", "title": "x", "settings": {}, "cluster": {}}
    (tmp_path / "cut.json").write_text(json.dumps(head))
    result = run(*args)
    assert result.exit_code == 2 and said in result.stderr and "Traceback" not in result.output
