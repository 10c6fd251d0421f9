"""A script of a user of 0.16, on real megatron.core and the stand-in for its `megatron.training`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1]))

import cpu_platform

cpu_platform.install()

import tiny  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.training import global_vars  # noqa: E402
from megatron.training.arguments import parse_args, validate_args  # noqa: E402
from megatron.training.training import setup_optimizer  # noqa: E402

if __name__ == "__main__":
    global_vars.ARGS.append(validate_args(parse_args()))
    dist.init_process_group("gloo")
    case = tiny.Case()
    tiny.start(case)
    model = tiny.build_model(case)
    optimizer = setup_optimizer([model], lr=0.02)
    for step, row in enumerate(tiny.train(model, optimizer, tiny.batches(), 3), 1):
        print(
            f"iteration {step} loss {row['loss']:.6f} decay {optimizer.param_groups[0]['weight_decay']}",
            flush=True,
        )
    dist.destroy_process_group()
