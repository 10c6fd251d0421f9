// Slices that a hosted engine carries: begun, looked at, and given to links of our own once that engine has ended.
#include <algorithm>
#include <utility>

#include "engine/dispatcher.h"

namespace tent {
namespace {

constexpr double SILENCE = 3.0;         // without anything finished, while the peer's process answers on our links
constexpr double ASK_AFTER = 0.5;       // whether it does, and again after so long
constexpr double FENCE_AGAIN = 1.0;     // a fence without an answer is asked for again

}  // namespace

// The rows of a slice as the hosted engine wants them; false where it took nothing.
bool Engine::begin_hosted(Peer& peer, Transfer& transfer, const Cut& cut, double at) {
  std::vector<Hosted::Row> rows;
  transfer.plan.rows(cut, [&](uint8_t* local, const Piece& piece, uint64_t offset, uint32_t length) {
    rows.push_back({reinterpret_cast<uint64_t>(local), piece.address + (offset - piece.offset), length,
                    piece.hosted_here, piece.hosted_there});
  });
  const bool possible = hosted_ != nullptr && hosting_ == Hosting::runs && peer.hosted != nullptr && !peer.hosted->barred;
  const Hosted::Name posted = possible ? hosted_->post(transfer.op, peer.hosted_name, rows) : 0;
  if (posted == 0) return false;
  Link& link = *peer.hosted;
  if (peer.hosted_flights++ == 0) peer.hosted_sign = at;
  hosted_flights_.push_back({&transfer, transfer.peer, cut, posted, at});
  if (hosted_under_way_++ == 0) wake();
  transfer.unseen = true;
  ++transfer.hosted;
  ++link.counters.slices;
  link.counters.bytes_out += cut.bytes;
  link.outstanding += cut.bytes;
  return true;
}

// What the hosted engine does not take goes over our links, where they reach its memory.
void Engine::host(Peer& peer, Transfer& transfer, const Cut& cut, double at) {
  if (begin_hosted(peer, transfer, cut, at)) return;
  bar_hosted(peer, "it refused a slice");
  send_elsewhere(peer, transfer, cut);
}

void Engine::send_elsewhere(Peer& peer, Transfer& transfer, const Cut& cut) {
  if (transfer.verdict) return;
  if (transfer.hosted_only) {
    complain("transfer with agent '" + peer.agent + "' fails: only the hosted engine reaches its memory: " +
             (peer.hosted == nullptr ? "there is none" : peer.hosted->trouble));
    return finish(peer, transfer, Status::disconnected);
  }
  const auto index = static_cast<uint32_t>(transfer.slices.size());
  transfer.slices.push_back({cut});
  ++peer.hosted->counters.repeated;
  queue_again(peer, transfer.id, index);
}

void Engine::bar_hosted(Peer& peer, const std::string& why) {
  if (peer.hosted == nullptr || peer.hosted->barred) return;
  complain("the hosted engine is not used for agent '" + peer.agent + "' any more: " + why);
  peer.hosted->barred = true;
  peer.hosted->state = LinkState::down;
  peer.hosted->trouble = why;
}

// Ends the hosted engine on a thread of its own: that may take long, and our links go on meanwhile.
void Engine::end_hosting(const std::string& why) {
  if (hosted_ == nullptr || hosting_ != Hosting::runs) return;
  hosting_ = Hosting::ends;
  for (const auto& [name, peer] : peers_) bar_hosted(*peer, why);
  for (HostedFlight& flight : hosted_flights_) bar_hosted(*flight.peer, why);
  undertaker_ = std::thread([this] {
    hosted_->end();
    const std::lock_guard lock(mutex_);
    hosting_ = Hosting::ended;
    wake();
  });
}

void Engine::ask_for_fence(Peer& peer, double at) {
  if (peer.fence == Fence::none || peer.fence == Fence::stands) return;
  if (connections_.contains(peer.fence_connection) && at - peer.fence_asked < FENCE_AGAIN) return;
  if (Link* link = stream_link(peer)) {
    peer.fence_connection = link->connection->id;
    peer.fence_asked = at;
    send_frame(*link->connection, Header{.kind = Kind::fence});
  }
}

// A link of our own to say something on.
Link* Engine::stream_link(Peer& peer) {
  for (const auto& link : peer.links)
    if (link->usable() && link->connection != nullptr) return link.get();
  return nullptr;
}

void Engine::fence_asked(Connection& connection) {
  end_hosting("agent '" + connection.session->agent + "' asked for its end");
  if (hosted_ == nullptr || hosting_ == Hosting::ended) return answer(connection, Kind::fenced);
  if (std::find(fence_askers_.begin(), fence_askers_.end(), connection.id) == fence_askers_.end())
    fence_askers_.push_back(connection.id);
}

void Engine::fence_stands(Connection& connection) {
  if (connection.peer->fence == Fence::wanted) connection.peer->fence = Fence::stands;
}

// Whether nothing in it moves while the peer's process is awake, which its answers on our links tell.
bool Engine::hosted_is_stuck(Peer& peer, double at) {
  const double silence = at - peer.hosted_sign;
  if (silence < ASK_AFTER) return false;
  if (at - peer.hosted_ping > ASK_AFTER) {
    peer.hosted_ping = at;
    if (Link* link = stream_link(peer)) send_frame(*link->connection, Header{.kind = Kind::ping});
  }
  return silence > SILENCE && std::any_of(peer.links.begin(), peer.links.end(), [&](const auto& link) {
    return link->connection != nullptr && link->last_answer > at - SILENCE / 2;
  });
}

void Engine::poll_hosted(double at) {
  if (hosted_ == nullptr) return;
  bool stuck = false;
  // Time in which this process did not look proves nothing.
  const bool slept = at - std::exchange(hosted_polled_, at) > ASK_AFTER;
  for (HostedFlight& flight : hosted_flights_) {
    if (flight.state != Hosted::State::running) continue;
    if (slept) flight.peer->hosted_sign = at;
    if (hosting_ == Hosting::runs) flight.state = hosted_->check(flight.posted);
    else if (hosting_ == Hosting::ended) flight.state = Hosted::State::failed;
    if (flight.state == Hosted::State::running) {
      // What was given up must end some time, whether or not the peer still lives.
      stuck = stuck || hosted_is_stuck(*flight.peer, at) || (flight.transfer->verdict && at - flight.peer->hosted_sign > SILENCE);
    } else if (flight.state == Hosted::State::failed) {
      bar_hosted(*flight.peer, "a slice failed in it");
      if (flight.transfer->op == Op::write && !flight.transfer->verdict && flight.peer->fence == Fence::none)
        flight.peer->fence = Fence::wanted;
    }
  }
  if (stuck) end_hosting("nothing moved in it for " + std::to_string(static_cast<int>(SILENCE)) + " s");
  for (const auto& [name, peer] : peers_) ask_for_fence(*peer, at);

  std::vector<std::shared_ptr<Peer>> moved;
  for (auto flight = hosted_flights_.begin(); flight != hosted_flights_.end();) {
    Transfer& transfer = *flight->transfer;
    const bool failed = flight->state == Hosted::State::failed;
    // A write may still be on its way to the target's memory until its hosted engine has ended too.
    const bool waits = failed && !transfer.verdict && transfer.op == Op::write && flight->peer->fence != Fence::stands;
    if (flight->state == Hosted::State::running || waits) {
      ++flight;
      continue;
    }
    const HostedFlight over = std::move(*flight);
    flight = hosted_flights_.erase(flight);
    hosted_over(over, failed, at);
    if (std::find(moved.begin(), moved.end(), over.peer) == moved.end()) moved.push_back(over.peer);
  }
  for (const auto& peer : moved)
    if (!peer->removed) pump(*peer, at);
  if (hosting_ != Hosting::ended) return;
  for (const uint64_t id : fence_askers_)
    if (const auto found = connections_.find(id); found != connections_.end() && !found->second->closed)
      send_frame(*found->second, Header{.kind = Kind::fenced});
  fence_askers_.clear();
}

void Engine::hosted_over(const HostedFlight& flight, bool failed, double at) {
  Transfer& transfer = *flight.transfer;
  Peer& peer = *flight.peer;
  Link& link = *peer.hosted;
  --peer.hosted_flights;
  --hosted_under_way_;
  --transfer.hosted;
  link.outstanding -= flight.cut.bytes;
  if (!failed) {
    link.rate.finished(flight.cut.bytes, flight.sent, at, 0);
    peer.hosted_sign = at;
  }
  if (transfer.verdict) {
    if (transfer.hosted == 0) transfer.status.store(*transfer.verdict, std::memory_order_release);
    return;
  }
  if (failed) return send_elsewhere(peer, transfer, flight.cut);
  transfer.last_progress = at;
  if (transfer.hosted == 0 && transfer.finished == transfer.slices.size() && transfer.plan.remaining() == 0)
    all_slices_done(peer, transfer);
}

}  // namespace tent
