"""A `P2PStore` for MoonshotAI's checkpoint-engine over NIXL and TENT, in the place of Mooncake's TransferEngine.

    from nixl_tent.checkpoint import p2p_store
    p2p_store.use()                      # before the first ParameterServer of the process
    server = checkpoint_engine.ParameterServer(...)

Every process of a job must use it. Names are those of checkpoint-engine's class; `addr` is where a process tells its
NIXL metadata to whoever asks, as Mooncake's handshake does.
"""

from __future__ import annotations

import os
import socket
import socketserver
import struct
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nixl_tent.checkpoint import compat
from nixl_tent.checkpoint.agent import Agent, TransferError

TIMEOUT_S = 600.0  # for one batch of reads
ASK_S = 30.0  # for a peer's metadata
STAGING_BYTES = 64 << 20  # host memory through which bytes reach a GPU
MAX_METADATA = 64 << 20
_LENGTH = struct.Struct("<Q")


def use() -> None:
    """Make checkpoint-engine's parameter servers use this store.

    Raises:
        RuntimeError: this checkpoint-engine is another one than the store was written for.
    """
    from kimi_stack.compat import LiveSource, missing

    found = missing(compat.CHECKPOINT_ENGINE_HOOKS, LiveSource())
    if found:
        lines = "\n  ".join(found)
        raise RuntimeError(
            f"TENT cannot take the place of this checkpoint-engine's P2PStore:\n  {lines}\n"
            f"Install checkpoint-engine {compat.TESTED_CHECKPOINT_ENGINE}."
        )
    import checkpoint_engine.p2p_store
    import checkpoint_engine.ps

    checkpoint_engine.ps.P2PStore = P2PStore
    checkpoint_engine.p2p_store.P2PStore = P2PStore


class P2PStore:
    """Named tensors that other processes may read.

    Args:
        device_manager: given by checkpoint-engine; of no use here, links are TENT's to choose.
        backend, options: as for `Agent`; by default TENT with the options of its environment.

    Raises:
        ImportError: no NIXL that has the backend; checkpoint-engine then goes on without P2P, as without Mooncake.
    """

    def __init__(
        self, device_manager: Any = None, backend: str = "TENT", options: Mapping[str, Any] | None = None
    ) -> None:
        self.rank = int(os.environ["RANK"])
        # checkpoint-engine lets two processes with one device take turns: ours share all links at any time.
        self.device = f"tent{self.rank}"
        self.named_tensors: dict[str, Tensor] = {}
        self._agent = Agent(backend, options)
        self._handles: dict[str, Any] = {}
        self._peers: dict[str, str] = {}
        self._lock = threading.Lock()
        self._door = _Door(self._tell)
        self.ip = _own_ip()
        self.port = self._door.server_address[1]

    @property
    def addr(self) -> str:
        return f"{self.ip}:{self.port}"

    def register_named_tensors(self, named_tensors: dict[str, Tensor]) -> None:
        """Let peers read these tensors, which must stay where they are until they are unregistered.

        Tensors of a GPU can be the target of a read of this process, and cannot be read by others.

        Raises:
            ValueError: a name is registered already, or a tensor is not contiguous.
        """
        for name, tensor in named_tensors.items():
            if name in self.named_tensors:
                raise ValueError(f"{name!r} is registered already: unregister it first")
            if not tensor.is_contiguous():
                raise ValueError(f"{name!r} is not contiguous: register a contiguous tensor")
        with self._lock:
            for name, tensor in named_tensors.items():
                if tensor.device.type == "cpu" and tensor.nbytes:
                    self._handles[name] = self._agent.register([(tensor.data_ptr(), tensor.nbytes)])
                self.named_tensors[name] = tensor

    def unregister_named_tensors(self, names: list[str]) -> int:
        """End that; how many there were.

        Raises:
            KeyError: a name is not registered; none is unregistered then.
        """
        unknown = [name for name in names if name not in self.named_tensors]
        if unknown:
            raise KeyError(f"{', '.join(unknown)} not registered")
        with self._lock:
            for name in names:
                del self.named_tensors[name]
                if name in self._handles:
                    self._agent.deregister(self._handles.pop(name))
        return len(names)

    def batch_transfer_sync_read(
        self, target_hostname: str, buf_ptrs: list[int], remote_ptrs: list[int], lens: list[int]
    ) -> None:
        """Read `lens[i]` bytes at the peer's address `remote_ptrs[i]` to our `buf_ptrs[i]`, all of them.

        Args:
            target_hostname: the peer's `addr`.
            buf_ptrs: within tensors registered here.
            remote_ptrs: within tensors registered there.

        Raises:
            ValueError: the lists differ in length, or an address of ours is not registered.
            TransferError: the peer cannot be reached, has not registered the memory, or the transfer failed.
        """
        if not len(buf_ptrs) == len(remote_ptrs) == len(lens):
            raise ValueError(
                f"buf_ptrs, remote_ptrs and lens have {len(buf_ptrs)}, {len(remote_ptrs)} and {len(lens)} entries"
            )
        host: list[tuple[int, int, int]] = []
        device: list[tuple[Tensor, int, int]] = []
        for ours, theirs, size in zip(buf_ptrs, remote_ptrs, lens):
            tensor = self._tensor_at(ours, size)
            if tensor.device.type == "cpu":
                host.append((ours, theirs, size))
            else:
                flat = tensor.view(-1).view(torch.uint8)
                begin = ours - tensor.data_ptr()
                device.append((flat[begin : begin + size], theirs, size))
        if host:
            self._read(target_hostname, host)
        if device:
            self._read_staged(target_hostname, device)

    def close(self) -> None:
        """Stop answering peers and forget all tensors."""
        self._door.shutdown()
        self._door.server_close()
        self.unregister_named_tensors(list(self.named_tensors))

    def _tensor_at(self, address: int, size: int) -> Tensor:
        for tensor in self.named_tensors.values():
            begin = tensor.data_ptr()
            if begin <= address and address + size <= begin + tensor.nbytes:
                return tensor
        raise ValueError(
            f"{size} bytes at {address:#x} are in no registered tensor: call register_named_tensors"
        )

    def _read(self, target: str, rows: Sequence[tuple[int, int, int]]) -> None:
        local = [(ours, size) for ours, _, size in rows]
        remote = [(theirs, size) for _, theirs, size in rows]
        known = target in self._peers
        try:
            transfer = self._agent.start("READ", local, remote, self._meet(target))
        except TransferError:
            if not known:
                raise
            # It may have registered tensors since it was asked.
            self._leave(target)
            transfer = self._agent.start("READ", local, remote, self._meet(target))
        transfer.wait(TIMEOUT_S)

    def _read_staged(self, target: str, rows: Sequence[tuple[Tensor, int, int]]) -> None:
        staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
        handle = self._agent.register([(staging.data_ptr(), staging.numel())])
        try:
            for target_bytes, theirs, size in rows:
                for begin in range(0, size, STAGING_BYTES):
                    part = min(STAGING_BYTES, size - begin)
                    self._read(target, [(staging.data_ptr(), theirs + begin, part)])
                    target_bytes[begin : begin + part].copy_(staging[:part])
        finally:
            self._agent.deregister(handle)

    def _meet(self, target: str) -> str:
        if target not in self._peers:
            self._peers[target] = self._agent.meet(_ask(target))
        return self._peers[target]

    def _leave(self, target: str) -> None:
        self._agent.forget(self._peers.pop(target))

    def _tell(self) -> bytes:
        with self._lock:
            return self._agent.metadata()


class _Door(socketserver.ThreadingTCPServer):
    """Tells our metadata to everyone who connects."""

    daemon_threads = True

    def __init__(self, tell: Any) -> None:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                text = tell()
                self.request.sendall(_LENGTH.pack(len(text)) + text)

        super().__init__(("0.0.0.0", 0), Handler)
        threading.Thread(target=self.serve_forever, name="tent-p2p-store", daemon=True).start()


def _ask(target: str) -> bytes:
    host, _, port = target.rpartition(":")
    try:
        with (
            socket.create_connection((host, int(port)), timeout=ASK_S) as peer,
            peer.makefile("rb") as stream,
        ):
            (length,) = _LENGTH.unpack(stream.read(_LENGTH.size))
            if length > MAX_METADATA:
                raise ValueError(f"{length} bytes of metadata")
            text = stream.read(length)
        if len(text) != length:
            raise ValueError(f"{len(text)} of {length} bytes of metadata")
    except (OSError, ValueError, struct.error) as error:
        raise TransferError(f"the store at {target} does not answer: {error}") from error
    return text


def _own_ip() -> str:
    from checkpoint_engine.device_utils import get_ip

    return get_ip()
