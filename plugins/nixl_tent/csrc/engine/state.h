// What the engine remembers of its peers (it dials them) and of its sessions (they dialled it).
#pragma once

#include <algorithm>
#include <array>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/connection.h"
#include "engine/hosted.h"
#include "engine/transfer.h"
#include "health/stall.h"
#include "scheduler/rate.h"
#include "scheduler/scheduler.h"

namespace tent {

struct Region {
  uint8_t* begin = nullptr;
  size_t size = 0;
  uint64_t token = 0;
  uint32_t slot = NO_SLOT;
  MemoryKind kind = MemoryKind::host;
  uint64_t device = 0;
  Hosted::Name hosted = 0;
  std::string hosted_info = {};   // what a peer's hosted engine needs
};

struct InFlight {
  uint64_t transfer;
  uint32_t slice;
  uint32_t bytes;
  double sent;
};

// By reference a slice is some bytes on the wire and one copy: what it costs is two threads that wake, so few are best.
// Half of what may be in flight, so that the next one is there when a copy ends.
constexpr double REFERENCE_SLICE = 8 << 20;

constexpr std::array<double, 6> REROUTE_BUCKETS_MS = {5, 10, 20, 30, 50, 100};

struct LinkCounters {
  uint64_t bytes_out = 0, bytes_in = 0, slices = 0, repeated = 0;
  uint64_t stalls = 0, false_alarms = 0, deaths = 0, dials = 0;
  double last_reroute_ms = 0, worst_reroute_ms = 0;   // silence until the slices went elsewhere
  std::array<uint64_t, REROUTE_BUCKETS_MS.size() + 1> reroutes{};   // how many took no longer; the last: longer
  double reroute_ms_sum = 0;

  void rerouted(double ms) {
    last_reroute_ms = ms;
    worst_reroute_ms = std::max(worst_reroute_ms, ms);
    reroute_ms_sum += ms;
    ++reroutes[static_cast<size_t>(std::lower_bound(REROUTE_BUCKETS_MS.begin(), REROUTE_BUCKETS_MS.end(), ms) -
                                   REROUTE_BUCKETS_MS.begin())];
  }
};

// A slice in the hosted engine.
struct HostedFlight {
  Transfer* transfer;
  std::shared_ptr<Peer> peer;
  Cut cut;
  Hosted::Name posted;
  double sent;
  Hosted::State state = Hosted::State::running;
};

enum class Hosting { runs, ends, ended };
enum class Fence { none, wanted, stands };   // whether the target's hosted engine has ended

enum class LinkState { down, dialling, proving, up };

// The dialler's side of one path to a peer; or, without a transport and never with a connection, the hosted engine's.
struct Link {
  Link(const Path& p, const Transport* t, double first_rate, double stall_floor, double look)
      : path(p), transport(t), rate(first_rate), stall(stall_floor, look) {}

  Path path;
  const Transport* transport;
  LinkState state = LinkState::down;
  bool stalled = false;
  bool barred = false;           // the peer refused us here, or the transport cannot work: not dialled again
  std::string trouble;           // the last reason for being down
  Connection* connection = nullptr;
  RateEstimate rate;
  QueueDepth depth;
  StallClock stall;
  double round_trip = 0;
  std::deque<InFlight> in_flight;
  double outstanding = 0;
  double stalled_since = 0;
  double retry_at = 0;
  double backoff = 0;
  bool refused_dial = false;     // the last dial met nobody listening
  double pinged = 0;
  double last_answer = 0;        // when the peer's process last said something on it
  LinkCounters counters;

  bool usable() const { return state == LinkState::up && !stalled; }
  LinkLoad load() const {
    return {usable(), path.tier, rate.bytes_per_second(), rate.measured(), outstanding,
            static_cast<uint32_t>(in_flight.size()), round_trip, depth.seconds(),
            transport != nullptr && transport->by_reference() ? REFERENCE_SLICE : 0};
  }
};

// The end of a transfer, or a notification: sent until the target acknowledges it.
struct Control {
  uint16_t flags = 0;
  uint32_t total = 0;
  std::string payload = {};
  uint64_t waiter = 0;       // the transfer that is done when it is acknowledged; 0: none
  uint64_t connection = 0;   // where it was last sent; 0: it waits for a link
};

struct Peer {
  std::string agent;
  ConnectionInfo info;
  std::string key;
  uint64_t generation = 0;          // transfer numbers are unique within it; grows when all links were lost
  std::vector<std::unique_ptr<Link>> links;
  Scheduler scheduler;
  bool wanted = false;              // dial it
  bool removed = false;             // its metadata is gone: transfers that still name it fail
  double gone_since = 0;            // no link is up and heard since then; 0: one is
  uint64_t next_write = 1;
  uint64_t next_read = 1;
  uint64_t next_order = 1;          // of plain notifications
  std::unordered_map<uint64_t, Transfer*> active;
  Link* hosted = nullptr;           // in `links`, if both sides host
  std::string hosted_name;          // the peer's name there
  uint32_t hosted_flights = 0;
  double hosted_sign = 0;           // when something last finished there, or the first began
  double hosted_ping = 0;
  Fence fence = Fence::none;
  uint64_t fence_connection = 0;    // where it was asked for
  double fence_asked = 0;
  std::array<std::deque<uint64_t>, PRIORITIES> queues;   // transfers with bytes not cut yet
  std::deque<std::pair<uint64_t, uint32_t>> again;       // slices to send again
  double backlog = 0;               // bytes not given to any link
  std::map<uint64_t, Control> control;
  uint32_t deadlines = 0;           // active transfers that have one

  explicit Peer(const SchedulePolicy& policy) : scheduler(policy) {}
  bool busy() const { return !active.empty() || !control.empty(); }
};

// The target's side of a transfer that writes here.
struct Incoming {
  std::vector<bool> done;
  uint32_t finished = 0;
  std::optional<uint32_t> total;
  std::optional<std::string> notification;
  std::vector<uint64_t> waiting_end;   // connections to answer when it is complete
};

// One initiator's transfers. A higher generation of the same initiator ends this one and its connections.
struct Session {
  std::string agent;
  uint64_t generation = 0;
  std::unordered_map<uint64_t, Incoming> open;
  uint64_t low = 1;                 // every transfer before this one has ended
  std::set<uint64_t> ended;         // and these after it
  uint64_t slice_bits = 0;          // in `open`, bounded
  uint64_t next_order = 1;
  std::map<uint64_t, std::string> early;   // plain notifications that overtook others
  std::set<uint64_t> connections;
  double left = 0;                  // when the last connection closed

  bool has_ended(uint64_t transfer) const { return transfer < low || ended.contains(transfer); }
  void end(uint64_t transfer);
};

}  // namespace tent
