"""Links to break: two network namespaces of this machine, joined by several links of a chosen rate.

    kimi-stack tent lab up --links 2 --mbit 800
    ip netns exec tent-b python receiver.py &
    ip netns exec tent-a python sender.py
    kimi-stack tent lab rate 1 200; kimi-stack tent lab cut 1; kimi-stack tent lab heal 1
    kimi-stack tent lab down

Needs root, `ip` and `tc` (Debian: iproute2). Nothing outside the two namespaces is touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

# Enough for a queue of some milliseconds; a deeper one only adds delay, as in any network.
QUEUE_MS = 10
# More than the largest packet that TCP hands to a device: smaller buckets make the kernel cut each into frames by
# itself, as no network card has it do, and two cores are busy with that before 1.6 Gbit/s.
BURST_BYTES = 256 << 10
NOWHERE = "02:00:00:00:00:99"  # a hardware address that no interface has


class LabError(RuntimeError):
    """The lab cannot do what it was asked to; the message says what is missing."""


@dataclass(frozen=True)
class Lab:
    """Two namespaces, `<name>-a` and `<name>-b`; link i has the addresses 10.77.i.1 and 10.77.i.2."""

    name: str = "tent"

    @property
    def sides(self) -> tuple[str, str]:
        return f"{self.name}-a", f"{self.name}-b"

    def up(self, links: int, mbit: float) -> None:
        """Make the namespaces and `links` links of `mbit` Mbit/s in each direction.

        Raises:
            ValueError: links outside 1 to 64, or a rate below 1 kbit/s.
            LabError: no root rights, tools or kernel support, or the lab is up already.
        """
        if not 1 <= links <= 64:
            raise ValueError(f"links must be 1 to 64, got {links}")
        _check_rate(mbit)
        check_possible()
        if self.exists():
            raise LabError(f"lab '{self.name}' is up already: take it down first")
        try:
            for side in self.sides:
                _run("ip", "netns", "add", side)
                self._ip(side, "link", "set", "lo", "up")
            for index in range(links):
                a, b = self.sides
                self._ip(
                    a,
                    "link",
                    "add",
                    f"link{index}",
                    "type",
                    "veth",
                    "peer",
                    "name",
                    f"link{index}",
                    "netns",
                    b,
                )
                for number, side in enumerate(self.sides, start=1):
                    self._ip(side, "addr", "add", f"10.77.{index}.{number}/24", "dev", f"link{index}")
                    self._ip(side, "link", "set", f"link{index}", "up")
                self.rate(index, mbit)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Remove the namespaces and with them the links; no error where there are none."""
        for side in self.sides:
            subprocess.run(["ip", "netns", "del", side], capture_output=True, check=False)

    def exists(self) -> bool:
        listed = _run("ip", "netns", "list").split()
        return any(side in listed for side in self.sides)

    def rate(self, link: int, mbit: float) -> None:
        """Give a link another rate, in both directions, while it carries traffic."""
        _check_rate(mbit)
        for side in self.sides:
            shape = (f"{mbit}mbit", "burst", str(BURST_BYTES), "latency", f"{QUEUE_MS}ms")
            self._run(side, "tc", "qdisc", "replace", "dev", f"link{link}", "root", "tbf", "rate", *shape)

    def cut(self, link: int) -> None:
        """Take the carrier away, as an unplugged cable does."""
        self._ip(self.sides[0], "link", "set", f"link{link}", "down")

    def hole(self, link: int, direction: Literal["both", "a", "b"] = "both") -> None:
        """Let packets vanish while the carrier stays: those that the named side sends, or both."""
        for number, side in enumerate(self.sides, start=1):
            if direction in ("both", side[-1]):
                other = f"10.77.{link}.{3 - number}"
                self._ip(
                    side,
                    "neigh",
                    "replace",
                    other,
                    "lladdr",
                    NOWHERE,
                    "nud",
                    "permanent",
                    "dev",
                    f"link{link}",
                )

    def heal(self, link: int) -> None:
        """Undo `cut` and `hole`; the rate stays as it is."""
        for number, side in enumerate(self.sides, start=1):
            self._ip(side, "link", "set", f"link{link}", "up")
            other = f"10.77.{link}.{3 - number}"
            subprocess.run(
                ["ip", "-n", side, "neigh", "del", other, "dev", f"link{link}"],
                capture_output=True,
                check=False,
            )

    def command(self, side: Literal["a", "b"], command: Sequence[str]) -> list[str]:
        """The command line that runs `command` on one side."""
        return ["ip", "netns", "exec", f"{self.name}-{side}", *command]

    def _ip(self, side: str, *arguments: str) -> None:
        _run("ip", "-n", side, *arguments)

    def _run(self, side: str, *command: str) -> None:
        _run("ip", "netns", "exec", side, *command)


@contextlib.contextmanager
def running(links: int, mbit: float, name: str | None = None) -> Iterator[Lab]:
    """A lab for the length of a `with` block, under a name of this process."""
    lab = Lab(name or f"tent{os.getpid()}")
    lab.up(links, mbit)
    try:
        yield lab
    finally:
        lab.down()


def check_possible() -> None:
    """Raises LabError where this machine cannot run a lab."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise LabError(f"'{tool}' is missing: install iproute2")
    if os.geteuid() != 0:
        raise LabError("network namespaces need root: run it with sudo")


def _check_rate(mbit: float) -> None:
    if not mbit >= 0.001:
        raise ValueError(f"mbit must be at least 0.001, got {mbit}")


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise LabError(f"{' '.join(command)}: {result.stderr.strip() or result.returncode}")
    return result.stdout
