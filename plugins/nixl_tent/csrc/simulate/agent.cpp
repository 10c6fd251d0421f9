#include "simulate/agent.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "topology/topology.h"
#include "wire/frame.h"

namespace tent::simulate {
namespace {

constexpr double TICK = 2e-3;            // the engine's, between two looks at busy links
constexpr double LONGEST_LOOK = 5e-3;
constexpr double REDIAL = 0.1;           // the engine's longest pause between dials while there is work
constexpr uint32_t BOUND_SLICE = 256 << 10;   // of transfers that are bound to a link: what striping cuts, too

// As many subnets as ports, so that port i faces port i.
std::vector<Endpoint> endpoints(size_t node, const Network& network) {
  std::vector<Endpoint> list;
  for (size_t port = 0; port < network.ports(); ++port) {
    Endpoint endpoint;
    endpoint.transport = "tcp";
    endpoint.interface = "port" + std::to_string(port);
    endpoint.address =
        "10." + std::to_string(port) + "." + std::to_string(node / 250) + "." + std::to_string(node % 250 + 1);
    endpoint.prefix = 16;
    list.push_back(endpoint);
  }
  return list;
}

}  // namespace

struct Cluster::Slice {
  Cut cut;
  bool done = false;
  uint8_t copies = 0;
  bool waiting = false;
};

struct Cluster::Active {
  Transfer transfer;
  Plan plan;
  std::deque<Slice> slices;
  uint32_t finished = 0;
};

struct Cluster::InFlight {
  uint64_t load;
  uint64_t transfer;
  uint32_t slice;
  uint32_t bytes;
  double sent;
};

struct Cluster::Link {
  Link(double first_rate, double stall_floor) : rate(first_rate), stall(stall_floor, LONGEST_LOOK) {}

  Stream stream;
  bool up = true;
  bool stalled = false;
  RateEstimate rate;
  QueueDepth depth;
  StallClock stall;
  int tier = 0;
  double round_trip = 0;
  double outstanding = 0;
  double stalled_since = 0;
  double retry_at = 0;
  std::deque<InFlight> in_flight;

  Evidence evidence() const { return {stream.acknowledged, !stream.loads.empty(), false, round_trip, 0}; }
  bool usable() const { return up && !stalled; }
  LinkLoad load() const {
    return {usable(), tier, rate.bytes_per_second(), rate.measured(), outstanding,
            static_cast<uint32_t>(in_flight.size()), round_trip, depth.seconds()};
  }
};

struct Cluster::Peer {
  explicit Peer(const SchedulePolicy& policy) : scheduler(policy) {}

  std::vector<std::unique_ptr<Link>> links;
  Scheduler scheduler;
  size_t number = 0;
  std::unordered_map<uint64_t, std::unique_ptr<Active>> active;
  std::deque<uint64_t> queue;                          // transfers with bytes not cut yet
  std::deque<std::pair<uint64_t, uint32_t>> again;
  double backlog = 0;
};

Cluster::Cluster(Clock& clock, Network& network, const Settings& settings,
                 std::function<void(const Transfer&)> finished)
    : clock_(clock), network_(network), settings_(settings), finished_(std::move(finished)) {
  policy_.spray = settings.binding == Binding::spray;
  clock_.at(TICK, [this] { tick(); });
}

Cluster::~Cluster() = default;

Cluster::Peer& Cluster::peer(size_t from, size_t to) {
  auto& found = peers_[{from, to}];
  if (found != nullptr) return *found;
  found = std::make_unique<Peer>(policy_);
  found->number = from * network_.nodes() + to;
  for (const Path& path : pair_endpoints(endpoints(from, network_), endpoints(to, network_), false)) {
    const auto port = static_cast<size_t>(path.local.interface.back() - '0');
    Cable& cable = network_.cable(from, port);
    auto link = std::make_unique<Link>(cable.out.rate, settings_.stall_seconds);
    link->stream.from = &cable;
    link->stream.to = &network_.cable(to, port);
    link->stream.outages = link->stream.path_outages();
    link->tier = path.tier;
    link->round_trip = network_.round_trip();
    link->up = link->stream.path_up();
    link->retry_at = clock_.now() + REDIAL;
    link->stall.restart(clock_.now(), link->evidence());
    const size_t index = found->links.size();
    link->stream.finished = [this, &peer = *found, index](uint64_t load) { slice_finished(peer, index, load); };
    found->links.push_back(std::move(link));
  }
  return *found;
}

void Cluster::post(const Transfer& transfer) {
  Peer& to = peer(transfer.from, transfer.to);
  auto active = std::make_unique<Active>();
  active->transfer = transfer;
  active->plan.add({nullptr, 1, 0, transfer.bytes, 0});
  to.backlog += static_cast<double>(transfer.bytes);
  to.queue.push_back(transfer.id);
  to.active[transfer.id] = std::move(active);
  ++open_;
  pump(to);
}

// The link of a transfer that is bound to one; another where that one is down.
std::optional<size_t> Cluster::bound_link(const Peer& peer, uint64_t transfer) const {
  const uint64_t key = Random::mix(settings_.binding == Binding::hash ? transfer : peer.number);
  for (size_t step = 0; step < peer.links.size(); ++step) {
    const size_t link = (key + step) % peer.links.size();
    if (peer.links[link]->usable()) return link;
  }
  return std::nullopt;
}

// Sends one slice of the first transfer whose link has room; false: none has.
bool Cluster::send_bound(Peer& peer, std::span<const LinkLoad> loads) {
  const auto has_room = [&](size_t link) { return loads[link].outstanding < window(policy_, loads[link]); };
  if (!peer.again.empty()) {
    const auto [id, index] = peer.again.front();
    const auto found = peer.active.find(id);
    if (found == peer.active.end() || !found->second->slices[index].waiting) {
      peer.again.pop_front();
      return true;
    }
    const auto link = bound_link(peer, id);
    if (!link || !has_room(*link)) return false;
    peer.again.pop_front();
    Slice& slice = found->second->slices[index];
    slice.waiting = false;
    peer.backlog -= slice.cut.bytes;
    ++totals_.repeated;
    send(peer, *link, *found->second, index);
    return true;
  }
  for (size_t i = 0; i < peer.queue.size(); ++i) {
    const auto link = bound_link(peer, peer.queue[i]);
    if (!link || !has_room(*link)) continue;
    Active& active = *peer.active.at(peer.queue[i]);
    peer.queue.erase(peer.queue.begin() + static_cast<ptrdiff_t>(i));
    cut_and_send(peer, active, *link, BOUND_SLICE);
    return true;
  }
  return false;
}

void Cluster::cut_and_send(Peer& peer, Active& active, size_t link, uint32_t bytes) {
  const auto index = static_cast<uint32_t>(active.slices.size());
  active.slices.push_back({active.plan.cut(bytes, MAX_SEGMENTS)});
  peer.backlog -= active.slices.back().cut.bytes;
  if (active.plan.remaining() > 0) peer.queue.push_back(active.transfer.id);   // turn by turn, as the engine does
  send(peer, link, active, index);
}

void Cluster::pump(Peer& peer) {
  std::vector<LinkLoad> loads;
  while (peer.backlog > 0) {
    loads.clear();
    for (const auto& link : peer.links) loads.push_back(link->load());
    if (settings_.binding == Binding::hash || settings_.binding == Binding::pinned) {
      if (!send_bound(peer, loads)) break;
      continue;
    }
    const auto choice = peer.scheduler.next(loads, peer.backlog);
    if (!choice) break;
    if (!peer.again.empty()) {
      const auto [id, index] = peer.again.front();
      peer.again.pop_front();
      const auto found = peer.active.find(id);
      if (found == peer.active.end() || !found->second->slices[index].waiting) continue;
      Slice& slice = found->second->slices[index];
      slice.waiting = false;
      peer.backlog -= slice.cut.bytes;
      ++totals_.repeated;
      send(peer, choice->link, *found->second, index);
      continue;
    }
    if (peer.queue.empty()) break;
    Active& active = *peer.active.at(peer.queue.front());
    peer.queue.pop_front();
    cut_and_send(peer, active, choice->link, choice->bytes);
  }
  if (peer.backlog <= 0 && settings_.hedge && policy_.spray && !peer.active.empty()) hedge(peer);
}

void Cluster::hedge(Peer& peer) {
  std::vector<LinkLoad> loads;
  for (const auto& link : peer.links) loads.push_back(link->load());
  for (size_t owner = 0; owner < peer.links.size(); ++owner) {
    if (!peer.links[owner]->up) continue;
    double ahead = 0;
    for (const InFlight& flight : std::deque<InFlight>(peer.links[owner]->in_flight)) {
      ahead += flight.bytes;
      const auto found = peer.active.find(flight.transfer);
      if (found == peer.active.end()) continue;
      const Slice& slice = found->second->slices[flight.slice];
      if (slice.done || slice.copies > 1 || slice.waiting) continue;
      const auto other = peer.scheduler.hedge(loads, owner, ahead, flight.bytes);
      if (!other) continue;
      ++totals_.repeated;
      send(peer, *other, *found->second, flight.slice);
      loads[*other] = peer.links[*other]->load();
    }
  }
}

void Cluster::send(Peer& peer, size_t index, Active& active, uint32_t slice) {
  Link& link = *peer.links[index];
  const uint32_t bytes = active.slices[slice].cut.bytes;
  ++active.slices[slice].copies;
  ++totals_.slices;
  link.outstanding += bytes;
  link.in_flight.push_back({next_load_, active.transfer.id, slice, bytes, clock_.now()});
  network_.send(link.stream, next_load_++, bytes);
}

void Cluster::queue_again(Peer& peer, uint64_t id, uint32_t index) {
  const auto found = peer.active.find(id);
  if (found == peer.active.end()) return;
  Slice& slice = found->second->slices[index];
  if (slice.done || slice.waiting) return;
  slice.waiting = true;
  peer.backlog += slice.cut.bytes;
  peer.again.emplace_back(id, index);
}

void Cluster::slice_finished(Peer& peer, size_t index, uint64_t load) {
  Link& link = *peer.links[index];
  const auto at = std::find_if(link.in_flight.begin(), link.in_flight.end(),
                               [load](const InFlight& flight) { return flight.load == load; });
  const InFlight flight = *at;
  link.in_flight.erase(at);
  link.outstanding -= flight.bytes;
  link.rate.finished(flight.bytes, flight.sent, clock_.now(), link.round_trip);
  if (link.in_flight.empty() && peer.backlog > link.rate.bytes_per_second() * link.round_trip) {
    link.depth.ran_dry();
    link.rate.ran_dry();
  } else {
    link.depth.kept_busy();
  }
  if (const auto found = peer.active.find(flight.transfer); found != peer.active.end()) {
    Active& active = *found->second;
    Slice& slice = active.slices[flight.slice];
    --slice.copies;
    if (!slice.done) {
      slice.done = true;
      totals_.bytes += slice.cut.bytes;
      if (slice.waiting) {
        slice.waiting = false;
        peer.backlog -= slice.cut.bytes;
      }
      if (++active.finished == active.slices.size() && active.plan.remaining() == 0) {
        Transfer done = active.transfer;
        done.finished = clock_.now();
        peer.active.erase(found);
        --open_;
        finished_(done);
      }
    }
  }
  pump(peer);
}

void Cluster::tick() {
  for (const auto& [pair, peer] : peers_) {
    if (peer->active.empty() && std::all_of(peer->links.begin(), peer->links.end(),
                                            [](const auto& link) { return link->in_flight.empty(); }))
      continue;
    check_links(*peer);
    pump(*peer);
  }
  clock_.at(clock_.now() + TICK, [this] { tick(); });
}

void Cluster::check_links(Peer& peer) {
  const double now = clock_.now();
  size_t healthy = 0;
  std::vector<Link*> silent;
  for (const auto& pointer : peer.links) {
    Link& link = *pointer;
    if (!link.up) {
      if (now < link.retry_at) continue;
      link.retry_at = now + REDIAL;
      if (!link.stream.path_up()) continue;
      link.up = true;
      link.stalled = false;
      link.rate.doubt();
      link.stall.restart(now, link.evidence());
    }
    network_.recover(link.stream);
    const Evidence evidence = link.evidence();
    if (link.stall.observe(now, evidence) > link.stall.limit(evidence)) {
      silent.push_back(&link);
    } else {
      link.stalled = false;
      ++healthy;
    }
  }
  if (healthy == 0) return;   // nowhere else to go
  for (Link* link : silent) {
    if (!link->stalled) {
      link->stalled = true;
      link->stalled_since = now;
      ++totals_.stalls;
      for (const InFlight& flight : link->in_flight) queue_again(peer, flight.transfer, flight.slice);
    } else if (now - link->stalled_since > settings_.dead_seconds) {
      close(peer, *link);
    }
  }
}

void Cluster::close(Peer& peer, Link& link) {
  link.up = false;
  link.stalled = false;
  link.retry_at = clock_.now() + REDIAL;
  network_.close(link.stream);
  const auto lost = std::exchange(link.in_flight, {});
  link.outstanding = 0;
  for (const InFlight& flight : lost) {
    if (const auto found = peer.active.find(flight.transfer); found != peer.active.end())
      --found->second->slices[flight.slice].copies;
    queue_again(peer, flight.transfer, flight.slice);
  }
}

}  // namespace tent::simulate
