"""Stand-in, see arguments.py."""

from __future__ import annotations

import argparse
from typing import Any

ARGS: list[argparse.Namespace] = []


def get_args() -> argparse.Namespace:
    return ARGS[0]


def get_tensorboard_writer() -> Any:
    return None


def get_wandb_writer() -> Any:
    return None
