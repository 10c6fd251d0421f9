"""A NIXL agent with one backend and host memory, and transfers that end or fail."""

from __future__ import annotations

import importlib
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

from nixl_tent import compat, discovery

Row = tuple[int, int]  # address, bytes
Operation = Literal["READ", "WRITE"]


class TransferError(RuntimeError):
    """A transfer failed or its peer is silent; the message names the peer."""


def nixl_api() -> ModuleType:
    """The Python API of the installed NIXL, which knows TENT from then on.

    Raises:
        ImportError: there is none that TENT fits.
    """
    discovery.watch()
    usable = [nixl.module for nixl in compat.installed() if nixl.problem() is None]
    # One that the stack has imported already comes first: two NIXLs in a process would be two of everything.
    for module in sorted(usable, key=lambda name: name not in sys.modules):
        return importlib.import_module(f"{module}._api")
    raise ImportError(
        "no NIXL from 1.0 to below 2.0 in this environment: pip install nixl-cu13 (or nixl-cu12)"
    )


class Agent:
    """One NIXL agent.

    Args:
        backend: NIXL's name of the backend that carries everything.
        options: its parameters; for TENT those of docs/tent.md.
        name: how peers call it; by default a name that nothing else has.

    Raises:
        ImportError: no NIXL, or none that has the backend.
        ValueError: the backend refuses its options.
    """

    def __init__(
        self, backend: str = "TENT", options: Mapping[str, Any] | None = None, name: str | None = None
    ) -> None:
        api = nixl_api()
        self.backend = backend
        self.name = name or str(uuid.uuid4())
        self._agent = api.nixl_agent(self.name, api.nixl_agent_config(backends=[]))
        known = self._agent.get_plugin_list()
        if backend not in known:
            raise ImportError(
                f"NIXL has no backend {backend!r}, only {', '.join(known)}: kimi-stack tent doctor"
            )
        texts = {key: _text(value) for key, value in (options or {}).items()}
        try:
            self._agent.create_backend(backend, texts)
        except Exception as error:
            raise ValueError(f"{backend} does not start with options {texts}: {_say(error)}") from error

    def register(self, rows: Sequence[Row]) -> Any:
        """Let peers that load the metadata afterwards read and write host memory; the handle undoes it."""
        return self._agent.register_memory(
            [(address, size, 0, "") for address, size in rows], "DRAM", [self.backend]
        )

    def deregister(self, handle: Any) -> None:
        self._agent.deregister_memory(handle, [self.backend])

    def metadata(self) -> bytes:
        """What a peer needs to reach the memory that is registered now."""
        return self._agent.get_agent_metadata()

    def meet(self, metadata: bytes) -> str:
        """Load a peer's metadata, or newer metadata of it; its name."""
        name = self._agent.add_remote_agent(metadata)
        return name.decode() if isinstance(name, bytes) else name

    def forget(self, peer: str) -> None:
        self._agent.remove_remote_agent(peer)

    def start(
        self,
        operation: Operation,
        local: Sequence[Row],
        remote: Sequence[Row],
        peer: str,
        notice: bytes = b"",
    ) -> Transfer:
        """Begin a transfer between equally long rows; `notice` reaches the peer when all of it is done.

        Raises:
            TransferError: the peer is unknown, or has not registered the memory.
        """
        try:
            sides = [
                self._agent.get_xfer_descs([(*row, 0) for row in rows], "DRAM") for rows in (local, remote)
            ]
            handle = self._agent.initialize_xfer(operation, *sides, peer, notice, [self.backend])
        except Exception as error:
            raise TransferError(f"{operation} with {peer} cannot begin: {_say(error)}") from error
        return Transfer(
            self._agent, handle, f"{operation} of {sum(size for _, size in local)} bytes with {peer}"
        )

    def notify(self, peer: str, message: bytes) -> None:
        """Send a message that arrives once, after what was sent before.

        Raises:
            TransferError: the peer cannot be reached.
        """
        try:
            self._agent.send_notif(peer, message)  # naming the backend fails in NIXL 1.5's own wrapper
        except Exception as error:
            raise TransferError(f"a message to {peer} cannot be sent: {_say(error)}") from error

    def notices(self) -> list[tuple[str, bytes]]:
        """What peers have sent since the last call, as (peer, message)."""
        return [
            (peer.decode() if isinstance(peer, bytes) else peer, message)
            for peer, messages in self._agent.get_new_notifs([self.backend]).items()
            for message in messages
        ]


class Transfer:
    """One transfer under way."""

    def __init__(self, agent: Any, handle: Any, what: str) -> None:
        self._agent, self._handle, self._what = agent, handle, what
        self._finished = False
        self._ask(agent.transfer)

    def done(self) -> bool:
        """Whether every byte has arrived. Raises TransferError where it failed."""
        if not self._finished:
            self._ask(self._agent.check_xfer_state)
        return self._finished

    def wait(self, seconds: float) -> None:
        """Until it is done. Raises TransferError where it fails, or takes longer."""
        deadline = time.monotonic() + seconds
        while not self.done():
            if time.monotonic() > deadline:
                self.release()
                raise TransferError(f"{self._what} is not done after {seconds:g} s")
            time.sleep(PAUSE)

    def _ask(self, call: Any) -> None:
        try:
            state = call(self._handle)
        except Exception as error:
            self.release()
            raise TransferError(f"{self._what} failed: {_say(error)}") from error
        if state == "ERR":
            self.release()
            raise TransferError(f"{self._what} failed")
        if state == "DONE":
            self.release()

    def release(self) -> None:
        """End it, done or not: afterwards nothing reads or writes our memory for it."""
        if not self._finished:
            self._finished = True
            self._agent.release_xfer_handle(self._handle)


PAUSE = 2e-4  # seconds between two looks at a transfer: the processor is the engine's meanwhile


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _say(error: Exception) -> str:
    return str(error) or type(error).__name__
