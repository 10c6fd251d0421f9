"""The jobs of each number of processes (see worker.py), and which checkpoints they share."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from launcher import Job

TAU = 0.05  # the small models' logits reach it, so that clipping is part of every run
SHARDINGS = ("fully_reshardable", "dp_reshardable")  # formats that both versions can read and write
CLIPS = {"tau": TAU}
NO_CLIP = {"tau": float("inf")}


def setup(model: str = "gpt", muon: dict[str, Any] | None = None, **case: Any) -> dict[str, Any]:
    return {"case": {"model": model, **case}, "muon": CLIPS | (muon or {})}


def train(model: str = "gpt", muon: dict[str, Any] | None = None, **case: Any) -> Job:
    return "train", setup(model, muon, **case)


def newer() -> bool:
    """Megatron 0.19 and later."""
    version = importlib.import_module("megatron.core.package_info").__version__
    return tuple(int(x) for x in version.split(".")[:2]) >= (0, 19)


def one_step(model: str = "gpt", muon: dict[str, Any] | None = None, **case: Any) -> Job:
    return "one_step", setup(model, NO_CLIP | (muon or {}), **case)


def float16(**case: Any) -> Job:
    """Dynamic loss scaling from a scale that these models' gradients fit."""
    return "train", {**setup(fp16=True, **case), "optimizer": {"initial_loss_scale": 2.0**16}}


def one(folder: Path) -> dict[str, Job]:
    jobs: dict[str, Job] = {
        **{model: train(model) for model in ("gpt", "mla", "moe", "mtp")},
        "deep": train(layers=4),
        "bf16": train(bf16=True),
        "fp16": float16(),
        "loss scaling": ("loss_scaling", setup(fp16=True)),
        "bfloat16 arithmetic": train(bf16=True, muon={"dtype": "bfloat16"}),
        "unclipped": train(muon={"tau": float("inf")}),
        "states": ("states", {"case": {}}),
        "states with a pattern": ("states", {"case": {}, "muon": {"adamw": ["*.linear_fc1.weight"]}}),
        "step gpt": one_step(),
        "step gpt, per head": one_step(muon={"per_head": True}),
        "step mla": one_step("mla"),
        "step moe": one_step("moe"),
        "step, no Nesterov": one_step(muon={"nesterov": False}),
        "clip gpt": ("clip_like_upstream", {"case": {"bf16": True}, "tau": 1.0, "alpha": 0.5}),
        "clip gpt, alpha": ("clip_like_upstream", {"case": {"bf16": True}, "tau": 1.0, "alpha": 0.25}),
        "clip mla": (
            "clip_like_upstream",
            {"case": {"model": "mla", "bf16": True}, "tau": 1.0, "alpha": 0.5},
        ),
        "upstream in fp32": ("upstream_clip", {"case": {}, "tau": 1.0}),
        **{
            f"clip holds {m}": ("clip_holds", {"case": {"model": m, "init_scale": 0.4}, "tau": 0.5})
            for m in ("gpt", "mla", "mtp")
        },
        "skipped": ("skipped", {"case": {"bf16": True}, "tau": TAU}),
        "learning rates": ("learning_rates", setup(muon=NO_CLIP)),
        "itself": ("self_reported", setup()),
        "plain state, fp32": ("plain_state_dict", setup()),
        "plain state, bf16": ("plain_state_dict", setup(bf16=True)),
        "save fp32": ("save", {"folder": str(folder / "fp32"), **setup()}),
        "resume fp32": ("resume", {"folder": str(folder / "fp32"), **setup()}),
        "save bf16": ("save", {"folder": str(folder / "bf16"), **setup(bf16=True)}),
        "resume bf16": ("resume", {"folder": str(folder / "bf16"), **setup(bf16=True)}),
        "reshard 2 to 1": (
            "resume",
            {"folder": str(folder / "fully_reshardable"), **setup(distributed=True)},
        ),
        "reshard tp 2 to 1": ("resume", {"folder": str(folder / "tensor"), **setup()}),
        "save AdamW": ("save", {"folder": str(folder / "adamw"), "plain": True, "case": {}}),
        "resume AdamW": ("resume", {"folder": str(folder / "adamw"), **setup()}),
        "save AdamW, sharded": (
            "save",
            {"folder": str(folder / "adamw-sharded"), "plain": True, "case": {"distributed": True}},
        ),
        "resume AdamW, sharded": (
            "resume",
            {"folder": str(folder / "adamw-sharded"), **setup(distributed=True)},
        ),
        **refused(),
    }
    if newer():
        jobs["hybrid"] = ("hybrid", {"case": {}})
    return jobs


def refused() -> dict[str, Job]:
    """What must not start."""
    return {
        "refuse tau": ("train", {"case": {}, "muon": {"tau": 0.0}}),
        "refuse window": ("train", {"case": {}, "model": {"window_size": [4, 0]}}),
        "refuse graphs": ("train", {"case": {}, "later": {"cuda_graph_impl": "local"}}),
        "refuse contexts": ("train", {"case": {}, "later": {"context_parallel_size": 2}}),
        "refuse coefficients": ("train", {"case": {}, "muon": {"coefficients": "quintic"}}),
        "refuse sgd": ("train", {"case": {}, "optimizer": {"optimizer": "sgd"}}),
        "refuse L2": ("train", {"case": {}, "optimizer": {"decoupled_weight_decay": False}}),
        "refuse overlap": (
            "train",
            {"case": {}, "optimizer": {"overlap_param_gather_with_optimizer_step": True}},
        ),
    }


def two(folder: Path) -> dict[str, Job]:
    return {
        "tp": train(tp=2),
        "tp, everywhere": train(tp=2, muon={"once": False}),
        "dp": train(),
        "dp, everywhere": train(muon={"once": False}),
        "zero": train(distributed=True),
        "zero, everywhere": train(distributed=True, muon={"once": False}),
        "zero, bf16": train(distributed=True, bf16=True),
        "zero, buckets": train(distributed=True, bucket=3000),
        "zero, overlap": train(distributed=True, bucket=3000, overlap=True),
        "dp, overlap": train(bucket=3000, overlap=True),
        "pp": train(pp=2),
        "pp, interleaved": train(pp=2, vpp=2, layers=4),
        "zero, fp16": float16(distributed=True),
        "loss scaling": ("loss_scaling", setup(distributed=True, fp16=True)),
        "moe, ep": train("moe", ep=2),
        "moe, ep, zero": train("moe", ep=2, distributed=True),
        "mtp, tp": train("mtp", tp=2),
        "bfloat16 zero": train(distributed=True, bf16=True, muon={"dtype": "bfloat16"}),
        "step gpt": one_step(tp=2),
        "step gpt, per head": one_step(tp=2, muon={"per_head": True}),
        "step mla": one_step("mla", tp=2),
        "step mla, zero": one_step("mla", distributed=True),
        "step moe": one_step("moe", ep=2, distributed=True),
        "upstream with shards": ("upstream_clip", {"case": {"bf16": True, "distributed": True}, "tau": 1.0}),
        "clip holds": (
            "clip_holds",
            {"case": {"distributed": True, "bf16": True, "init_scale": 0.4}, "tau": 0.5},
        ),
        "states": ("states", setup(distributed=True)),
        "refuse groups": ("train", {"case": {"tp": 2}, "model": {"num_query_groups": 1}}),
        **{f"save {kind}": ("save", checkpoint(folder, kind)) for kind in SHARDINGS},
        **{f"resume {kind}": ("resume", checkpoint(folder, kind)) for kind in SHARDINGS},
        "save tp": ("save", {"folder": str(folder / "tensor"), **setup(tp=2)}),
        "resume tp": ("resume", {"folder": str(folder / "tensor"), **setup(tp=2)}),
        "save moe": ("save", {"folder": str(folder / "moe"), **setup("moe", ep=2, distributed=True)}),
        "resume moe": ("resume", {"folder": str(folder / "moe"), **setup("moe", ep=2, distributed=True)}),
    }


def checkpoint(folder: Path, kind: str) -> dict[str, Any]:
    return {"folder": str(folder / kind), "sharding": kind, **setup(distributed=True, bf16=False)}


def four(folder: Path) -> dict[str, Job]:
    return {
        "tp, dp": train(tp=2),
        "tp, zero": train(tp=2, distributed=True),
        "tp, pp": train(tp=2, pp=2),
        "zero, pp, interleaved": train(distributed=True, pp=2, vpp=2, layers=4),
        "moe, tp, ep": one_step("moe", tp=2, ep=2, distributed=True),
        "reshard dp 2 to tp 2, dp 2": (
            "resume",
            {"folder": str(folder / "fully_reshardable"), **setup(tp=2, distributed=True)},
        ),
        "reshard dp 2 to 4": (
            "resume",
            {
                "folder": str(folder / "dp_reshardable"),
                "sharding": "dp_reshardable",
                **setup(distributed=True),
            },
        ),
    }
