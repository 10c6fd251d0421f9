"""Stand-in for a file of megatron.training 0.16, which no wheel has: what our hook replaces."""

from __future__ import annotations

import argparse


def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--adam-beta2", type=float, default=0.999)
    parser.add_argument("--log-interval", type=int, default=1)
    return parser


def parse_args() -> argparse.Namespace:
    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args()


def validate_args(args: argparse.Namespace, defaults: dict | None = None) -> argparse.Namespace:
    return args
