"""`kimi-stack seer`: simulate rollouts under Seer's scheduling and its rivals, and draw the results."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.bar import Bar
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

app = typer.Typer(
    help="Seer's rollout scheduling: simulate a rollout under several policies, and draw the result.",
    no_args_is_help=True,
)


def _fail(message: object) -> NoReturn:
    Console(stderr=True).print(f"[bold red]error:[/] {message}", highlight=False, soft_wrap=True)
    raise typer.Exit(2)


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(help="JSON file to write; the page goes beside it as .html.")],
    workload: Annotated[
        str,
        typer.Option(
            "--workload",
            "-w",
            help="moonlight, qwen2-vl-72b or kimi-k2: the paper's, cluster included.",
        ),
    ] = "moonlight",
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Your own lengths instead: JSONL with group, prompt_tokens, tokens and optionally max_tokens "
            "a line. The cluster is still --workload's."
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", "-p", help="A policy to run; repeat for several. All by default."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(min=1, help="Responses a prompt. Default: the workload's.")
    ] = None,
    correlation: Annotated[
        float | None, typer.Option(help="How alike a group's lengths are, 0 to 1. Default: the workload's.")
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Requests. Default: the workload's.")] = None,
    instances: Annotated[
        int | None, typer.Option(min=1, help="Inference instances. Default: the workload's.")
    ] = None,
    kv_tokens: Annotated[
        int | None, typer.Option(min=1, help="KV memory of an instance, in tokens. Default: the workload's.")
    ] = None,
    chunk_size: Annotated[int, typer.Option(min=1, help="Tokens of a chunk of divided rollout.")] = 4096,
    balancer: Annotated[
        str, typer.Option(help="Router of the stock policies: ours (a description of verl's) or verl.")
    ] = "ours",
    seed: Annotated[int, typer.Option(help="Seed of the lengths and of the router.")] = 0,
    html: Annotated[bool, typer.Option("--html/--no-html", help="Write the page as well.")] = True,
) -> None:
    """Simulate one rollout under each policy, and write the figures and a page with charts.

    Policies: group-level (whole groups, as old verl did), stock (verl 0.9.1: single requests, least in flight),
    stock+priority, stock+suffix (speculative decoding from one suffix tree an engine), divided, divided+round-robin,
    divided+context, seer (with grouped speculative decoding), oracle (true lengths known).

    Example: kimi-stack seer simulate moonlight.json -p group-level -p stock -p seer
    """
    from verl_seer.simulate.balancers import LeastInFlight, verl_balancer
    from verl_seer.simulate.presets import WORKLOADS, policies
    from verl_seer.simulate.study import compare, document
    from verl_seer.simulate.workload import read_trace, synthesize

    if workload not in WORKLOADS:
        _fail(f"--workload must be one of {', '.join(WORKLOADS)}, got {workload!r}")
    if balancer not in ("ours", "verl"):
        _fail(f"--balancer must be ours or verl, got {balancer!r}")
    known = policies(chunk_size, verl_balancer if balancer == "verl" else LeastInFlight)
    chosen = list(dict.fromkeys(policy or known))
    unknown = [name for name in chosen if name not in known]
    if unknown:
        _fail(f"--policy must be one of {', '.join(known)}, got {unknown[0]!r}")
    if trace is not None and (group_size or correlation is not None or requests):
        _fail("--group-size, --correlation and --requests make lengths; they do not go with --trace")
    if not out.parent.is_dir():
        _fail(f"{out.parent} is not a folder: make it first")
    if out.suffix == ".html":
        _fail(f"{out}: name the JSON file; the page goes beside it as {out.with_suffix('.html')}")
    preset = WORKLOADS[workload]
    changes: dict[str, Any] = {"instances": instances, "kv_capacity": kv_tokens}
    cluster = dataclasses.replace(preset.cluster, **{k: v for k, v in changes.items() if v is not None})
    if requests is not None:
        preset = dataclasses.replace(preset, requests=requests)
    settings: dict[str, object] = {"seed": seed, "chunk size": chunk_size, "balancer": balancer}
    try:
        if trace is not None:
            samples, title = read_trace(trace), f"{trace.name} on {workload}'s instances"
        else:
            samples = synthesize(preset, seed, group_size, correlation)
            title = f"{preset.paper}, groups of {group_size or preset.group_size}"
            rho = preset.correlation if correlation is None else correlation
            settings |= {"correlation": rho, "sigma": preset.sigma, "paper": preset.paper}
        outcomes = _with_progress(
            lambda report: compare(samples, cluster, {n: known[n] for n in chosen}, seed, report), chosen
        )
    except (ValueError, OSError) as error:
        _fail(error)
    except ImportError as error:
        _fail(f"--balancer verl: {error}: install verl 0.9.1 with its dependencies, or use --balancer ours")
    body = document(title, samples, cluster, outcomes, settings)
    out.write_text(json.dumps(body) + "\n", encoding="utf-8")
    _print(body)
    Console().print(f"wrote {out}")
    if html:
        _write_page(body, out.with_suffix(".html"))


@app.command()
def report(
    result: Annotated[Path, typer.Argument(help="JSON file of `kimi-stack seer simulate`.")],
    out: Annotated[
        Path | None, typer.Argument(help="Page to write. Default: beside the result, as .html.")
    ] = None,
) -> None:
    """Draw a result as one HTML page: figures beside the paper's, instances over time, tail, KV use.

    Example: kimi-stack seer report moonlight.json
    """
    from verl_seer.simulate.study import check_document

    try:
        body = check_document(json.loads(result.read_text(encoding="utf-8")), str(result))
    except OSError as error:
        _fail(error)
    except json.JSONDecodeError as error:
        _fail(f"{result}: not JSON: {error}")
    except ValueError as error:
        _fail(error)
    _print(body)
    _write_page(body, out or result.with_suffix(".html"))


@app.command()
def top(
    once: Annotated[bool, typer.Option("--once", help="Show the present state and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --once: as JSON.")] = False,
    pid: Annotated[
        int | None, typer.Option(min=1, help="Process of the router. Default: the one that wrote last.")
    ] = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Watch a running rollout: instances, groups, throughput. On the router's machine, as its user; Ctrl-C ends it.

    Example: kimi-stack seer top --once --json
    """
    from verl_seer.live import FOLDER, folder, read

    if as_json and not once:
        _fail("--json goes with --once")
    where = folder()
    if where is None:
        _fail(f"{FOLDER} is off: no status is written")
    try:
        body = read(where, pid)
        if as_json:
            print(json.dumps(body, indent=1))
        elif once:
            Console().print(_view(body))
        else:
            console = Console()
            if not console.is_terminal:  # a pipe or a file: one view after the other
                while True:
                    console.print(_view(read(where, pid)))
                    time.sleep(interval)
            with Live(_view(body), console=console, auto_refresh=False) as live:
                while True:
                    time.sleep(interval)
                    live.update(_view(read(where, pid)), refresh=True)
    except ValueError as error:
        _fail(error)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def _view(body: dict[str, Any], groups: int = 20) -> Group:
    """The live view: a line of sums, instances, and the unfinished groups that are estimated longest."""
    counts = body["counts"]
    state = "ended" if body["ended"] else "running"
    head = (
        f"process {body['pid']}, {state}, {max(0.0, time.time() - body['written']):.0f} s ago: "
        f"{counts['requests'] - body['unfinished']:,} of {counts['requests']:,} requests finished, "
        f"{body['waiting']:,} wait; {counts['tokens']:,} tokens in {counts['chunks']:,} chunks, "
        f"{body['tokens_per_second']:,.0f} tokens/s; {counts['moved']:,} moved, {counts['lost']:,} lost"
    )
    instances = Table(title="instances", title_justify="left")
    instances.add_column("id", overflow="fold")
    instances.add_column("running", justify="right")
    instances.add_column("KV reserved", justify="right")
    instances.add_column("")
    for x in body["instances"]:
        share = x["kv_reserved"] / x["kv_capacity"]
        bar = Bar(1.0, 0, share, width=20)
        instances.add_row(escape(x["id"]), f"{x['running']} of {x['max_running']}", f"{share:.0%}", bar)
    shown = body["groups"][:groups]
    table = Table(
        title=f"groups: {body['groups_finished']:,} finished, {len(shown)} of {body['groups_unfinished']:,} others",
        title_justify="left",
    )
    table.add_column("id", overflow="fold")
    for column in ("finished", "running", "tokens", "estimate"):
        table.add_column(column, justify="right")
    for g in shown:
        estimate = f"{g['estimate']:,}" if g["known"] else f"limit {g['estimate']:,}"
        finished = f"{g['finished']} of {g['requests']}"
        table.add_row(escape(g["id"]), finished, str(g["running"]), f"{g['generated']:,}", estimate)
    return Group(head, instances, table)


def _with_progress(run: Any, names: list[str]) -> Any:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as progress:
        tasks = {name: progress.add_task(name, total=None) for name in names}
        return run(lambda name, done, total: progress.update(tasks[name], completed=done, total=total))


def _print(body: dict[str, Any]) -> None:
    table = Table(title=body["title"], title_justify="left")
    table.add_column("policy")
    for column in ("rollout s", "tokens/s", "tail s", "preemptions", "idle", "KV use"):
        table.add_column(column, justify="right")
    for name, p in body["policies"].items():
        table.add_row(
            name,
            f"{p['makespan']:,.0f}",
            f"{p['throughput']:,.0f}",
            f"{p['tail']:,.0f}",
            f"{p['preemptions']:,}",
            f"{p['idle_share']:.0%}",
            f"{p['kv_use']:.0%}",
        )
    Console().print(table)


def _write_page(body: dict[str, Any], path: Path) -> None:
    from verl_seer.simulate.report import page

    try:
        text = page(body)
    except RuntimeError as error:
        _fail(error)
    except (KeyError, TypeError) as error:
        _fail(f"the result is damaged ({error!r}): simulate again")
    path.write_text(text, encoding="utf-8")
    Console().print(f"wrote {path}")
