"""What running engines say of themselves: snapshots from their metrics sockets, as values and as a table."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from rich.table import Table

TIMEOUT = 2.0
_STYLE = {"up": "green", "stalled": "yellow", "down": "red", "barred": "dim"}


def run_folder() -> Path:
    """Where engines put their sockets: TENT_RUN_DIR, else $XDG_RUNTIME_DIR/kimi-tent, else /tmp/kimi-tent-<uid>."""
    if folder := os.environ.get("TENT_RUN_DIR"):
        return Path(folder)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "kimi-tent"
    return Path(f"/tmp/kimi-tent-{os.getuid()}")


def _ask(path: Path, request: bytes) -> bytes | None:
    """The answer on one socket; None if no engine is behind it any more."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT)
        try:
            connection.connect(str(path))
            connection.sendall(request)
            parts = []
            while part := connection.recv(1 << 16):
                parts.append(part)
        except OSError:
            return None
    return b"".join(parts)


def snapshots(folder: Path | None = None) -> list[dict[str, Any]]:
    """One snapshot per live engine, with its process id under ``pid``."""
    found = []
    for path in sorted((folder or run_folder()).glob("*.sock")):
        if answer := _ask(path, b"json"):
            found.append({"pid": int(path.stem.split("-")[0]), **json.loads(answer)})
    return found


def prometheus(folder: Path | None = None) -> str:
    """The metrics of every live engine in Prometheus' text format. A metric's type is said once, before its values."""
    described: dict[str, list[str]] = {}
    values: dict[str, list[str]] = {}
    for path in sorted((folder or run_folder()).glob("*.sock")):
        answer = _ask(path, b"GET /metrics HTTP/1.0\r\n\r\n")
        if not answer:
            continue
        pid = path.stem.split("-")[0]
        for line in answer.decode().partition("\r\n\r\n")[2].splitlines():
            if line.startswith("#"):
                lines = described.setdefault(line.split()[2], [])
                if line not in lines:
                    lines.append(line)
            else:
                name, _, rest = line.partition("{")
                values.setdefault(name, []).append(f'{name}{{pid="{pid}",{rest}')
    return "".join("\n".join([*described.get(name, []), *lines]) + "\n" for name, lines in values.items())


def table(engines: list[dict[str, Any]]) -> Table:
    """The links of every engine, one a row."""
    grid = Table(title=f"TENT links of {len(engines)} engine(s)", title_justify="left")
    for column in ("engine", "peer", "link", "state"):
        grid.add_column(column)
    for column in (
        "MB/s",
        "queued kB",
        "rtt ms",
        "sent MB",
        "slices",
        "repeated",
        "stalls",
        "deaths",
        "reroute ms",
    ):
        grid.add_column(column, justify="right")
    for engine in engines:
        for peer in engine["peers"]:
            for link in peer["links"]:
                state = f"[{_STYLE.get(link['state'], 'cyan')}]{link['state']}[/]"
                grid.add_row(
                    f"{engine['agent']} ({engine['pid']})", peer["agent"], link["name"], state,
                    f"{link['rate_bytes_per_second'] / 1e6:.1f}", f"{link['queue_bytes'] / 1e3:.0f}",
                    f"{link['round_trip_seconds'] * 1e3:.2f}", f"{link['sent_bytes_total'] / 1e6:.1f}",
                    f"{link['slices_total']:.0f}", f"{link['repeated_slices_total']:.0f}",
                    f"{link['stalls_total']:.0f}", f"{link['deaths_total']:.0f}", f"{link['last_reroute_ms']:.1f}",
                )  # fmt: skip
    return grid
