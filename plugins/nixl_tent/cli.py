"""`kimi-stack tent`: put the plugin into NIXL, look at running engines, make links to break."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import typer
from rich.console import Console
from rich.live import Live

from nixl_tent import compat, doctor, install, lab, top

app = typer.Typer(no_args_is_help=True, help="TENT, a NIXL backend over several links: install, watch, try.")
lab_app = typer.Typer(
    no_args_is_help=True, help="Links to break, in two network namespaces of this machine (root)."
)
app.add_typer(lab_app, name="lab")

_LINK = typer.Argument(min=0, max=63, help="Number of the link, from 0.")
_NAME = typer.Option("tent", "--name", help="Name of the lab; its sides are NAME-a and NAME-b.")


def _fail(message: object) -> typer.Exit:
    typer.echo(f"kimi-stack tent: {message}", err=True)
    return typer.Exit(1)


def _installed() -> list[compat.Nixl]:
    found = compat.installed()
    if not found:
        raise _fail("there is no nixl-cu12 or nixl-cu13 in this environment: pip install nixl-cu13")
    return found


@app.command("install")
def install_command() -> None:
    """Put the plugin into every NIXL of this environment; again after NIXL or kimi-stack was updated."""
    for nixl in _installed():
        try:
            target = install.install(nixl)
        except (ValueError, OSError) as error:
            raise _fail(error) from error
        typer.echo(f"{nixl.distribution} {nixl.version}: {target}")


@app.command("uninstall")
def uninstall_command() -> None:
    """Take the plugin out of every NIXL of this environment."""
    for nixl in _installed():
        try:
            removed = install.uninstall(nixl)
        except OSError as error:
            raise _fail(error) from error
        typer.echo(f"{nixl.distribution} {nixl.version}: {'removed' if removed else 'was not there'}")


@app.command("doctor")
def doctor_command(
    as_json: bool = typer.Option(False, "--json", help="Print the rows as JSON."),
) -> None:
    """Check every NIXL of this environment, and send something through each that has the plugin."""
    rows = doctor.report()
    if not any(row.status == "fail" for row in rows):
        rows += doctor.check_rows()
    if as_json:
        typer.echo(json.dumps([vars(row) for row in rows], indent=1))
    else:
        for row in rows:
            fix = f"  → {row.fix}" if row.fix and row.status != "ok" else ""
            typer.echo(f"{row.status:5} {row.subject}: {row.detail}{fix}")
    if any(row.status == "fail" for row in rows):
        raise typer.Exit(1)


@app.command("top")
def top_command(
    every: float = typer.Option(1.0, "--every", min=0.05, help="Seconds between two looks."),
    once: bool = typer.Option(False, "--once", help="Print one table and end."),
    as_json: bool = typer.Option(False, "--json", help="Print one snapshot as JSON and end."),
) -> None:
    """Live links of the engines of this user: rate, queue, health."""
    if as_json:
        typer.echo(json.dumps(top.snapshots(), indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    if once:
        console.print(top.table(top.snapshots()))
        return
    with Live(top.table(top.snapshots()), console=console, screen=console.is_terminal) as live:
        try:
            while True:
                time.sleep(every)
                live.update(top.table(top.snapshots()), refresh=True)
        except KeyboardInterrupt:
            pass


@app.command("metrics")
def metrics_command() -> None:
    """The same in Prometheus' text format, e.g. for node_exporter's textfile collector."""
    typer.echo(top.prometheus(), nl=False)


def _in_lab(act: Callable[[], None], done: str) -> None:
    try:
        act()
    except (lab.LabError, ValueError) as error:
        raise _fail(error) from error
    typer.echo(done)


@lab_app.command("up")
def lab_up(
    links: int = typer.Option(2, "--links", min=1, max=64, help="How many links."),
    mbit: float = typer.Option(800.0, "--mbit", help="Rate of each, Mbit/s."),
    name: str = _NAME,
) -> None:
    """Make two namespaces and the links between them."""
    made = lab.Lab(name)
    _in_lab(
        lambda: made.up(links, mbit),
        f"{links} links of {mbit:g} Mbit/s; run the two sides with\n"
        f"  ip netns exec {made.sides[0]} COMMAND\n  ip netns exec {made.sides[1]} COMMAND",
    )


@lab_app.command("down")
def lab_down(name: str = _NAME) -> None:
    """Remove them."""
    _in_lab(lab.check_possible, f"lab '{name}' is gone")
    lab.Lab(name).down()


@lab_app.command("rate")
def lab_rate(link: int = _LINK, mbit: float = typer.Argument(help="Mbit/s"), name: str = _NAME) -> None:
    """Change the rate of a link."""
    _in_lab(lambda: lab.Lab(name).rate(link, mbit), f"link {link}: {mbit:g} Mbit/s")


@lab_app.command("cut")
def lab_cut(link: int = _LINK, name: str = _NAME) -> None:
    """Take the carrier of a link away."""
    _in_lab(lambda: lab.Lab(name).cut(link), f"link {link} is cut")


@lab_app.command("hole")
def lab_hole(
    link: int = _LINK,
    direction: str = typer.Option(
        "both", "--from", help="Lose the packets of side a, of side b, or of both."
    ),
    name: str = _NAME,
) -> None:
    """Let the packets of a link vanish while its carrier stays."""
    if direction not in ("a", "b", "both"):
        raise _fail(f"--from must be a, b or both, got '{direction}'")
    _in_lab(lambda: lab.Lab(name).hole(link, direction), f"link {link} is a black hole")  # type: ignore[arg-type]


@lab_app.command("heal")
def lab_heal(link: int = _LINK, name: str = _NAME) -> None:
    """Undo `cut` and `hole`."""
    _in_lab(lambda: lab.Lab(name).heal(link), f"link {link} is healed")
