// Two engines with a hosted engine each that this program controls: it moves bytes when it is told to, fails, or stands
// still. What must hold: nothing that was begun in it goes elsewhere before both have ended, no memory is given back
// before nothing touches it, and transfers that only it can carry succeed or fail as a whole.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "engine/engine.h"

namespace {

int failures = 0;

void expect(bool holds, const char* what, int line) {
  if (holds) return;
  std::printf("hosting.cpp:%d: %s\n", line, what);
  ++failures;
}
#define EXPECT(condition) expect((condition), #condition, __LINE__)

enum class Mood { works, stands_still, fails, refuses };

class Puppet final : public tent::Hosted {
 public:
  explicit Puppet(std::atomic<Mood>& mood) : mood_(mood) {}

  const std::string& connection_info() const override { return info_; }
  bool load_peer(const std::string&, const std::string& info) override { return info == info_; }
  void unload_peer(const std::string&) override {}
  Name add_local(uint64_t, size_t, tent::MemoryKind, uint64_t, std::string& info) override {
    info = "memory";
    return ++names_;
  }
  Name add_remote(const std::string&, uint64_t, size_t, tent::MemoryKind, uint64_t, const std::string&) override {
    return ++names_;
  }
  void remove(Name) override {}

  Name post(tent::Op op, const std::string&, const std::vector<Row>& rows) override {
    const std::lock_guard lock(mutex_);
    if (ended || mood_ == Mood::refuses) return 0;
    posted_[++names_] = {op, rows};
    ++begun;
    return names_;
  }

  State check(Name name) override {
    const std::lock_guard lock(mutex_);
    const auto found = posted_.find(name);
    if (found == posted_.end() || mood_ == Mood::fails) {
      posted_.erase(name);
      return State::failed;
    }
    if (mood_ == Mood::stands_still) return State::running;
    for (const Row& row : found->second.rows) {
      auto* here = reinterpret_cast<void*>(row.here);
      auto* there = reinterpret_cast<void*>(row.there);
      if (found->second.op == tent::Op::write) std::memcpy(there, here, row.bytes);
      else std::memcpy(here, there, row.bytes);
    }
    posted_.erase(found);
    return State::done;
  }

  void end() override {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));   // as a real one takes its time
    const std::lock_guard lock(mutex_);
    posted_.clear();
    ended = true;
  }

  std::atomic<bool> ended = false;
  std::atomic<int> begun = 0;

 private:
  struct Posted {
    tent::Op op;
    std::vector<Row> rows;
  };
  std::atomic<Mood>& mood_;
  const std::string info_ = "puppet";
  std::atomic<Name> names_ = 0;
  std::mutex mutex_;
  std::map<Name, Posted> posted_;
};

constexpr size_t BYTES = 6 << 20;

struct Side {
  Side(const char* name, std::atomic<Mood>& mood, tent::Ucx ucx)
      : puppet(new Puppet(mood)),
        engine(config(ucx), name, tent::Drive::threaded, std::unique_ptr<tent::Hosted>(puppet)),
        memory(BYTES) {}

  static tent::Config config(tent::Ucx ucx) {
    tent::Config config;
    config.links = {"127.0.0.1"};
    config.cma = false;
    config.metrics = false;
    config.ucx = ucx;
    config.reconnect_s = 2;
    return config;
  }

  void add(tent::MemoryKind kind) { region = engine.add_region(memory.data(), memory.size(), kind); }

  Puppet* puppet;
  tent::Engine engine;
  std::vector<uint8_t> memory;
  tent::Region* region = nullptr;
};

struct Pair {
  explicit Pair(tent::Ucx ucx, tent::MemoryKind kind) : a("A", mood, ucx), b("B", mood, ucx) {
    a.add(kind);
    b.add(kind);
    a.engine.load_peer("B", b.engine.connection_info());
    b.engine.load_peer("A", a.engine.connection_info());
    const tent::RegionInfo info = tent::Engine::describe_region(*b.region);
    remote = a.engine.load_region("B", tent::decode_region(tent::encode(info)));
    for (size_t i = 0; i < BYTES; ++i) a.memory[i] = static_cast<uint8_t>(i * 13 + i / 7);
  }

  std::unique_ptr<tent::Transfer> post(tent::Op op, const char* notification = nullptr) {
    auto transfer = a.engine.prepare(op, "B");
    const tent::RegionInfo info = tent::Engine::describe_region(*b.region);
    const bool device = a.region->kind == tent::MemoryKind::device;
    for (size_t part = 3; part-- > 0;) {
      const size_t at = part * (BYTES / 3);
      transfer->plan.add({a.memory.data() + at, info.token, at, BYTES / 3, info.slot, a.region->hosted, remote,
                          reinterpret_cast<uint64_t>(b.memory.data()) + at});
    }
    transfer->hostable = true;
    transfer->hosted_only = device;
    a.engine.post(*transfer, notification == nullptr ? std::nullopt : std::optional<std::string>(notification));
    return transfer;
  }

  tent::Status wait(const tent::Transfer& transfer, double seconds = 30) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    while (transfer.status.load(std::memory_order_acquire) == tent::Status::running &&
           std::chrono::steady_clock::now() < end) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      a.engine.hurry(transfer);
    }
    return transfer.status;
  }

  std::atomic<Mood> mood = Mood::works;
  Side a, b;
  tent::Hosted::Name remote = 0;
};

void carries_its_share() {
  Pair pair(tent::Ucx::on, tent::MemoryKind::host);
  for (const auto op : {tent::Op::write, tent::Op::read}) {
    if (op == tent::Op::read) std::fill(pair.a.memory.begin(), pair.a.memory.end(), 0);
    const auto transfer = pair.post(op, "over");
    EXPECT(pair.wait(*transfer) == tent::Status::done);
    EXPECT(pair.a.memory == pair.b.memory);
    pair.a.engine.release(*transfer);
  }
  EXPECT(pair.a.puppet->begun > 0);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT(pair.b.engine.take_notifications().size() == 2);
}

void goes_elsewhere_after_both_have_ended(Mood trouble) {
  Pair pair(tent::Ucx::on, tent::MemoryKind::host);
  pair.mood = trouble;
  const auto transfer = pair.post(tent::Op::write, "through");
  EXPECT(pair.wait(*transfer) == tent::Status::done);
  EXPECT(pair.a.memory == pair.b.memory);
  EXPECT(pair.b.puppet->ended);
  EXPECT(pair.a.puppet->ended == (trouble == Mood::stands_still));   // what failed is over on this side
  pair.a.engine.release(*transfer);
  pair.mood = Mood::works;
  const int begun = pair.a.puppet->begun;
  std::fill(pair.b.memory.begin(), pair.b.memory.end(), 0);
  const auto again = pair.post(tent::Op::write);
  EXPECT(pair.wait(*again) == tent::Status::done && pair.a.memory == pair.b.memory);
  EXPECT(pair.a.puppet->begun == begun);
  pair.a.engine.release(*again);
}

void refused_slices_go_elsewhere_at_once() {
  Pair pair(tent::Ucx::on, tent::MemoryKind::host);
  pair.mood = Mood::refuses;
  const auto transfer = pair.post(tent::Op::write);
  EXPECT(pair.wait(*transfer) == tent::Status::done && pair.a.memory == pair.b.memory);
  EXPECT(!pair.a.puppet->ended && !pair.b.puppet->ended);
  pair.a.engine.release(*transfer);
}

void memory_of_a_device() {
  Pair pair(tent::Ucx::automatic, tent::MemoryKind::device);
  for (const auto op : {tent::Op::write, tent::Op::read}) {
    if (op == tent::Op::read) std::fill(pair.a.memory.begin(), pair.a.memory.end(), 0);
    const auto transfer = pair.post(op, "on the device");
    EXPECT(pair.wait(*transfer) == tent::Status::done);
    EXPECT(pair.a.memory == pair.b.memory);
    pair.a.engine.release(*transfer);
  }
  for (const Mood trouble : {Mood::fails, Mood::refuses}) {
    Pair other(tent::Ucx::automatic, tent::MemoryKind::device);
    other.mood = trouble;
    const auto transfer = other.post(tent::Op::write, "never");
    EXPECT(other.wait(*transfer) == tent::Status::disconnected);
    EXPECT(other.b.engine.take_notifications().empty());
    other.a.engine.release(*transfer);
  }
}

// In automatic mode host memory is ours, whatever the hosted engine could do.
void host_memory_only_when_asked() {
  Pair pair(tent::Ucx::automatic, tent::MemoryKind::host);
  const auto transfer = pair.post(tent::Op::write);
  EXPECT(pair.wait(*transfer) == tent::Status::done && pair.a.memory == pair.b.memory);
  EXPECT(pair.a.puppet->begun == 0);
  pair.a.engine.release(*transfer);
}

// A release, a peer that goes and an engine that closes wait for what cannot be taken back.
void nothing_is_given_back_before_it_has_ended() {
  {
    Pair pair(tent::Ucx::on, tent::MemoryKind::host);
    pair.mood = Mood::stands_still;
    const auto transfer = pair.post(tent::Op::read);
    while (pair.a.puppet->begun == 0) std::this_thread::yield();
    pair.a.engine.release(*transfer);
    EXPECT(pair.a.puppet->ended && transfer->status == tent::Status::canceled);
  }
  {
    Pair pair(tent::Ucx::on, tent::MemoryKind::host);
    pair.mood = Mood::stands_still;
    const auto transfer = pair.post(tent::Op::read);
    while (pair.a.puppet->begun == 0) std::this_thread::yield();
    pair.a.engine.disconnect("B");
    EXPECT(transfer->status == tent::Status::running);
    pair.mood = Mood::works;
    EXPECT(pair.wait(*transfer) == tent::Status::disconnected);
    EXPECT(!pair.a.puppet->ended);
    pair.a.engine.release(*transfer);
  }
  std::unique_ptr<tent::Transfer> left;
  {
    Pair pair(tent::Ucx::on, tent::MemoryKind::host);
    pair.mood = Mood::stands_still;
    left = pair.post(tent::Op::read);
    while (pair.a.puppet->begun == 0) std::this_thread::yield();
  }
  EXPECT(left->status == tent::Status::canceled);
}

}  // namespace

int main() {
  carries_its_share();
  goes_elsewhere_after_both_have_ended(Mood::fails);
  goes_elsewhere_after_both_have_ended(Mood::stands_still);
  refused_slices_go_elsewhere_at_once();
  memory_of_a_device();
  host_memory_only_when_asked();
  nothing_is_given_back_before_it_has_ended();
  if (failures == 0) std::puts("all good");
  return failures == 0 ? 0 : 1;
}
