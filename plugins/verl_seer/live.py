"""What a running rollout tells about itself: a small file that the router writes and `kimi-stack seer top` reads.

One file a router, named by its process, in a folder that only its user may enter. It is replaced at most once a second,
holds at most `MOST_GROUPS` groups and `MOST_INSTANCES` instances, and goes away with the process. A file that cannot be
written is no reason to stop a rollout: it is said once, and no more is written.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import stat
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl_seer.scheduler import Scheduler
from verl_seer.state import Status

logger = logging.getLogger("verl.seer")

FORMAT = "kimi-stack seer status, version 1"
FOLDER = "KIMI_SEER_STATUS"  # environment variable: the folder, or ``off``
MOST_GROUPS, MOST_INSTANCES, MOST_NAME, MOST_BYTES = 64, 256, 96, 1 << 20
SECONDS = 1.0  # between two writes
WINDOW = 30.0  # seconds over which throughput is taken


def folder() -> Path | None:
    """Where status files are: ``KIMI_SEER_STATUS``, or a folder of this user among temporary files. None: off."""
    given = os.environ.get(FOLDER)
    if given == "off":
        return None
    return Path(given) if given else Path(tempfile.gettempdir()) / f"kimi-seer-{os.getuid()}"


def check_private(path: Path) -> None:
    """PermissionError unless `path` is a folder of this user that nobody else may enter."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(
            f"{path} must be a folder of user {os.getuid()} with mode 0700: remove it, or set {FOLDER}"
        )


def snapshot(scheduler: Scheduler, counts: Mapping[str, int]) -> dict[str, Any]:
    """Instances, and the unfinished groups with the largest estimates; names are cut, numbers are tokens."""
    groups: list[dict[str, Any]] = []
    finished = 0
    for group_id, requests in scheduler.groups():
        done = sum(r.status is Status.FINISHED for r in requests)
        finished += done == len(requests)
        if done < len(requests):
            groups.append(
                {
                    "id": group_id[:MOST_NAME],
                    "requests": len(requests),
                    "running": sum(r.status is Status.RUNNING for r in requests),
                    "finished": done,
                    "generated": sum(r.generated for r in requests),
                    "estimate": scheduler.context.estimate(group_id),
                    "known": scheduler.context.known(group_id),
                }
            )
    instances = [
        {
            "id": x.instance_id[:MOST_NAME],
            "running": len(x.running),
            "max_running": x.max_running,
            "kv_reserved": x.kv_reserved,
            "kv_capacity": x.kv_capacity,
        }
        for x in scheduler.instances()
    ]
    groups.sort(key=lambda g: -g["estimate"])
    return {
        "waiting": scheduler.waiting,
        "unfinished": scheduler.unfinished,
        "counts": dict(counts),
        "instances": instances[:MOST_INSTANCES],
        "instances_all": len(instances),
        "groups": groups[:MOST_GROUPS],
        "groups_unfinished": len(groups),
        "groups_finished": finished,
    }


class StatusFile:
    """Writes the status of one router. Nothing here raises."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._written = float("-inf")
        self._tokens: deque[tuple[float, int]] = deque()
        try:
            where = folder()
            if where is not None:
                where.mkdir(mode=0o700, parents=True, exist_ok=True)
                check_private(where)
                for old in where.glob("*.json"):
                    if not _alive(old):
                        old.unlink(missing_ok=True)
                self._path = where / f"{os.getpid()}.json"
                atexit.register(self._path.unlink, missing_ok=True)
        except OSError as error:
            logger.warning("Seer: no live view: %s", error)

    def update(self, scheduler: Scheduler, counts: Mapping[str, int], ended: bool = False) -> None:
        """Writes, unless it did less than a second ago. `ended`: the rollout's last state, which is always written."""
        now = time.monotonic()
        if self._path is None or (now - self._written < SECONDS and not ended):
            return
        self._written = now
        if self._tokens and counts["tokens"] < self._tokens[-1][1]:
            self._tokens.clear()  # another rollout
        self._tokens.append((now, counts["tokens"]))
        while self._tokens[0][0] < now - WINDOW:
            self._tokens.popleft()
        (first, before), (last, after) = self._tokens[0], self._tokens[-1]
        body = {
            "format": FORMAT,
            "pid": os.getpid(),
            "written": time.time(),
            "ended": ended,
            "tokens_per_second": round((after - before) / (last - first), 1) if last > first else 0.0,
            **snapshot(scheduler, counts),
        }
        try:
            part = self._path.with_suffix(".part")
            part.write_text(json.dumps(body), encoding="utf-8")
            part.replace(self._path)
        except OSError as error:
            logger.warning("Seer: no live view from now on: %s", error)
            self._path = None


def _alive(path: Path) -> bool:
    try:
        os.kill(int(path.stem), 0)
    except (ValueError, ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def read(where: Path, pid: int | None = None) -> dict[str, Any]:
    """The latest status in a folder, or that of one process.

    Raises:
        ValueError: there is none, the folder is not private, or a file is not a status.
    """
    if where.exists():
        try:
            check_private(where)
        except PermissionError as error:
            raise ValueError(str(error)) from None
    found = [p for p in where.glob("*.json") if _alive(p) and pid in (None, int(p.stem))]
    if not found:
        which = "" if pid is None else f" of process {pid}"
        raise ValueError(
            f"no running rollout{which} in {where}: Seer's router writes its status there, on its own machine and "
            f"as its own user; {FOLDER} names another folder"
        )
    bodies = []
    for path in found:
        try:
            with path.open(encoding="utf-8") as file:
                body = json.loads(file.read(MOST_BYTES))
        except FileNotFoundError:  # ended just now
            continue
        except ValueError as error:
            raise ValueError(f"{path}: not a status file: {error}") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(f"{path}: not a status of `{FORMAT}`: was it written by another version?")
        bodies.append(body)
    if not bodies:
        raise ValueError(f"the rollout in {where} has ended")
    return max(bodies, key=lambda b: b["written"])
