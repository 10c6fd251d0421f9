"""The status of a rollout: what the router writes, that only its user may read it, and what `seer top` shows."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from verl_seer import live
from verl_seer.cli import app
from verl_seer.router import SeerRouter


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(live.FOLDER, str(tmp_path / "status"))
    monkeypatch.setattr(live, "SECONDS", 0.0)
    return tmp_path / "status"


def run(*args):
    return CliRunner().invoke(app, ["top", *args], env={"COLUMNS": "160"})


async def halfway(finish=False, groups=3):
    """Groups of 4 requests of 20 tokens in chunks of 8 on one server of 4: the first group done, or all."""
    r = SeerRouter({"a[bold]": "handle"}, {"router_class": "x"})
    await r.configure({"chunk_size": 8, "order": "arrival"}, {"a[bold]": (1000, 4)})
    names = [(f"g{g}", f"{g}.{i}") for g in range(groups) for i in range(4)]
    for group, name in names:
        await r.open_request(name, group, 4, 100)
    for _, name in names if finish else names[:4]:
        for new in (8, 8, 4):
            grant = await r.next_chunk(name)
            assert await r.chunk_done(name, grant.server_id, new, new == 4)
    return r


def test_the_view_of_a_rollout_that_runs(folder):
    asyncio.run(halfway())
    assert folder.stat().st_mode & 0o777 == 0o700
    result = run("--once", "--json")
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    assert body["counts"] == {
        "requests": 12, "chunks": 12, "moved": 0, "lost": 0, "tokens": 80, "recomputed": 0
    }  # fmt: skip
    assert (body["unfinished"], body["waiting"], body["ended"], body["pid"]) == (8, 4, False, os.getpid())
    (server,) = body["instances"]
    assert (server["running"], server["max_running"], server["kv_reserved"]) == (4, 4, 4 * 12)
    assert body["groups_finished"] == 1
    assert [(g["id"], g["finished"], g["running"], g["known"], g["estimate"]) for g in body["groups"]] == [
        ("g1", 0, 4, False, 100), ("g2", 0, 0, False, 100)
    ]  # fmt: skip
    text = run("--once").stdout
    assert "4 of 12 requests finished" in text and "a[bold]" in text and "limit 100" in text


def test_the_last_state_of_a_rollout_is_kept(folder, monkeypatch):
    monkeypatch.setattr(live, "SECONDS", 3600.0)
    asyncio.run(halfway(finish=True))
    body = live.read(folder)
    assert body["ended"] and body["unfinished"] == 0 and body["counts"]["tokens"] == 240
    assert body["groups_finished"] == 3 and not body["groups"]


def test_a_file_is_small_however_many_groups_there_are(folder):
    asyncio.run(halfway(groups=500))
    (path,) = folder.glob("*.json")
    body = json.loads(path.read_text())
    assert len(body["groups"]) == live.MOST_GROUPS and body["groups_unfinished"] == 499
    assert path.stat().st_size < 20_000


def test_a_router_without_a_place_to_write_goes_on(folder, monkeypatch, caplog):
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)  # others may enter
    asyncio.run(halfway(finish=True))
    assert "no live view" in caplog.text and "0700" in caplog.text and not list(folder.iterdir())
    assert "must be a folder of user" in run("--once").stderr
    monkeypatch.setenv(live.FOLDER, "off")
    asyncio.run(halfway(finish=True))
    assert "is off" in run("--once").stderr


def test_mistakes_are_explained(folder):
    assert "no running rollout in" in run("--once").stderr
    assert "--json goes with --once" in run("--json").stderr
    folder.mkdir(mode=0o700)
    (folder / f"{os.getpid()}.json").write_text("[]")
    result = run("--once")
    assert result.exit_code == 2 and "not a status" in result.stderr
    (folder / f"{os.getpid()}.json").write_text("{")
    assert "not a status file" in run("--once").stderr
    assert "no running rollout of process 1 in" in run("--once", "--pid", "1").stderr


def test_files_of_processes_that_ended_are_forgotten(folder):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    folder.mkdir(mode=0o700)
    (folder / f"{ended.pid}.json").write_text("{}")
    with pytest.raises(ValueError, match="no running rollout"):
        live.read(folder)
    asyncio.run(halfway())
    assert [p.name for p in folder.iterdir()] == [f"{os.getpid()}.json"]


def test_the_live_view_ends_with_an_interrupt(folder):
    """In a pipe one view comes after the other."""
    asyncio.run(halfway())
    # A job in the background inherits that interrupts are ignored.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "from verl_seer.cli import app; app(['top', '--interval', '0.1'])"
    command = [sys.executable, "-u", "-c", program]
    view = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        seen, deadline = b"", time.monotonic() + 120
        while seen.count(b"requests finished") < 2 and time.monotonic() < deadline:
            if select.select([view.stdout], [], [], 1.0)[0]:
                piece = os.read(view.stdout.fileno(), 1 << 16)
                assert piece, "the view ended by itself"
                seen += piece
        view.send_signal(signal.SIGINT)
        _, error = view.communicate(timeout=120)
    finally:
        view.kill()
    assert seen.count(b"requests finished") >= 2 and b"a[bold]" in seen
    assert view.returncode == 0 and b"Traceback" not in error, error
