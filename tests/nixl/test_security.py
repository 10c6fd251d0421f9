"""A peer that does not keep to the rules: it is refused, and the target's memory stays as it was.

The client here is written from the description of the wire format in docs/tent.md, with Python's own hmac.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import random
import socket
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hosts import AgentHost

HELLO, CHALLENGE, PROOF, WELCOME, REFUSED, WRITE, _REF, READ = range(1, 9)
READ_DATA, ACK, NACK, END = 9, 11, 12, 13
SIZE = 1 << 16


def frame(
    kind: int, payload: bytes = b"", *, rows: bytes = b"", transfer: int = 0, slice_: int = 0, **other: int
) -> bytes:
    header = struct.pack(
        "<HBBHHIIQI", other.get("magic", 0x5E27), other.get("version", 1), kind, other.get("segments", len(rows) // 24),
        other.get("flags", 0), slice_, other.get("length", len(payload)), transfer, other.get("aux", 0),
    )  # fmt: skip
    return header + struct.pack("<I", zlib.crc32(header) ^ other.get("damage", 0)) + rows + payload


def row(token: int, offset: int, slot: int, length: int) -> bytes:
    return struct.pack("<QQII", token, offset, slot, length)


@dataclass
class Victim:
    """What its published metadata says of agent B."""

    host: AgentHost
    engine: bytes
    key: bytes
    port: int
    token: int
    slot: int
    crc: int = field(default=0)

    def untouched(self) -> bool:
        return self.host.crc(name="y") == self.crc


def text(blob: bytes, at: int) -> tuple[bytes, int]:
    (size,) = struct.unpack_from("<H", blob, at)
    return blob[at + 2 : at + 2 + size], at + 2 + size


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    with AgentHost("B", options={"cma": "false", "links": "lo"}) as host:
        host.buffer(name="y", size=SIZE, fill="random", seed=3)
        blob = base64.b64decode(host.metadata())
        at = blob.index(b"TENTc") + 6
        engine, at = text(blob, at)
        key, at = text(blob, at)
        _, at = text(blob, at)
        at += 2
        for _ in range(3):
            _, at = text(blob, at)
        (port,) = struct.unpack_from("<H", blob, at)
        token, _, _, slot = struct.unpack_from("<QQQI", blob, blob.index(b"TENTr") + 6)
        made = Victim(host, engine, key, port, token, slot)
        made.crc = host.crc(name="y")
        yield made
        assert made.untouched()


class Client:
    """A dialler that does what the test tells it."""

    def __init__(self, victim: Victim, name: bytes = b"stranger") -> None:
        self.victim, self.name = victim, name
        self.own_engine, self.own_key = os.urandom(16), os.urandom(32)
        self.socket = socket.create_connection(("127.0.0.1", victim.port), timeout=20)
        self.conversation = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> tuple[int, int, bytes]:
        """(kind, aux, payload) of the next frame; kind 0 when the other side has hung up."""
        header = self.exactly(32)
        if len(header) < 32:
            return 0, 0, b""
        _, _, kind, _, _, _, length, _, aux, _ = struct.unpack("<HBBHHIIQII", header)
        return kind, aux, self.exactly(length)

    def exactly(self, size: int) -> bytes:
        data = b""
        try:
            while len(data) < size and (part := self.socket.recv(size - len(data))):
                data += part
        except ConnectionError:
            pass
        return data

    def hello(self, engine: bytes | None = None) -> tuple[int, int, bytes]:
        body = (engine or self.victim.engine) + self.own_engine + os.urandom(32)
        body += struct.pack("<QQQQ", 1, 1, 1, 0) + struct.pack("<H", len(self.name)) + self.name
        self.send(frame(HELLO, body))
        answer = self.receive()
        self.conversation = body + answer[2]
        return answer

    def proof(self, secret: bytes = b"", key: bytes | None = None) -> bytes:
        shared = hmac.digest(secret, key or self.victim.key, hashlib.sha256)
        own = hmac.digest(b"", self.own_key, hashlib.sha256)
        return hmac.digest(shared, b"dialler" + self.conversation, hashlib.sha256) + hmac.digest(
            own, b"self" + self.conversation, hashlib.sha256
        )

    def join(self) -> None:
        assert self.hello()[0] == CHALLENGE
        self.send(frame(PROOF, self.proof()))
        kind, _, digest = self.receive()
        assert kind == WELCOME
        shared = hmac.digest(b"", self.victim.key, hashlib.sha256)
        assert digest == hmac.digest(shared, b"listener" + self.conversation, hashlib.sha256)


def test_a_proper_stranger_may_write_what_it_has_the_token_for(victim: Victim) -> None:
    """The client is right: without this, the refusals below would prove nothing."""
    client = Client(victim)
    client.join()
    client.send(frame(READ, rows=row(victim.token, 100, victim.slot, 50), transfer=1 << 63))
    kind, _, before = client.receive()
    assert kind == READ_DATA and len(before) == 50
    for data in (b"x" * 50, before):
        client.send(
            frame(WRITE, data, rows=row(victim.token, 100, victim.slot, 50), transfer=1 + (data is before))
        )
        assert client.receive()[0] == ACK
    assert victim.untouched()


def test_wrong_keys_are_refused(victim: Victim) -> None:
    for arguments in ({"key": os.urandom(32)}, {"secret": b"other"}):
        client = Client(victim)
        client.hello()
        client.send(frame(PROOF, client.proof(**arguments)))
        kind, _, why = client.receive()
        assert kind == REFUSED and b"key" in why
        assert client.receive()[0] == 0


def test_a_recorded_proof_is_no_proof(victim: Victim) -> None:
    first = Client(victim)
    first.hello()
    recorded = first.proof()
    second = Client(victim)
    second.hello()
    second.send(frame(PROOF, recorded))
    assert second.receive()[0] == REFUSED


def test_nobody_speaks_for_a_known_agent(victim: Victim) -> None:
    with AgentHost("A", options={"cma": "false", "links": "lo"}) as a:
        victim.host.load(metadata=a.metadata())
        client = Client(victim, name=b"A")
        client.hello()
        client.send(frame(PROOF, client.proof()))
        kind, _, why = client.receive()
        assert kind == REFUSED and b"'A'" in why


def test_metadata_of_an_earlier_life_is_refused(victim: Victim) -> None:
    kind, _, why = Client(victim).hello(engine=os.urandom(16))
    assert kind == REFUSED and b"metadata" in why


def test_data_before_the_handshake_closes_the_connection(victim: Victim) -> None:
    client = Client(victim)
    client.send(frame(WRITE, b"x" * 8, rows=row(victim.token, 0, victim.slot, 8), transfer=1))
    assert client.receive()[0] == 0
    assert victim.untouched()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"token": 1}, 2),
        ({"slot": 7}, 1),
        ({"slot": 2**32 - 1}, 1),
        ({"offset": SIZE - 4}, 3),
        ({"offset": 2**64 - 8}, 3),
        ({"offset": 2**63}, 3),
    ],
)
@pytest.mark.parametrize("kind", [WRITE, READ])
def test_memory_that_is_not_theirs_is_refused(
    victim: Victim, kind: int, change: dict[str, int], reason: int
) -> None:
    client = Client(victim)
    client.join()
    where = {"token": victim.token, "offset": 0, "slot": victim.slot, "length": 8, **change}
    client.send(frame(kind, b"x" * 8 if kind == WRITE else b"", rows=row(**where), transfer=1))
    answer, aux, data = client.receive()
    assert (answer, aux, data) == (NACK, reason, b"")
    assert victim.untouched()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\nAccept: everything\r\n\r\n",
        frame(99),
        frame(HELLO, b"x" * 2000),
        frame(HELLO, version=7),
        frame(HELLO, b"short"),
        frame(HELLO, magic=1),
        frame(HELLO, b"x" * 200, damage=1),
        frame(PROOF, b"x" * 64),
        b"\0" * 4096,
    ],
    ids=["http", "kind", "long-hello", "version", "short-hello", "magic", "checksum", "proof-first", "zeros"],
)
def test_noise_closes_the_connection(victim: Victim, data: bytes) -> None:
    client = Client(victim)
    client.send(data)
    while (kind := client.receive()[0]) != 0:
        assert kind == REFUSED


@pytest.mark.parametrize(
    "data",
    [
        frame(WRITE, length=17 << 20, segments=1),
        frame(WRITE, b"x" * 8, rows=row(0, 0, 0, 8) * 129),
        frame(WRITE, b"x" * 8, rows=row(0, 0, 0, 4), transfer=9),
        frame(END, length=(16 << 20) + 1),
        frame(READ_DATA, b"x" * 8, transfer=1),
        frame(ACK, transfer=1),
        frame(HELLO),
        frame(WRITE, slice_=1 << 22),
    ],
    ids=["long-slice", "rows", "sum", "long-notification", "answer", "ack", "hello-again", "slice-number"],
)
def test_a_proven_peer_must_keep_to_the_format_too(victim: Victim, data: bytes) -> None:
    client = Client(victim)
    client.join()
    client.send(data)
    assert client.receive()[0] == 0
    assert victim.untouched()


def test_random_frames_do_no_harm(victim: Victim) -> None:
    choose = random.Random(11)
    for _ in range(60):
        client = Client(victim)
        if choose.random() < 0.7:
            client.join()
        for _ in range(20):
            data = bytearray(frame(
                choose.randrange(20), choose.randbytes(choose.randrange(64)),
                rows=row(choose.getrandbits(64), choose.getrandbits(16), choose.randrange(3), choose.randrange(64)),
                transfer=choose.randrange(4), slice_=choose.randrange(4), flags=choose.randrange(16),
                aux=choose.randrange(4),
            ))  # fmt: skip
            if choose.random() < 0.2:
                data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
            try:
                client.send(bytes(data))
            except ConnectionError:
                break
        client.socket.close()
    assert victim.untouched()


@pytest.mark.parametrize("where", [b"TENTc", b"TENTr"])
def test_damaged_metadata_is_refused(where: bytes) -> None:
    with AgentHost("A") as a, AgentHost("B") as b:
        b.buffer(name="y", size=100)
        blob = bytearray(base64.b64decode(b.metadata()))
        blob[blob.index(where) + 5] ^= 0x40  # the version
        with pytest.raises(Exception, match=r"(?i)nixl"):
            a.load(metadata=base64.b64encode(bytes(blob)).decode())
        a.load(metadata=b.metadata())
