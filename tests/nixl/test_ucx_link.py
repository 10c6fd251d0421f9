"""NIXL's own UCX backend, hosted by ours: one more link for host memory; refused where it is not what it must be; and
ended on both sides before anything that it carried goes elsewhere.

Memory of a GPU goes the same way, as a transfer that only the hosted engine reaches: csrc/tests/hosting.cpp has those
with an engine of its own. With a GPU they have not been run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import SOURCES, environment_of, matrix
from hosts import AgentHost, HostError, introduce

from nixl_tent import LIBRARY, compat, lab, library, top

SIZE = (24 << 20) + 77
# No second way for UCX: what it carries goes over TCP sockets of its own.
UCX_TCP = {"UCX_TLS": "tcp"}


def links(host: AgentHost) -> dict[str, dict[str, object]]:
    """Of the only peer: "ucx", "cma" or "tcp" -> the link's row in the snapshot."""
    engine = next(e for e in top.snapshots() if e["pid"] == host.process.pid)
    kinds = {"ucx": "ucx", "memory": "cma"}
    return {
        next((kind for word, kind in kinds.items() if word in link["name"]), "tcp"): link
        for link in engine["peers"][0]["links"]
    }


def sent(host: AgentHost, kind: str) -> int:
    return int(links(host)[kind]["sent_bytes_total"])


def check_both_ways(a: AgentHost, b: AgentHost, pieces: int, rounds: int = 1) -> None:
    piece = SIZE // pieces
    x = a.buffer(name="x", size=piece * pieces, fill="random", seed=pieces)
    y = b.buffer(name="y", size=piece * pieces)
    introduce(a, b)
    for op in ("WRITE", "READ"):
        giver, taker = ((a, "x"), (b, "y")) if op == "WRITE" else ((b, "y"), (a, "x"))
        handle = a.prepare_split(op=op, local=x, remote=y, size=piece, count=pieces, agent="B")
        for number in range(rounds):
            giver[0].fill(name=giver[1], seed=number)
            taker[0].fill(name=taker[1], seed=-1)
            assert a.run(handle=handle)["state"] == "DONE"
            assert a.crc(name="x") == b.crc(name="y")
        a.release(handle=handle)
        handle = a.prepare(op=op, local=[[x, 99]], remote=[[y, 99]], agent="B", notify=f"{op} over")
        assert a.run(handle=handle)["state"] == "DONE"
        assert b.notifications(count=1) == [["A", f"{op} over"]]
        a.release(handle=handle)


@pytest.mark.parametrize("pieces", [1, 3000])
def test_host_memory_goes_through_the_hosted_engine(pieces: int) -> None:
    """Without direct copies our only other link is the one of last resort."""
    options = {"ucx": "on", "cma": "false"}
    with AgentHost("A", options=options) as a, AgentHost("B", options=options) as b:
        check_both_ways(a, b, pieces)
        assert sent(a, "ucx") >= 2 * (SIZE // pieces) * pieces
        assert links(a)["ucx"]["state"] == "up"


def test_it_shares_a_transfer_with_links_of_ours(needs_lab: None) -> None:
    """Two links: ours are bound to the first, UCX to the second."""
    with lab.running(links=2, mbit=800) as made:
        environment = {**UCX_TCP, "UCX_NET_DEVICES": "link1"}
        options = {"ucx": "on", "links": "link0"}
        hosts = [
            AgentHost(name, options=options, prefix=made.command(side, []), environment=environment)
            for name, side in (("A", "a"), ("B", "b"))
        ]
        with hosts[0] as a, hosts[1] as b:
            check_both_ways(a, b, pieces=1, rounds=3)
            assert sent(a, "ucx") > SIZE
            assert sent(a, "tcp") > SIZE // 2


def test_only_one_side_hosts() -> None:
    with AgentHost("A", options={"ucx": "on"}) as a, AgentHost("B", options={"ucx": "off"}) as b:
        check_both_ways(a, b, pieces=5)
        assert "ucx" not in links(a)


@pytest.mark.parametrize("folder", matrix(), ids=lambda path: path.name)
def test_every_supported_nixl_can_be_hosted(folder: Path) -> None:
    environment = environment_of(folder)
    options = {"ucx": "on", "cma": "false"}
    with (
        AgentHost("A", options=options, environment=environment) as a,
        AgentHost("B", options=options, environment=environment) as b,
    ):
        check_both_ways(a, b, pieces=100)
        assert sent(a, "ucx") > SIZE


def test_what_stalls_in_it_goes_elsewhere_only_when_it_has_ended_on_both_sides(needs_lab: None) -> None:
    """UCX's link swallows everything, ours lives. Once it is done, nothing is written when UCX's link heals."""
    with lab.running(links=2, mbit=800) as made:
        environment = {**UCX_TCP, "UCX_NET_DEVICES": "link1"}
        options = {"ucx": "on", "links": "link0"}
        hosts = [
            AgentHost(name, options=options, prefix=made.command(side, []), environment=environment)
            for name, side in (("A", "a"), ("B", "b"))
        ]
        with hosts[0] as a, hosts[1] as b:
            check_both_ways(a, b, pieces=1)
            x, y = a.buffer(name="x2", size=SIZE, fill="random", seed=8), b.buffer(name="y2", size=SIZE)
            introduce(a, b)
            before = sent(a, "ucx")
            handle = a.prepare(op="WRITE", local=[[x, SIZE]], remote=[[y, SIZE]], agent="B", notify="through")
            a.post(handle=handle)
            time.sleep(0.05)
            made.hole(1)
            assert a.wait(handle=handle)["state"] == "DONE"
            assert sent(a, "ucx") > before
            assert a.crc(name="x2") == b.crc(name="y2")
            assert b.notifications(count=1) == [["A", "through"]]
            assert links(a)["ucx"]["state"] == "barred"
            b.fill(name="y2", seed=-1)
            zeros = b.crc(name="y2")
            made.heal(1)
            for _ in range(20):
                time.sleep(0.1)
                assert b.crc(name="y2") == zeros
            a.fill(name="x2", seed=9)
            assert a.run(handle=handle)["state"] == "DONE"
            assert a.crc(name="x2") == b.crc(name="y2")


def test_a_peer_that_dies_is_an_error_also_for_what_it_had_in_it() -> None:
    options = {"ucx": "on", "cma": "false", "reconnect_s": "1"}
    with AgentHost("A", options=options, environment=UCX_TCP) as a:
        b = AgentHost("B", options=options, environment=UCX_TCP)
        size = 256 << 20
        x, y = a.buffer(name="x", size=size), b.buffer(name="y", size=size)
        introduce(a, b)
        handle = a.prepare(op="WRITE", local=[[x, size]], remote=[[y, size]], agent="B")
        a.post(handle=handle)
        b.kill()
        begin = time.monotonic()
        with pytest.raises(HostError, match="DISCONNECT"):
            a.wait(handle=handle)
        assert time.monotonic() - begin < 30


@pytest.fixture
def impostor(tmp_path: Path) -> Iterator[Callable[[str], dict[str, str]]]:
    """A NIXL whose UCX plugin is another: its source -> the environment to start an agent with."""
    nixl = compat.installed()[0]
    site = nixl.plugins.parents[1]
    for name in (nixl.module, nixl.plugins.parent.name, f"{nixl.module}.libs"):
        shutil.copytree(site / name, tmp_path / name)
    plugins = tmp_path / nixl.plugins.parent.name / "plugins"
    shutil.copyfile(library(), plugins / LIBRARY)

    def build(source: str) -> dict[str, str]:
        (tmp_path / "fake.cpp").write_text(source)
        compiler = shutil.which("c++") or shutil.which("g++")
        if compiler is None:
            pytest.skip("no C++ compiler")
        command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{SOURCES}", "-Wno-psabi"]
        subprocess.run(
            [*command, str(tmp_path / "fake.cpp"), "-o", str(plugins / "libplugin_UCX.so")], check=True
        )
        return {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}", "NIXL_MODULE": nixl.module}

    yield build


FAKE = """
#include "nixl/interface.h"
extern "C" void* table[TABLE] asm("_ZTV17nixlBackendEngine");
void* table[TABLE] = {};
namespace {
struct Request final : nixl::Request {};
struct Fake final : nixl::Engine {   // says yes to everything and moves nothing
  using Engine::Engine;
  bool supports_remote() const override { return true; }
  bool supports_local() const override { return true; }
  bool supports_notifications() const override { return true; }
  std::vector<nixl::Memory> memories() const override { return {nixl::DRAM}; }
  nixl::Result register_memory(const nixl::BlobDescriptor&, const nixl::Memory&, nixl::Metadata*& out) override {
    out = new nixl::Metadata(true);
    return nixl::SUCCESS;
  }
  nixl::Result deregister_memory(nixl::Metadata* m) override { delete m; return nixl::SUCCESS; }
  nixl::Result connect(const std::string&) override { return nixl::SUCCESS; }
  nixl::Result disconnect(const std::string&) override { return nixl::SUCCESS; }
  nixl::Result unload_metadata(nixl::Metadata* m) override { delete m; return nixl::SUCCESS; }
  nixl::Result prepare(const nixl::Operation&, const nixl::MetaList&, const nixl::MetaList&, const std::string&,
                       nixl::Request*& handle, const nixl::TransferOptions*) const override {
    handle = new Request();
    return nixl::SUCCESS;
  }
  nixl::Result post(const nixl::Operation&, const nixl::MetaList&, const nixl::MetaList&, const std::string&,
                    nixl::Request*&, const nixl::TransferOptions*) const override { return nixl::SUCCESS; }
  nixl::Result check(nixl::Request*) const override { return nixl::SUCCESS; }
  nixl::Result release(nixl::Request* handle) const override { delete handle; return nixl::SUCCESS; }
  nixl::Result remote_view(const void*, void*&, const nixl::TransferOptions*) const override { return nixl::SUCCESS; }
  nixl::Result local_view(const void*, void*&, const nixl::TransferOptions*) const override { return nixl::SUCCESS; }
  void release_view(void*) const override {}
  nixl::Result public_data(const nixl::Metadata*, std::string& out) const override { out = "x"; return nixl::SUCCESS; }
  nixl::Result connection_info(std::string& out) const override { out = "x"; return nixl::SUCCESS; }
  nixl::Result load_connection_info(const std::string&, const std::string&) override { return nixl::SUCCESS; }
  nixl::Result load_remote(const nixl::BlobDescriptor&, const nixl::Memory&, const std::string&,
                           nixl::Metadata*& out) override { out = new nixl::Metadata(false); return nixl::SUCCESS; }
  nixl::Result load_local(nixl::Metadata* in, nixl::Metadata*& out) override { out = in; return nixl::SUCCESS; }
  nixl::Result notifications(nixl::NotificationList&) override { return nixl::SUCCESS; }
  nixl::Result notify(const std::string&, const std::string&) const override { return nixl::SUCCESS; }
  nixl::Result query(const nixl::RegisterList&, std::vector<nixl::QueryAnswer>&) const override {
    return nixl::SUCCESS;
  }
  nixl::Result estimate(const nixl::Operation&, const nixl::MetaList&, const nixl::MetaList&, const std::string&,
                        nixl::Request* const&, std::chrono::microseconds&, std::chrono::microseconds&, int&,
                        const void*) const override { return nixl::SUCCESS; }
};
nixl::Engine* create(const nixl::InitParameters* init) { return new Fake(*init); }
void destroy(nixl::Engine* engine) { delete engine; }
const char* name() { return "UCX"; }
nixl::Options options() { return {}; }
std::vector<nixl::Memory> memories() { return {nixl::DRAM}; }
}
extern "C" nixl::Plugin* nixl_plugin_init() {
  static nixl::Plugin plugin{INTERFACE, create, destroy, name, name, options, memories};
  return &plugin;
}
"""


@pytest.mark.parametrize(
    ("table", "interface", "why"),
    [
        (30, 1, "has other functions than those known here"),
        (29, 2, "is no UCX plugin of interface version 1"),
        (29, 1, "its self-test failed: a transfer moved wrong bytes"),
    ],
)
def test_an_engine_that_is_not_what_it_must_be_is_refused(
    impostor: Callable[[str], dict[str, str]], table: int, interface: int, why: str, tmp_path: Path
) -> None:
    environment = impostor(FAKE.replace("TABLE", str(table)).replace("INTERFACE", str(interface)))
    with (tmp_path / "errors").open("w+") as errors:
        with pytest.raises(HostError):
            AgentHost("A", options={"ucx": "on"}, environment=environment, stderr=errors)
        errors.seek(0)
        assert why in errors.read()
    with AgentHost("A", options={"ucx": "off"}, environment=environment) as a:
        assert "VRAM_SEG" not in a.memory_kinds()
