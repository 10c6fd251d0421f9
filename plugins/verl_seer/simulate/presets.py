"""The paper's three workloads, and the policies that are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from verl_seer.scheduler import SchedulerConfig
from verl_seer.simulate.balancers import Balancer, LeastInFlight
from verl_seer.simulate.costs import StepModel
from verl_seer.simulate.drafts import Drafting
from verl_seer.simulate.rollout import Divided, Policy, Whole
from verl_seer.simulate.workload import Cluster, Workload

# Requests, group size, mean and greatest length, GPUs per instance: the paper's table of workloads. Bytes of a KV
# token: MLA latents, or 8 KV heads of 128 in 80 layers. KV tokens: the memory of an instance's H800s at 90 %, less
# weights, over those bytes; half of that for Moonlight and Kimi-K2 (fitted: the trainer shares the GPUs). Cost of a
# token: floating point operations at 400 TFLOP/s a GPU; of a KV token: its bytes at 2 TB/s a GPU. Prompts and
# correlation are assumed. `sigma`, `fixed` and `per_request` are fitted so that the group-level baseline has about the
# paper's rollout and tail times; docs/seer.md has both. `speculation` is the mean accepted length over the speed-up of
# the paper's study of speculative decoding: what a step with drafts costs against one without.
WORKLOADS = {
    w.name: w
    for w in (
        Workload(
            "moonlight", 3200, 8, 256, 22386, 65536, 0.7, 0.8,
            Cluster(32, 600_000, 512, StepModel(0.0203, 1.52e-4, 1.5e-5, 1.5e-8, 1e-6, 20_000, 1.6e6, 1.46), 31_104),
            "Moonlight",
        ),
        Workload(
            "qwen2-vl-72b", 9600, 16, 1024, 7615, 40960, 1.1, 0.8,
            Cluster(16, 1_300_000, 1024, StepModel(0.0349, 5.17e-6, 4.5e-5, 2e-8, 1e-6, 20_000, 6e5, 1.56), 327_680),
            "Qwen2-VL-72B",
        ),
        Workload(
            "kimi-k2", 6400, 8, 512, 38959, 98304, 0.5, 0.8,
            Cluster(8, 9_000_000, 2048, StepModel(0.0428, 1.32e-4, 5e-6, 1e-9, 1e-6, 60_000, 1e7, 1.42), 70_272),
            "Kimi-K2",
        ),
    )
}  # fmt: skip


def policies(
    chunk_size: int = 4096, balancer: Callable[[Sequence[str], int], Balancer] = LeastInFlight
) -> dict[str, Policy]:
    """Every policy by name: baselines first, then Seer's techniques added in turn, then the oracle order."""
    grouped = Drafting("group", multi_path=True)
    return {
        "group-level": Whole("group"),
        "stock": Whole(balancer=balancer),
        "stock+priority": Whole(order="priority", balancer=balancer),
        "stock+suffix": Whole(balancer=balancer, drafting=Drafting("instance", length=8)),
        "divided": Divided(SchedulerConfig(chunk_size, "arrival", fairness_period=0)),
        "divided+round-robin": Divided(SchedulerConfig(chunk_size, "round-robin", fairness_period=0)),
        "divided+context": Divided(SchedulerConfig(chunk_size, "context")),
        "divided+exposure": Divided(SchedulerConfig(chunk_size, "context", estimate="exposure")),
        "seer": Divided(SchedulerConfig(chunk_size, "context"), grouped),
        "seer+exposure": Divided(SchedulerConfig(chunk_size, "context", estimate="exposure"), grouped),
        "oracle": Divided(SchedulerConfig(chunk_size, "oracle")),
    }


BASELINE = "group-level"
