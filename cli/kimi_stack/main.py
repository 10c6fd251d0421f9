"""`kimi-stack`: one command whose sub-commands come from the installed packages.

A package adds a sub-command with an entry point in the group `kimi_stack.commands`
(`name = "module:typer_app"`), so this file imports none of them.
"""

from __future__ import annotations

import importlib.metadata

import typer

from kimi_stack import doctor as _doctor

app = typer.Typer(
    name="kimi-stack",
    help="Moonshot AI's published systems as plugins for vLLM, SGLang, Megatron, verl and NIXL.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("doctor")(_doctor.doctor)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"kimi-stack {importlib.metadata.version('kimi-stack')}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


def _mount_commands() -> None:
    for entry in sorted(importlib.metadata.entry_points(group="kimi_stack.commands"), key=lambda e: e.name):
        try:
            app.add_typer(entry.load(), name=entry.name)
        except ImportError as error:
            typer.echo(f"kimi-stack: the command '{entry.name}' cannot load: {error}", err=True)


def main() -> None:
    """Entry point of the `kimi-stack` script."""
    _mount_commands()
    app()


if __name__ == "__main__":
    main()
