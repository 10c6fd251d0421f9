// Engines without NIXL, for the sanitizers: several peers in one process, several threads, everything at once.
//
//   tent_stress [seconds] [seed]
//
// Writes, reads, empty and scattered transfers, notifications, cancels in mid-flight, regions that come and go, peers
// that leave and come back. Every transfer that ends well is compared byte for byte. Exit status 0 if all held.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "engine/engine.h"

namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t PART = 3 << 20;   // bytes of one worker
constexpr int WORKERS = 3;         // threads of one engine
constexpr int ENGINES = 3;

std::atomic<int> failures{0};
std::atomic<int> finished{0};
std::atomic<int> canceled{0};

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("stress: %s\n", what);
  ++failures;
}

struct Node {
  std::vector<uint8_t> source, sink, serve;   // written from, written to and read into, read from
  std::unique_ptr<tent::Engine> engine;
  tent::Region *sink_region = nullptr, *serve_region = nullptr;
};

tent::Status wait(const tent::Transfer& transfer) {
  const auto end = Clock::now() + std::chrono::seconds(120);
  while (transfer.status.load(std::memory_order_acquire) == tent::Status::running && Clock::now() < end)
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  return transfer.status.load(std::memory_order_acquire);
}

void add(tent::Transfer& transfer, uint8_t* local, const tent::Region& region, uint64_t offset, uint64_t length) {
  const tent::RegionInfo info = tent::Engine::describe_region(region);
  transfer.plan.add({local, info.token, offset, length, info.slot});
}

// One worker writes to and reads from one other engine, in its own part of all buffers.
void work(std::vector<Node>& nodes, int from, int to, int worker, uint32_t seed, Clock::time_point end) {
  std::mt19937 random(seed);
  tent::Engine& engine = *nodes[static_cast<size_t>(from)].engine;
  Node& here = nodes[static_cast<size_t>(from)];
  Node& there = nodes[static_cast<size_t>(to)];
  const std::string peer = there.engine->agent();
  const size_t base = static_cast<size_t>(worker) * PART;
  // The sink of a target is shared by all who write there: one part for each pair of writer and worker.
  const size_t sink_base = (static_cast<size_t>(from) * WORKERS + static_cast<size_t>(worker)) * PART;
  std::vector<uint8_t> reads(PART);
  while (Clock::now() < end) {
    const size_t size = random() % 4 == 0 ? random() % 64 : random() % PART;
    const bool write = random() % 2 == 0;
    auto transfer = engine.prepare(write ? tent::Op::write : tent::Op::read, peer);
    if (transfer == nullptr) return expect(false, "the peer is unknown");
    transfer->priority = static_cast<tent::Priority>(random() % 3);
    uint8_t* local = write ? here.source.data() + base : reads.data();
    const tent::Region& region = write ? *there.sink_region : *there.serve_region;
    const size_t remote = write ? sink_base : base;
    const size_t piece = random() % 3 == 0 ? 1 + random() % 4096 : size + 1;
    for (size_t at = 0; at < size; at += piece)
      add(*transfer, local + at, region, remote + at, std::min(piece, size - at));
    if (write)
      for (size_t at = 0; at < size; at += 97) local[at] = static_cast<uint8_t>(random());
    else
      std::memset(reads.data(), 0, size);
    engine.post(*transfer, random() % 3 == 0 ? std::optional<std::string>("done") : std::nullopt);
    if (random() % 8 == 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
      engine.release(*transfer);
      if (transfer->status == tent::Status::canceled) ++canceled;
      continue;
    }
    const tent::Status status = wait(*transfer);
    expect(status == tent::Status::done, "a transfer failed");
    const uint8_t* expected = write ? local : there.serve.data() + remote;
    const uint8_t* got = write ? there.sink.data() + sink_base : reads.data();
    expect(std::memcmp(expected, got, size) == 0, "bytes differ");
    engine.release(*transfer);
    if (random() % 16 == 0) engine.notify(peer, "plain");
    if (random() % 8 == 0) engine.take_notifications();
    ++finished;
  }
}

// Regions appear and vanish beside the traffic, metrics are asked for.
void disturb(Node& node, Clock::time_point end) {
  std::vector<uint8_t> memory(1 << 16);
  while (Clock::now() < end) {
    tent::Region* region = node.engine->add_region(memory.data(), memory.size());
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    node.engine->remove_region(region);
    expect(node.engine->metrics_json().starts_with("{\"agent\":\"node"), "metrics");
    node.engine->metrics_text();
  }
}

void round(bool cma, double seconds, uint32_t seed) {
  std::vector<Node> nodes(ENGINES);
  for (int i = 0; i < ENGINES; ++i) {
    Node& node = nodes[static_cast<size_t>(i)];
    tent::Config config;
    config.cma = cma;
    config.metrics = false;
    config.links = {"lo"};
    node.source.resize(PART * WORKERS);
    node.serve.resize(PART * WORKERS);
    node.sink.resize(PART * WORKERS * ENGINES);
    for (size_t at = 0; at < node.serve.size(); ++at) node.serve[at] = static_cast<uint8_t>(at * 31 + static_cast<size_t>(i));
    node.engine = std::make_unique<tent::Engine>(config, "node" + std::to_string(i));
    node.sink_region = node.engine->add_region(node.sink.data(), node.sink.size());
    node.serve_region = node.engine->add_region(node.serve.data(), node.serve.size());
  }
  for (Node& a : nodes)
    for (Node& b : nodes)
      if (&a != &b) a.engine->load_peer(b.engine->agent(), b.engine->connection_info());
  const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  std::vector<std::thread> threads;
  for (int from = 0; from < ENGINES; ++from) {
    for (int worker = 0; worker < WORKERS; ++worker)
      threads.emplace_back(work, std::ref(nodes), from, (from + 1 + worker % (ENGINES - 1)) % ENGINES, worker,
                           seed + static_cast<uint32_t>(from * 10 + worker), end);
    threads.emplace_back(disturb, std::ref(nodes[static_cast<size_t>(from)]), end);
  }
  for (std::thread& thread : threads) thread.join();

  // A peer that goes away in the middle: its transfers end with an error, and soon.
  auto last = nodes[0].engine->prepare(tent::Op::write, "node1");
  add(*last, nodes[0].source.data(), *nodes[1].sink_region, 0, PART);
  nodes[0].engine->post(*last, "never mind");
  nodes[0].engine->disconnect("node1");
  expect(wait(*last) != tent::Status::running, "a transfer outlived its peer");
  nodes[0].engine->load_peer("node1", nodes[1].engine->connection_info());
  auto again = nodes[0].engine->prepare(tent::Op::write, "node1");
  add(*again, nodes[0].source.data(), *nodes[1].sink_region, 0, PART);
  nodes[0].engine->post(*again, std::nullopt);
  expect(wait(*again) == tent::Status::done, "a peer that came back");
  nodes[1].engine.reset();
  auto dead = nodes[2].engine->prepare(tent::Op::read, "node1");
  add(*dead, nodes[2].source.data(), *nodes[0].serve_region, 0, 100);
  nodes[2].engine->post(*dead, std::nullopt);
  expect(wait(*dead) == tent::Status::disconnected, "a dead peer");
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 2.0;
  const auto seed = static_cast<uint32_t>(argc > 2 ? std::atoi(argv[2]) : 1);
  round(true, seconds, seed);
  round(false, seconds, seed + 1000);
  std::printf("%d transfers, %d canceled, %d failures\n", finished.load(), canceled.load(), failures.load());
  return failures == 0 && finished > 0 ? 0 : 1;
}
