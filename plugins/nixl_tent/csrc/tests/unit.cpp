// Checks of single parts: slices, scheduler, rate, stall, framing, metadata, keys, configuration, files, direct copies.
// Prints one line per failure; exits with 1 if there was one.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "config/config.h"
#include "engine/direct.h"
#include "files/file.h"
#include "files/io.h"
#include "health/stall.h"
#include "scheduler/rate.h"
#include "scheduler/scheduler.h"
#include "security/sha256.h"
#include "slices/plan.h"
#include "topology/topology.h"
#include "wire/frame.h"
#include "wire/metadata.h"

namespace {

int failures = 0;

void expect(bool holds, const char* what, int line) {
  if (holds) return;
  std::printf("unit.cpp:%d: %s\n", line, what);
  ++failures;
}
#define EXPECT(condition) expect((condition), #condition, __LINE__)

template <typename Run>
std::string error_of(Run run) {
  try {
    run();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

std::string hex(const tent::Digest& digest) {
  std::string text;
  for (const uint8_t byte : digest) {
    char two[3];
    std::snprintf(two, sizeof two, "%02x", byte);
    text += two;
  }
  return text;
}

// FIPS 180-4 and RFC 4231 test vectors.
void keys() {
  EXPECT(hex(tent::sha256("abc")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT(hex(tent::sha256("")) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT(hex(tent::sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq")) ==
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT(hex(tent::hmac_sha256("Jefe", "what do ya want for nothing?")) ==
         "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
  EXPECT(hex(tent::hmac_sha256(std::string(131, '\xaa'), "Test Using Larger Than Block-Size Key - Hash Key First")) ==
         "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
  EXPECT(tent::random_bytes(32) != tent::random_bytes(32));
}

// Whatever the pieces and sizes, slices cover every byte once, in order, within the limits of a frame.
void slices() {
  std::mt19937 random(7);
  for (int round = 0; round < 300; ++round) {
    std::vector<uint8_t> memory(1 << 18);
    tent::Plan plan;
    uint64_t total = 0;
    uint64_t at = 0;
    while (at < memory.size()) {
      const uint64_t length = std::min<uint64_t>(random() % (round % 3 == 0 ? 64 : 20000), memory.size() - at);
      const auto slot = static_cast<uint32_t>(random() % 3);
      plan.add({memory.data() + at, 9, at * 2, length, slot});
      total += length;
      at += length + (random() % 2 == 0 ? 1 : 0);
    }
    EXPECT(plan.total() == total);
    const auto wanted = static_cast<uint32_t>(1 + random() % 50000);
    const uint32_t rows = 1 + random() % tent::MAX_SEGMENTS;
    uint64_t covered = 0;
    while (plan.remaining() > 0) {
      const tent::Cut cut = plan.cut(wanted, rows);
      uint32_t bytes = 0;
      uint32_t count = 0;
      plan.rows(cut, [&](uint8_t* local, const tent::Piece& piece, uint64_t offset, uint32_t length) {
        EXPECT(offset == piece.offset + static_cast<uint64_t>(local - piece.local));
        for (uint32_t i = 0; i < length; ++i) ++local[i];
        bytes += length;
        ++count;
      });
      EXPECT(bytes == cut.bytes && bytes > 0 && count <= rows && bytes <= wanted + wanted / 4);
      covered += bytes;
    }
    EXPECT(covered == total);
    EXPECT(std::accumulate(memory.begin(), memory.end(), uint64_t{0}) == total);
    EXPECT(*std::max_element(memory.begin(), memory.end()) == 1);
  }
  std::vector<uint8_t> memory(100);
  tent::Plan joined;
  for (uint64_t i = 0; i < 10; ++i) joined.add({memory.data() + 10 * i, 1, 10 * i, 10, 0});
  joined.add({memory.data(), 1, 500, 0, 0});
  EXPECT(joined.size() == 1 && joined.total() == 100);
}

// A link in virtual time: serves bytes one after the other at a rate, answers after a round trip.
struct Wire {
  double rate;
  double round_trip = 1e-4;
  double free_at = 0;
};
struct Event {
  double at;
  size_t link;
  double bytes;
  double sent;
};

// Sends `total` bytes over the wires with the real scheduler and estimates; returns the time it took.
double simulate(std::vector<Wire> wires, double total, bool spray, double slow_at = 1e9, double slow_factor = 1) {
  tent::SchedulePolicy policy;
  policy.spray = spray;
  tent::Scheduler scheduler(policy);
  std::vector<tent::LinkLoad> loads(wires.size());
  std::vector<tent::RateEstimate> rates(wires.size(), tent::RateEstimate(1e9));
  for (size_t i = 0; i < wires.size(); ++i) loads[i] = {true, 0, 1e9, false, 0, 0, wires[i].round_trip, 0};
  std::vector<Event> events;
  double backlog = total;
  double left = total;
  double now = 0;
  while (left > 0) {
    while (backlog > 0) {
      const auto choice = scheduler.next(loads, backlog);
      if (!choice) break;
      const double bytes = std::min<double>(choice->bytes, backlog);
      Wire& wire = wires[choice->link];
      const double rate = wire.rate * (choice->link + 1 == wires.size() && now > slow_at ? slow_factor : 1);
      wire.free_at = std::max(now + wire.round_trip / 2, wire.free_at) + bytes / rate;
      events.push_back({wire.free_at + wire.round_trip / 2, choice->link, bytes, now});
      loads[choice->link].outstanding += bytes;
      ++loads[choice->link].slices;
      backlog -= bytes;
    }
    const auto first = std::min_element(events.begin(), events.end(),
                                        [](const Event& a, const Event& b) { return a.at < b.at; });
    const Event done = *first;
    events.erase(first);
    now = done.at;
    left -= done.bytes;
    tent::LinkLoad& load = loads[done.link];
    load.outstanding -= done.bytes;
    --load.slices;
    rates[done.link].finished(done.bytes, done.sent, now, load.round_trip);
    load.rate = rates[done.link].bytes_per_second();
    load.measured = rates[done.link].measured();
  }
  return now;
}

void scheduling() {
  // Within 3 % of the sum of the rates, whatever their mix; a static split is held up by the slowest.
  const std::vector<std::vector<double>> mixes = {{1e8, 1e8}, {1e8, 2.5e7}, {1e8, 1e7}, {1e8, 9e7, 5e7, 1e7},
                                                  {2e10, 2e10, 2e10, 2e10, 2e10, 2e10, 2e10, 5e9}};
  for (const auto& mix : mixes) {
    std::vector<Wire> wires;
    double sum = 0;
    double slowest = 1e18;
    for (const double rate : mix) wires.push_back({rate}), sum += rate, slowest = std::min(slowest, rate);
    const double total = sum * 1.0;
    const double efficiency = total / sum / simulate(wires, total, true);
    if (efficiency < 0.97) std::printf("mix of %zu: %.3f of the sum\n", mix.size(), efficiency);
    EXPECT(efficiency >= 0.97);
    const double fixed = total / static_cast<double>(mix.size()) / slowest;
    EXPECT(std::abs(simulate(wires, total, false) / fixed - 1) < 0.1);
  }
  // A link that drops to a tenth half way: the loss is what that link does not carry, not the transfer's time.
  const double healthy = simulate({{1e8}, {1e8}}, 1e8, true);
  const double slowed = simulate({{1e8}, {1e8}}, 1e8, true, 0.25, 0.1);
  EXPECT(std::abs(healthy - 0.5) < 0.03);
  EXPECT(slowed < 0.25 + 0.5e8 / 1.1e8 + 0.05);

  tent::Scheduler scheduler({});
  std::vector<tent::LinkLoad> links(2, {true, 0, 1e8, true, 0, 0, 1e-4, 0});
  links[0].usable = false;
  EXPECT(scheduler.next(links, 1e6)->link == 1);
  links[1].usable = false;
  EXPECT(!scheduler.next(links, 1e6));
  links[0].usable = links[1].usable = true;
  links[0].tier = tent::LAST_RESORT;
  links[1].outstanding = 1e9;
  EXPECT(!scheduler.next(links, 1e6));   // the last resort is not used while a better link lives, however full
  links[1].usable = false;
  EXPECT(scheduler.next(links, 1e6)->link == 0);

  // A link may ask for larger slices than the policy's; a policy of larger ones still holds.
  links[0].largest = 8 << 20;
  EXPECT(scheduler.next(links, 1e9)->bytes == 8 << 20);
  EXPECT(tent::Scheduler({.slice_max = 16 << 20}).next(links, 1e9)->bytes == 16 << 20);

  // Idle links of one rate: each could leave the little there is to all the others together, but one must take it.
  for (const size_t count : {2, 3, 8, 64}) {
    const std::vector<tent::LinkLoad> equal(count, {.usable = true, .rate = 1e9, .measured = true});
    for (const double backlog : {1.0, 64.0, 16384.0, 65536.0, 1e6}) EXPECT(scheduler.next(equal, backlog).has_value());
  }

  // Hedging: only where the copy promises to be clearly earlier.
  std::vector<tent::LinkLoad> pair(2, {true, 0, 1e8, true, 0, 0, 1e-4, 0});
  EXPECT(!scheduler.hedge(pair, 0, 1e5, 1e5));
  pair[0].rate = 1e7;
  EXPECT(scheduler.hedge(pair, 0, 1e5, 1e5) == 1);
  pair[1].usable = false;
  EXPECT(!scheduler.hedge(pair, 0, 1e5, 1e5));
}

void rates() {
  // A full queue does not make the link look slower: 100 slices sent at once, served one after the other.
  tent::RateEstimate estimate(1e9);
  for (int i = 1; i <= 100; ++i) estimate.finished(1e5, 0, i * 1e-3, 1e-4);
  EXPECT(std::abs(estimate.bytes_per_second() / 1e8 - 1) < 0.02);
  // It follows to any low rate: there is no floor.
  for (int i = 1; i <= 50; ++i) estimate.finished(1e5, 0, 0.1 + i * 1.0, 1e-4);
  EXPECT(std::abs(estimate.bytes_per_second() / 1e5 - 1) < 0.02);
  // One slow sample does not decide.
  tent::RateEstimate steady(1e9);
  for (int i = 1; i <= 100; ++i) steady.finished(1e5, 0, i * 1e-3, 1e-4);
  steady.finished(1e5, 0, 0.1 + 10e-3, 1e-4);
  EXPECT(steady.bytes_per_second() > 0.5e8);
  // Answers that come in bursts, because nobody looked for 20 ms, are neither a slow link nor a fast one.
  tent::RateEstimate bursts(1e9);
  for (int burst = 1; burst <= 20; ++burst)
    for (int i = 0; i < 20; ++i) bursts.finished(1e5, 0, burst * 20e-3 + i * 1e-6, 1e-4);
  EXPECT(std::abs(bursts.bytes_per_second() / 1e8 - 1) < 0.4);
  // Isolated slices: the round trip and the waking of two processes are not service, and lower nothing; a service
  // that they do not explain does.
  tent::RateEstimate sparse(1e9);
  for (int i = 1; i <= 20; ++i) sparse.finished(1e6, 0, i * 10e-3, 5e-3);
  for (int i = 1; i <= 20; ++i) sparse.finished(1e6, i, i + 10e-3 + 5e-3 + 15e-3, 5e-3);
  EXPECT(std::abs(sparse.bytes_per_second() / 1e8 - 1) < 0.02);
  for (int i = 31; i <= 60; ++i) sparse.finished(1e6, i, i + 0.5, 5e-3);
  EXPECT(sparse.bytes_per_second() < 0.05e8);
}

void stalls() {
  constexpr double look = 4.8e-3;
  const auto make = [] { return tent::StallClock(6e-3, look); };
  tent::Evidence moving{0, true, false, 1e-4, 0};
  tent::StallClock clock = make();
  clock.restart(0, moving);
  double now = 0;
  for (int i = 0; i < 100; ++i) {
    now += 2e-3;
    ++moving.counter;
    EXPECT(clock.observe(now, moving) <= clock.limit(moving));
  }
  // Bytes on the wire and not a word from the peer's kernel: a stall, within 10 ms.
  double silence = 0;
  const double stopped = now;
  while (silence <= clock.limit(moving)) silence = clock.observe(now += 2e-3, moving);
  EXPECT(now - stopped < 10e-3);
  // The same on a machine where every look comes late: later, but under 50 ms.
  tent::StallClock starved = make();
  starved.restart(now, moving);
  const double quiet = now;
  for (silence = 0; silence <= starved.limit(moving);) silence = starved.observe(now += 9e-3, moving);
  EXPECT(now - quiet < 50e-3);
  // A paused receiver: its kernel has acknowledged everything, nothing is waiting. Never a stall.
  tent::StallClock paused = make();
  paused.restart(0, {5, true, false, 0, 0});
  for (double t = 0; t < 10; t += 2e-3) EXPECT(paused.observe(t, {5, false, false, 0, 0}) == 0);
  // Or its buffer is full and ours waits for room: the kernel says so.
  tent::StallClock full = make();
  full.restart(0, {5, true, false, 0, 0});
  for (uint64_t i = 1; i < 1000; ++i) EXPECT(full.observe(static_cast<double>(i) * 2e-3, {5, true, false, 0, i}) == 0);
  // This process slept for two seconds: that alone proves nothing.
  tent::StallClock slept = make();
  slept.restart(0, moving);
  slept.observe(2e-3, moving);
  EXPECT(slept.observe(2.0, moving) < 2e-3 + 5e-3);
  ++moving.counter;
  EXPECT(slept.observe(2.002, moving) == 0);
  // A link whose packets are far apart is given more time, a link that may delay its answer too.
  tent::StallClock slow = make();
  tent::Evidence packets{0, true, false, 0, 0};
  slow.restart(0, packets);
  for (int i = 1; i <= 20; ++i) {
    for (int step = 0; step < 10; ++step) slow.observe((i - 1) * 20e-3 + step * 2e-3, packets);
    ++packets.counter;
    slow.observe(i * 20e-3, packets);
  }
  EXPECT(slow.limit(packets) > 20e-3 && slow.limit(packets) < 50e-3);
  EXPECT(make().limit({0, true, true, 0, 0}) >= 50e-3);
}

void framing() {
  tent::Header header{.kind = tent::Kind::write, .segments = 2, .payload = 100};
  tent::seal(header);
  EXPECT(!tent::problem(header, true).has_value());
  EXPECT(tent::problem(header, false).has_value());   // data before the handshake
  const auto broken = [&](auto change, bool again = true) {
    tent::Header bad = header;
    change(bad);
    if (again) tent::seal(bad);
    return tent::problem(bad, true).has_value();
  };
  EXPECT(broken([](tent::Header& h) { h.magic ^= 1; }));
  EXPECT(broken([](tent::Header& h) { h.version = 9; }));
  EXPECT(broken([](tent::Header& h) { h.payload ^= 1; }, false));
  EXPECT(broken([](tent::Header& h) { h.segments = tent::MAX_SEGMENTS + 1; }));
  EXPECT(broken([](tent::Header& h) { h.payload = tent::MAX_SLICE + 1; }));
  EXPECT(broken([](tent::Header& h) { h.slice = tent::MAX_SLICES_OF_TRANSFER; }));
  EXPECT(broken([](tent::Header& h) { h.kind = static_cast<tent::Kind>(99); }));
  EXPECT(broken([](tent::Header& h) { h.kind = tent::Kind::hello; }));

  tent::ConnectionInfo info{std::string(16, 'e'), std::string(32, 'k'), "host", {{"tcp", "r0", "10.0.0.1", 80, 24, 800}}};
  const std::string blob = tent::encode(info);
  EXPECT(tent::encode(tent::decode_connection(blob)) == blob);
  for (size_t cut = 0; cut < blob.size(); ++cut)
    EXPECT(!error_of([&] { tent::decode_connection(std::string_view(blob).substr(0, cut)); }).empty());
  EXPECT(!error_of([&] { tent::decode_connection(blob + "x"); }).empty());
  const std::string region = tent::encode(tent::RegionInfo{1, 0x1000, 0x2000, 3});
  EXPECT(tent::decode_region(region).length == 0x2000);
  EXPECT(!error_of([&] { tent::decode_region(tent::encode(tent::RegionInfo{1, ~0ull - 5, 100, 3})); }).empty());
  EXPECT(!error_of([&] { tent::decode_region(tent::encode(tent::RegionInfo{1, 0, 100, 3, 2})); }).empty());
  tent::RegionInfo hosted{1, 0x1000, 0x2000, 3, 1, 7, std::string(tent::MAX_HOSTED, 'h')};
  EXPECT(tent::encode(tent::decode_region(tent::encode(hosted))) == tent::encode(hosted));
  hosted.hosted += 'h';
  EXPECT(!error_of([&] { tent::decode_region(tent::encode(hosted)); }).empty());
  std::mt19937 random(3);
  for (int i = 0; i < 20000; ++i) {   // whatever bytes: an answer or a refusal, never a crash
    std::string noise = blob;
    for (int flips = 1 + static_cast<int>(random() % 8); flips > 0; --flips)
      noise[random() % noise.size()] = static_cast<char>(random());
    error_of([&] { tent::decode_connection(noise); });
  }
}

void configuration() {
  EXPECT(error_of([] { tent::read_config({{"mode", "fast"}}); }).find("spray or static") != std::string::npos);
  EXPECT(error_of([] { tent::read_config({{"rails", "r0"}}); }).find("unknown option 'rails'") != std::string::npos);
  EXPECT(error_of([] { tent::read_config({{"stall_ms", "6x"}}); }).find("number") != std::string::npos);
  EXPECT(error_of([] { tent::read_config({{"slice_min", "2000000"}}); }).find("slice_max") != std::string::npos);
  setenv("TENT_QUEUE_MS", "7", 1);
  EXPECT(tent::read_config({}).queue_ms == 7);
  EXPECT(tent::read_config({{"queue_ms", "9"}}).queue_ms == 9);   // a backend parameter beats the environment
  unsetenv("TENT_QUEUE_MS");
  const auto values = tent::parse_toml("[other]\nmode = \"x\"\n[tent] # ours\nlinks = [\"r0\", \"r1\"]\nhedge = false # no\n");
  EXPECT(values.size() == 2 && values.at("hedge") == "false" && values.at("links") == "r0, r1");
}

void topology() {
  const auto at = [](const char* interface, const char* address, uint8_t prefix) {
    return tent::Endpoint{"tcp", interface, address, 1, prefix, 0};
  };
  const std::vector<tent::Endpoint> here = {at("lo", "127.0.0.1", 8), at("r0", "10.0.0.1", 24), at("r1", "10.0.1.1", 24)};
  const std::vector<tent::Endpoint> there = {at("lo", "127.0.0.1", 8), at("r0", "10.0.0.2", 24), at("r1", "10.0.1.2", 24),
                                             at("r2", "192.168.5.5", 16)};
  const auto paths = tent::pair_endpoints(here, there, false);
  EXPECT(paths.size() == 3);
  EXPECT(paths[0].local.interface == "r0" && paths[0].remote.address == "10.0.0.2" && paths[0].tier == 0);
  EXPECT(paths[1].local.interface == "r1" && paths[1].remote.address == "10.0.1.2");
  EXPECT(paths[2].remote.address == "192.168.5.5" && paths[2].tier == 1);
  EXPECT(tent::pair_endpoints(here, there, true).size() == 4);
  EXPECT(error_of([] { tent::select_addresses({}, {"ib9"}); }).find("'ib9'") != std::string::npos);
}

std::shared_ptr<const tent::File> scratch_file(uint64_t size) {
  char name[] = "/tmp/tent-unit-XXXXXX";
  const tent::Fd fd(mkstemp(name));
  unlink(name);
  return tent::open_file(static_cast<uint64_t>(fd.get()), "", 0, size);
}

void file_names() {
  EXPECT(!tent::parse_file_name(""));
  EXPECT(!tent::parse_file_name("/a/b:c"));
  EXPECT(!tent::parse_file_name("rw:"));
  EXPECT(!tent::parse_file_name("wo:/x"));
  EXPECT(!tent::parse_file_name("rw,fast:/x"));
  const auto named = tent::parse_file_name("rw,create,direct:/x:y");
  EXPECT(named && named->path == "/x:y" && named->flags == (O_RDWR | O_CREAT | O_DIRECT));
  EXPECT(tent::parse_file_name("ro:/x")->flags == O_RDONLY);
  const auto file = scratch_file(100);
  EXPECT(file->holds(0, 100) && file->holds(100, 0) && !file->holds(1, 100) && !file->holds(101, 0));
  EXPECT(!file->holds(~0ull, 2) && !file->holds(2, ~0ull));
  EXPECT(scratch_file(0)->holds(1 << 30, 1) && !scratch_file(0)->holds(INT64_MAX, 1));
  EXPECT(error_of([] { tent::open_file(1 << 20, "", 0, 0); }).find("Bad file descriptor") != std::string::npos);
  EXPECT(error_of([] { tent::open_file(0, "ro:/dev/null", 0, 0); }).find("neither") != std::string::npos);
}

// The book of file transfers: what is offered, and what results lead to.
void file_book() {
  const auto file = scratch_file(0);
  std::vector<uint8_t> memory(3 * tent::FILE_CHUNK);
  const auto transfer_of = [&](tent::Priority priority, std::vector<uint64_t> lengths) {
    auto transfer = std::make_unique<tent::Transfer>();
    transfer->op = tent::Op::read;
    transfer->priority = priority;
    uint64_t at = 0;
    for (const uint64_t length : lengths) transfer->files.push_back({file, at, memory.data() + at, length}), at += length;
    return transfer;
  };
  const auto nothing = [] {};
  {   // Two of one priority take turns, a lower one waits.
    tent::FileBook book;
    const auto low = transfer_of(tent::Priority::low, {1});
    const auto a = transfer_of(tent::Priority::normal, {10, 20});
    const auto b = transfer_of(tent::Priority::normal, {tent::FILE_CHUNK + 5});
    for (const auto& transfer : {low.get(), a.get(), b.get()}) book.add(*transfer, nothing);
    std::vector<tent::FileChunk> chunks;
    while (const auto chunk = book.take()) chunks.push_back(*chunk);
    EXPECT(chunks.size() == 5);
    std::vector<uint32_t> sizes;
    for (const tent::FileChunk& chunk : chunks) sizes.push_back(chunk.bytes);
    EXPECT((sizes == std::vector<uint32_t>{10, tent::FILE_CHUNK, 20, 5, 1}));
    EXPECT(chunks[3].offset() == tent::FILE_CHUNK && chunks[2].offset() == 10);
    for (const tent::FileChunk& chunk : chunks) {
      EXPECT(book.take_finished() == nullptr);
      book.answered(chunk, static_cast<ssize_t>(chunk.bytes) - (&chunk == &chunks[4] ? 0 : 1));
    }
    EXPECT(book.take_finished()->transfer == low.get() && book.take_finished() == nullptr && book.take());
  }
  {   // A short answer brings the rest again; an interrupted call all of it; only then is it over.
    tent::FileBook book;
    const auto a = transfer_of(tent::Priority::normal, {100});
    book.add(*a, nothing);
    book.answered(*book.take(), 60);
    EXPECT(book.take_finished() == nullptr);
    book.answered(*book.take(), -EINTR);
    const auto rest = book.take();
    EXPECT(rest && rest->offset() == 60 && rest->bytes == 40 && !book.take());
    EXPECT(book.take_finished() == nullptr);
    book.answered(*rest, 40);
    const auto job = book.take_finished();
    EXPECT(job != nullptr && job->trouble.empty() && !job->canceled && book.empty());
  }
  {   // An error begins nothing more, and waits for what is under way.
    tent::FileBook book;
    const auto a = transfer_of(tent::Priority::normal, {100, 100, 100});
    book.add(*a, nothing);
    const auto first = book.take();
    const auto second = book.take();
    book.answered(*first, -ENOSPC);
    EXPECT(!book.take() && book.take_finished() == nullptr);
    book.answered(*second, 50);
    EXPECT(!book.take());
    const auto job = book.take_finished();
    EXPECT(job != nullptr && job->trouble.find("No space left") != std::string::npos && !book.take());
  }
  {   // The end of a file is an error; a cancellation waits for what is under way too.
    tent::FileBook book;
    const auto a = transfer_of(tent::Priority::normal, {100, 100});
    const auto b = transfer_of(tent::Priority::normal, {100, 100});
    book.add(*a, nothing);
    book.answered(*book.take(), 0);
    EXPECT(book.take_finished()->trouble.find("the file ends") != std::string::npos);
    book.add(*b, nothing);
    const auto under_way = book.take();
    EXPECT(book.cancel(*b) && !book.take() && book.take_finished() == nullptr && book.holds(*b));
    book.answered(*under_way, 100);
    EXPECT(book.take_finished()->canceled && !book.holds(*b) && !book.cancel(*b));
  }
}

// Real files, by both methods: what is written is read again, from several threads at once.
void file_io() {
  constexpr uint64_t size = 3 * tent::FILE_CHUNK + 17;
  for (const auto method : {tent::FileMethod::automatic, tent::FileMethod::threads}) {
    tent::FileIo io(method, [](const std::string&) {});
    const auto file = scratch_file(0);
    std::vector<std::thread> threads;
    std::atomic<int> wrong = 0;
    for (uint64_t number = 0; number < 4; ++number)
      threads.emplace_back([&, number] {
        std::vector<uint8_t> memory(size);
        for (size_t i = 0; i < size; ++i) memory[i] = static_cast<uint8_t>(i * 7 + number);
        const auto expected = memory;
        for (const auto op : {tent::Op::write, tent::Op::read}) {
          if (op == tent::Op::read) std::fill(memory.begin(), memory.end(), 0);
          tent::Transfer transfer;
          transfer.op = op;
          transfer.status = tent::Status::running;
          std::atomic<bool> told = false;
          const uint64_t half = size / 3;
          transfer.files.push_back({file, number * size + half, memory.data() + half, size - half});
          transfer.files.push_back({file, number * size, memory.data(), half});
          io.start(transfer, [&] { told = true; });
          while (transfer.status.load(std::memory_order_acquire) == tent::Status::running) std::this_thread::yield();
          if (transfer.status != tent::Status::done || !told) ++wrong;
        }
        if (memory != expected) ++wrong;
        // One that is canceled at once, and one that is still under way when the queue ends.
        tent::Transfer canceled;
        canceled.status = tent::Status::running;
        canceled.files.push_back({file, number * size, memory.data(), size});
        io.start(canceled, [] {});
        io.cancel(canceled);
        if (canceled.status == tent::Status::running) ++wrong;
      });
    for (std::thread& thread : threads) thread.join();
    EXPECT(wrong == 0);
    tent::Transfer past;   // beyond the end of the file
    std::vector<uint8_t> memory(100);
    past.op = tent::Op::read;
    past.status = tent::Status::running;
    past.files.push_back({file, 100 * size, memory.data(), memory.size()});
    io.start(past, [] {});
    while (past.status.load(std::memory_order_acquire) == tent::Status::running) std::this_thread::yield();
    EXPECT(past.status == tent::Status::failed && io.report().failed == 1);
  }
}

// Into and out of this very process: the calls and checks are those between two.
void direct() {
  const std::string engine = "engine of a test";
  tent::DirectTable table(engine);
  EXPECT(table.fd() >= 0);
  const std::optional<uint32_t> cell = table.admit(getpid());
  EXPECT(cell == 0u && table.admit(getpid()) == 1u);
  const auto open = [&](int fd, uint32_t number, const std::string& whose) {
    return tent::DirectAccess::open(getpid(), fd, number, whose);
  };
  EXPECT(open(table.fd(), 0, "another's engine") == nullptr);
  EXPECT(open(table.fd(), tent::DIRECT_PEERS, engine) == nullptr);
  EXPECT(open(0, 0, engine) == nullptr && open(1 << 20, 0, engine) == nullptr);
  int ends[2];
  EXPECT(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
  const int stream = ends[0];

  std::vector<uint8_t> region(5000), local(5000, 7);
  table.publish(3, 42, region.data(), region.size());
  const auto access = open(table.fd(), 0, engine);
  EXPECT(access != nullptr);
  const auto copy = [&](tent::Op op, uint64_t token, uint64_t offset, uint64_t length, uint32_t slot = 3) {
    tent::Plan plan;
    plan.add({local.data(), token, offset, length, slot});
    return access->copy(op, plan, stream);
  };
  EXPECT(copy(tent::Op::write, 42, 0, 5000) && region == local);
  EXPECT(copy(tent::Op::write, 42, 4999, 1));
  region.assign(5000, 9);
  EXPECT(!copy(tent::Op::write, 41, 0, 8) && !copy(tent::Op::write, 42, 4999, 2) && !copy(tent::Op::write, 42, 5001, 1));
  EXPECT(!copy(tent::Op::write, 42, UINT64_MAX, 2) && !copy(tent::Op::write, 42, 0, 8, 4));
  EXPECT(!copy(tent::Op::write, 0, 0, 8, 4) && !copy(tent::Op::write, 42, 0, 8, tent::NO_SLOT));
  EXPECT(region == std::vector<uint8_t>(5000, 9));
  EXPECT(copy(tent::Op::read, 42, 10, 100) && local[99] == 9 && local[100] == 7);

  // More rows than one call takes, each of its own bytes.
  for (size_t i = 0; i < local.size(); ++i) local[i] = static_cast<uint8_t>(i * 31);
  tent::Plan scattered;
  for (uint64_t i = 0; i < 700; ++i) scattered.add({local.data() + 7 * i, 42, 7 * (699 - i), 3, 3});
  EXPECT(access->copy(tent::Op::write, scattered, stream));
  for (size_t i = 0; i < 700; ++i)
    EXPECT(std::memcmp(region.data() + 7 * (699 - i), local.data() + 7 * i, 3) == 0 && region[7 * i + 3] == 9);

  table.retract(3);
  EXPECT(!copy(tent::Op::write, 42, 0, 8));
  table.publish(3, 43, region.data(), region.size());
  close(ends[1]);
  EXPECT(!copy(tent::Op::write, 43, 0, 8));   // whoever was at the other end is not there any more
  close(ends[0]);

  // A process that stops in the middle of a copy holds a deregistration up, until it has ended.
  const pid_t child = fork();
  if (child == 0) {
    void* mapped = mmap(nullptr, sizeof(tent::DirectPage), PROT_READ | PROT_WRITE, MAP_SHARED, table.fd(), 0);
    static_cast<tent::DirectPage*>(mapped)->cells[2].inside = 1;
    pause();
    _exit(0);
  }
  EXPECT(table.admit(child) == 2u);
  void* mapped = mmap(nullptr, sizeof(tent::DirectPage), PROT_READ | PROT_WRITE, MAP_SHARED, table.fd(), 0);
  const auto* page = static_cast<tent::DirectPage*>(mapped);
  while (page->cells[2].inside == 0) usleep(1000);
  std::atomic<bool> drained = false;
  table.dismiss(2);
  EXPECT(table.admit(getpid()) == 3u);   // a cell that has not been left is not another's
  std::thread waits([&] {
    table.drain();
    drained = true;
  });
  usleep(50'000);
  EXPECT(!drained);
  kill(child, SIGKILL);
  waits.join();
  EXPECT(drained);
  waitpid(child, nullptr, 0);
  EXPECT(table.admit(getpid()) == 2u);
  munmap(mapped, sizeof(tent::DirectPage));
}

}  // namespace

int main() {
  keys();
  slices();
  scheduling();
  rates();
  stalls();
  framing();
  configuration();
  topology();
  file_names();
  file_book();
  file_io();
  direct();
  if (failures == 0) std::puts("all good");
  return failures == 0 ? 0 : 1;
}
