"""Between engines and the draft server: one message each way, over ZeroMQ, on a thread of its own.

In verl Seer's manager runs the server. For engines without verl: ``python -m verl_seer.drafting.link tcp://HOST:PORT``.
There is no authentication: bind it where only the engines reach it.

pyzmq and msgspec, which vLLM brings along, are imported when a link or a service is made.
"""

from __future__ import annotations

import argparse
import logging
import threading
import time
from array import array
from contextlib import suppress
from typing import Any, TypedDict

from verl_seer.drafting.engine import Update
from verl_seer.drafting.store import DraftServer

logger = logging.getLogger("verl.seer")

REPLY_TOKENS = 1 << 20  # most tokens in one answer; the next brings the rest
MAX_MESSAGE = 1 << 26  # bytes; the sender of a longer one is disconnected
MAX_ENGINES = 4096  # whose counts are kept; beyond it the first that came are forgotten
RETRY_SECONDS = 5.0
SWEEP_SECONDS = 1.0


Row = tuple[str, str, int, bytes]  # an `Update`, its tokens as int32


class Request(TypedDict):
    """What an engine sends: its tokens, and what it holds of its groups."""

    engine: str
    epoch: int
    updates: list[Row]
    cursors: dict[str, dict[str, int]]
    counts: dict[str, int | float]


class Answer(TypedDict):
    """What an engine lacks. `error`, if not empty, says why the request was not taken."""

    epoch: int
    rows: list[Row]
    error: str


def _pack(rows: list[Update]) -> list[Row]:
    return [(group, response, position, tokens.tobytes()) for group, response, position, tokens in rows]


def _unpack(rows: list[Row]) -> list[Update]:
    return [(group, response, position, array("i", tokens)) for group, response, position, tokens in rows]


class DraftLink:
    """An engine's way to the draft server. Nothing here waits for the server but the link's own thread.

    A server that does not answer is asked again every `RETRY_SECONDS`; one warning says that it is gone.

    Args:
        address: ``tcp://host:port``.
        name: the engine's, for the server's statistics.
        timeout: seconds that an answer may take.
    """

    def __init__(self, address: str, name: str, timeout: float = 10.0) -> None:
        self.address, self.name, self.timeout = address, name, timeout
        self._lock = threading.Lock()
        self._updates: list[Update] = []
        self._cursors: dict[str, dict[str, int]] = {}
        self._counts: dict[str, float] = {}
        self._news: list[Update] = []
        self._void = False
        self._epoch = 0
        self._lost = False
        self._due, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="seer-draft-link", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether the server did not answer the last time."""
        return self._lost

    def offer(
        self, updates: list[Update], cursors: dict[str, dict[str, int]], counts: dict[str, float]
    ) -> None:
        """See `engine.Link`."""
        with self._lock:
            if not self._lost:
                self._updates += updates
            self._cursors, self._counts = cursors, counts
        self._due.set()

    def take(self) -> tuple[bool, list[Update]]:
        """See `engine.Link`."""
        if not self._void and not self._news:  # no lock on the way of a decode step
            return False, []
        with self._lock:
            void, news = self._void, self._news
            self._void, self._news = False, []
        return void, news

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._due.set()
        self._thread.join(self.timeout + 1)

    def _run(self) -> None:
        import zmq

        context = zmq.Context()
        socket = None
        while True:
            self._due.wait()
            self._due.clear()
            if self._closed.is_set():
                break
            if socket is None:
                socket = context.socket(zmq.REQ)
                socket.setsockopt(zmq.LINGER, 0)
                socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
                for option in (zmq.RCVTIMEO, zmq.SNDTIMEO):
                    socket.setsockopt(option, int(self.timeout * 1000))
                socket.connect(self.address)
            try:
                self._exchange(socket)
            except (zmq.ZMQError, ValueError, RuntimeError) as error:  # ValueError: an answer that is none
                socket.close()
                socket = None
                self._give_up(error)
                self._closed.wait(RETRY_SECONDS)
                self._due.set()
        if socket is not None:
            socket.close()
        context.term()

    def _exchange(self, socket: Any) -> None:
        import msgspec

        with self._lock:
            updates, self._updates = self._updates, []
            body = Request(
                engine=self.name,
                epoch=self._epoch,
                updates=_pack(updates),
                cursors=self._cursors,
                counts=self._counts,
            )
        socket.send(msgspec.msgpack.encode(body))
        answer = msgspec.msgpack.decode(socket.recv(), type=Answer)
        if answer["error"]:
            raise RuntimeError(f"the draft server says: {answer['error']}")
        rows = _unpack(answer["rows"])
        with self._lock:
            if answer["epoch"] != self._epoch or self._lost:
                # What was sent or is held is of other weights, or was lost on the way: all of it anew.
                self._epoch, self._void = answer["epoch"], True
                self._updates, self._news = [], []
            else:
                self._news += rows
            if self._lost:
                logger.warning("Seer: the draft server at %s answers again", self.address)
            self._lost = False

    def _give_up(self, error: Exception) -> None:
        with self._lock:
            if not self._lost:
                logger.warning(
                    "Seer: no answer from the draft server at %s (%s): drafting goes on from this engine's own "
                    "responses alone",
                    self.address,
                    error or type(error).__name__,
                )
            self._lost = True
            self._updates = []


class DraftService:
    """A `DraftServer` that answers links, on a thread.

    Args:
        server: what it serves.
        bind: address to listen at, ``tcp://host:port``; port 0 takes any.
    """

    def __init__(self, server: DraftServer, bind: str) -> None:
        import zmq

        self._server, self._lock = server, threading.Lock()
        self._counts: dict[str, dict[str, float]] = {}
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, 200)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
        try:
            self._socket.bind(bind)
        except zmq.ZMQError as error:
            self._context.destroy(0)
            raise ValueError(f"bind must be a free address of this machine, got {bind!r}: {error}") from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="seer-draft-server", daemon=True)
        self._thread.start()

    def new_weights(self) -> None:
        """Forgets everything here and, at its next exchange, in every engine."""
        with self._lock:
            self._server.new_weights()

    def stats(self) -> dict[str, Any]:
        """Groups and tokens held, the epoch, and each engine's counts as of its last exchange."""
        with self._lock:
            return {
                "epoch": self._server.epoch,
                "groups": len(self._server.groups),
                "tokens": self._server.tokens,
                "engines": dict(self._counts),
            }

    def close(self) -> None:
        """Stops answering."""
        self._closed.set()
        self._thread.join()
        self._context.destroy(0)

    def _run(self) -> None:
        import msgspec
        import zmq

        swept = time.monotonic()
        while not self._closed.is_set():
            if time.monotonic() - swept > SWEEP_SECONDS:
                with self._lock:
                    self._server.sweep()
                swept = time.monotonic()
            try:
                message = self._socket.recv()
            except zmq.Again:
                continue
            try:
                body = msgspec.msgpack.decode(message, type=Request)
                with self._lock:
                    answer = self._answer(body)
            except ValueError as error:  # msgspec's errors are ValueErrors
                answer = Answer(epoch=self._server.epoch, rows=[], error=str(error))
            self._socket.send(msgspec.msgpack.encode(answer))

    def _answer(self, body: Request) -> Answer:
        self._counts[body["engine"]] = body["counts"]
        if len(self._counts) > MAX_ENGINES:
            del self._counts[next(iter(self._counts))]
        rows: list[Update] = []
        if body["epoch"] == self._server.epoch:
            for group, response, position, tokens in _unpack(body["updates"]):
                self._server.append(group, response, position, tokens)
            rows = self._lacking(body["cursors"])
        return Answer(epoch=self._server.epoch, rows=_pack(rows), error="")

    def _lacking(self, held: dict[str, dict[str, int]]) -> list[Update]:
        """What lies behind the cursors, `REPLY_TOKENS` of it at most."""
        rows: list[Update] = []
        room = REPLY_TOKENS
        for group, cursors in held.items():
            delta = self._server.fetch(group, cursors, self._server.epoch)
            for response, tokens in delta.tokens.items():
                rows.append((group, response, cursors.get(response, 0), tokens[:room]))
                room -= len(tokens)
                if room <= 0:
                    return rows
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="A draft server for vLLM engines with Seer's drafter.")
    parser.add_argument("bind", help="address to listen at, tcp://host:port; port 0 takes any")
    try:
        service = DraftService(DraftServer(), parser.parse_args().bind)
    except ValueError as error:
        parser.error(str(error))
    print(f"draft server at {service.address}", flush=True)
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
    service.close()


if __name__ == "__main__":
    main()
