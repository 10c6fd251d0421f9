"""Seer's client and router as real Ray actors, over servers whose next token is a function of the whole prefix.

Such a server notices every mistake of the chunk loop: one token too many, lost or repeated changes all that follow.
vLLM's part is in test_training.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys

import pytest

pytest.importorskip("verl.workers.rollout.llm_server", reason="needs verl, Ray and their dependencies")
ray = pytest.importorskip("ray")

from omegaconf import OmegaConf  # noqa: E402
from verl.workers.rollout.replica import TokenOutput  # noqa: E402

from verl_seer.client import Origin, SeerClient, origin, same_weights  # noqa: E402
from verl_seer.rollout import RouterActor  # noqa: E402
from verl_seer.scheduler import PROBES_FIRST  # noqa: E402

STOP = 1
VOCABULARY = 40  # so a response has about 40 tokens, and a chunk of 8 often ends just at the stop token
CONFIG = OmegaConf.create(
    {
        "actor_rollout_ref": {
            "rollout": {
                "name": "vllm",
                "prompt_length": 16,
                "response_length": 64,
                "max_model_len": 128,
                "seed": 0,
            }
        }
    }
)


def next_token(prefix: list[int]) -> int:
    digest = hashlib.blake2b(",".join(map(str, prefix)).encode(), digest_size=4).digest()
    return 1 + int.from_bytes(digest, "big") % VOCABULARY


def whole(prompt: list[int], limit: int = 64) -> list[int]:
    out: list[int] = []
    while len(out) < limit and (not out or out[-1] != STOP):
        out.append(next_token(prompt + out))
    return out


class Server:
    """Generates as `next_token` says; exits in the middle of its `die_at`-th chunk; refuses a prompt that starts
    with 13."""

    def __init__(self, die_at: int | None = None, step: int = 3) -> None:
        self._die_at, self._chunks, self.global_steps = die_at, 0, step
        self.priorities: list[int] = []

    async def generate(
        self, prompt_ids, sampling_params, request_id, image_data=None, video_data=None, priority=None
    ):
        self._chunks += 1
        self.priorities.append(priority)
        number = self._chunks
        if prompt_ids[0] == 13:
            raise ValueError("13 brings bad luck")
        await asyncio.sleep(0.002)
        if number == self._die_at:
            os._exit(1)
        out: list[int] = []
        while len(out) < sampling_params["max_tokens"] and (not out or out[-1] != STOP):
            out.append(next_token(list(prompt_ids) + out))
        return TokenOutput(
            token_ids=out,
            log_probs=[-float(t) for t in out],
            stop_reason="completed",
            extra_fields={"global_steps": self.global_steps},
        )


@pytest.fixture(scope="module", autouse=True)
def cluster():
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # Ray's workers cannot import a module that pytest has loaded from its file.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
    yield
    ray.shutdown()


def client(die_at=(None, None), steps=(3, 3), priorities=False, **options):
    make = ray.remote(max_restarts=0)(Server)
    global servers  # an actor ends with the last handle to it
    servers = {f"s{i}": make.options(num_cpus=0).remote(*x) for i, x in enumerate(zip(die_at, steps))}
    router = RouterActor.options(num_cpus=0).remote(
        servers, {"router_class": "verl_seer.rollout.RouterActor"}
    )
    ray.get(router.configure.remote({"chunk_size": 8, **options}, dict.fromkeys(servers, (600, 4))))
    c = SeerClient(
        config=CONFIG, load_balancer_handle=router, stop_ids=frozenset({STOP}), priorities=priorities
    )
    return c, router


async def sample(c, group, session, prompt):
    origin.set(Origin(group, session))
    return await c.generate(f"{group}-{session}", prompt_ids=prompt, sampling_params={"temperature": 0})


def prompts():
    return [(f"g{g}", i, [50 + g, 100 + i]) for g in range(4) for i in range(8)]


@pytest.mark.parametrize("die_at", [(None, None), (5, None), (None, 12)])
def test_chunks_make_the_whole_response_even_if_a_server_dies(die_at):
    c, router = client(die_at)

    async def rollout():
        return await asyncio.gather(*(sample(c, *p) for p in prompts()))

    outputs = asyncio.run(asyncio.wait_for(rollout(), 120))
    want = [whole(prompt) for _, _, prompt in prompts()]
    assert [o.token_ids for o in outputs] == want
    assert all(o.log_probs == [-float(t) for t in o.token_ids] for o in outputs)
    assert {o.extra_fields["min_global_steps"] for o in outputs} == {3}
    # The case that verl's stop reason does not tell: a chunk that ends just at the stop token.
    assert any(len(w) % 8 == 0 and w[-1] == STOP and len(w) < 64 for w in want)
    counts = ray.get(router.last_rollout.remote())
    assert counts["requests"] == 32 and counts["tokens"] == sum(map(len, want))
    assert counts["chunks"] == sum(-(-len(w) // 8) for w in want)
    assert (counts["lost"] > 0) == (die_at != (None, None))
    assert len(ray.get(router.get_all_servers.remote())) == die_at.count(None)


@pytest.mark.parametrize("priorities", [False, True])
def test_engines_that_schedule_by_priority_are_told_the_order(priorities):
    """The first of each group is its probe, and before all others."""
    c, _ = client(priorities=priorities)

    async def rollout():
        return await asyncio.gather(*(sample(c, *p) for p in prompts()))

    asyncio.run(asyncio.wait_for(rollout(), 120))
    told = [n for s in servers.values() for n in ray.get(s.__ray_call__.remote(lambda actor: actor.priorities))]
    if not priorities:
        assert set(told) == {None}
        return
    probes = [n + PROBES_FIRST for n in told if n < -1000]
    assert probes.count(0) == 4 and all(n % 8 == 0 for n in probes)  # by what they have generated so far
    others = [n for n in told if n >= -1000]
    assert len(others) > 28 and all(-64 <= n < 0 for n in others)  # minus what the group is thought to grow to


def test_servers_with_other_weights_are_refused():
    """Before a rollout, and where it happens in one: no response is made of two policies."""
    c, _ = client(steps=(3, 4), affinity_spread=0)
    with pytest.raises(ValueError, match=r"disagree on their weights.*s0 has those of step 3, s1 .* of step 4"):
        same_weights(servers)

    async def rollout():
        return await asyncio.gather(*(sample(c, *p) for p in prompts()), return_exceptions=True)

    outputs = asyncio.run(asyncio.wait_for(rollout(), 120))
    refused = [o for o in outputs if isinstance(o, ValueError)]
    assert refused and all("weights of steps" in str(o) for o in refused)
    mixed = [o for o in outputs if o not in refused and o.extra_fields["global_steps"] not in (3, 4)]
    assert not mixed
    client()
    same_weights(servers)


def test_an_error_of_a_request_is_its_own():
    c, router = client()

    async def rollout():
        return await asyncio.gather(
            sample(c, "g", 0, [50, 1]), sample(c, "g", 1, [13, 1]), return_exceptions=True
        )

    good, bad = asyncio.run(asyncio.wait_for(rollout(), 60))
    assert good.token_ids == whole([50, 1])
    assert "13 brings bad luck" in str(bad)
    assert len(ray.get(router.get_all_servers.remote())) == 2
    assert ray.get(router.get_total_inflight.remote()) == 0


def test_when_all_servers_die_the_error_says_so():
    c, _ = client((1, 1))

    async def rollout():
        return await asyncio.gather(*(sample(c, *p) for p in prompts()), return_exceptions=True)

    errors = asyncio.run(asyncio.wait_for(rollout(), 120))
    assert all("No available servers" in str(e) for e in errors)


def test_what_cannot_be_divided_runs_whole():
    """Through verl's own client and our router's plain methods: a stop string, which is matched in one text."""
    c, router = client()

    async def rollout():
        params = {"temperature": 0, "stop": ["x"], "max_tokens": 64}
        return await c.generate("a", prompt_ids=[50, 2], sampling_params=params)

    assert asyncio.run(rollout()).token_ids == whole([50, 2])
    assert ray.get(router.last_rollout.remote())["requests"] == 0
