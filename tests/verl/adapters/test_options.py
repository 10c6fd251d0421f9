"""The options under `seer`: what reaches vLLM, and what is refused."""

from __future__ import annotations

import pytest

from verl_seer.drafting.engine import EngineOptions
from verl_seer.options import SeerOptions


def test_defaults_draft_and_share_no_kv():
    options = SeerOptions.of({})
    assert options.speculative_config() == {
        "method": "custom_class",
        "model": "verl_seer.drafter.SeerDrafter",
        "num_speculative_tokens": 8,
    }
    assert EngineOptions.of(options.additional_config()["seer_drafting"]) == EngineOptions()
    assert options.kv_transfer_config() is None


def test_drafting_off_leaves_nothing():
    options = SeerOptions.of({"seer": {"drafting": False, "draft_tokens": 4}})
    assert options.speculative_config() is None and options.additional_config() is None


def test_options_reach_the_engine():
    given = {"draft_tokens": 3, "draft_adaptive": False, "draft_rule": "printed", "draft_update_seconds": 2}
    options = SeerOptions.of({"seer": {**given, "kv_pool": "/dev/shm/x", "kv_pool_bytes": 5}})
    assert options.speculative_config()["num_speculative_tokens"] == 3
    engine = EngineOptions.of(options.additional_config()["seer_drafting"])
    assert (engine.max_draft, engine.adaptive, engine.rule, engine.update_seconds) == (3, False, "printed", 2)
    pool = options.kv_transfer_config()
    assert pool["kv_connector"] == "SeerKVPool" and pool["kv_role"] == "kv_both"
    assert pool["kv_connector_extra_config"] == {"folder": "/dev/shm/x", "max_bytes": 5}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"drafting": "no"}, "seer.drafting must be true or false, got 'no'"),
        ({"priorities": "high"}, "seer.priorities must be null, true or false, got 'high'"),
        ({"draft_tokens": 0}, "seer.draft_.*: max_draft must be an integer of at least 1, got 0"),
        ({"draft_min_score": 2}, r"min_score must be in \[0, 1\], got 2"),
        ({"kv_pool": True}, "seer.kv_pool must be null or an absolute path, got True"),
        ({"kv_pool": "kv"}, "seer.kv_pool must be null or an absolute path, got 'kv'"),
        ({"kv_pool_bytes": 0}, "seer.kv_pool_bytes must be an integer of at least 1, got 0"),
        ({"draft_paths": 4}, r"seer has unknown options \['draft_paths'\]"),
    ],
)
def test_bad_options_are_named(given, said):
    with pytest.raises(ValueError, match=said):
        SeerOptions.of({"seer": given})


def test_priorities_need_an_engine_that_looks_at_them():
    assert SeerOptions().use_priorities("priority") and not SeerOptions().use_priorities("fcfs")
    assert not SeerOptions(priorities=False).use_priorities("priority")
    assert SeerOptions(priorities=True).use_priorities("priority")
    for policy in ("fcfs", None):
        with pytest.raises(ValueError, match=r"scheduling_policy=priority, got .*set it, or seer.priorities=null"):
            SeerOptions(priorities=True).use_priorities(policy)


def test_the_yaml_names_every_option():
    """Hydra takes no option that is not in the group's file; and its defaults are those of the class."""
    omegaconf = pytest.importorskip("omegaconf")
    from pathlib import Path

    import verl_seer
    from verl_seer import plugin

    plugin.register()
    group = omegaconf.OmegaConf.load(Path(verl_seer.__file__).parent / "config" / "seer" / "rollout.yaml")
    assert SeerOptions.of(group) == SeerOptions()
    assert set(group.seer) == set(SeerOptions.__dataclass_fields__)
    engine = omegaconf.OmegaConf.to_container(group, resolve=True)["actor_rollout_ref"]["rollout"][
        "engine_kwargs"
    ]
    assert '"custom_class"' in engine["vllm"]["speculative_config"]
    assert engine["vllm"]["kv_transfer_config"] is None
    group.seer.drafting = False
    omegaconf.OmegaConf.resolve(group)
    assert set(group.actor_rollout_ref.rollout.engine_kwargs.vllm.values()) == {None}
