// The side that asks: transfers become slices, slices go out on links, answers come back.
#include <algorithm>

#include "engine/dispatcher.h"

namespace tent {
namespace {

constexpr uint64_t READ_NUMBERS = uint64_t{1} << 63;   // reads end here, not at the target: numbers of their own
constexpr size_t COPY_BELOW = 4096;   // payload so small is copied into the frame: cheaper than more vectors
constexpr uint64_t DIRECT_BELOW = 64 << 10;   // bytes: copied while the caller posts, in the time a thread takes to wake
constexpr double TIGHT = 1.2;         // a deadline closer than this much of the time needed makes a transfer urgent

}  // namespace

void Engine::start(Transfer& transfer, double at) {
  Peer& peer = *transfer.peer;
  transfer.plan.rewind();
  transfer.slices.clear();
  transfer.finished = 0;
  transfer.repeated = transfer.queued = transfer.awaiting_end = transfer.unseen = false;
  transfer.verdict.reset();
  transfer.posted = transfer.last_progress = transfer.last_service = at;
  transfer.deadline = transfer.deadline_seconds > 0 ? at + transfer.deadline_seconds : 0;
  if (peer.removed) {
    ++failed_;
    transfer.status = Status::disconnected;
    return;
  }
  if (copy_directly(peer, transfer)) {
    if (!transfer.notification) {
      ++finished_;
      transfer.status.store(Status::done, std::memory_order_release);
      return;
    }
    transfer.plan.cut(DIRECT_BELOW, UINT32_MAX);
    transfer.unseen = transfer.op == Op::write;
  }
  want(peer);
  transfer.id = transfer.op == Op::write ? peer.next_write++ : READ_NUMBERS | peer.next_read++;
  peer.active[transfer.id] = &transfer;
  if (transfer.deadline > 0) ++peer.deadlines;
  if (transfer.plan.remaining() == 0) return all_slices_done(peer, transfer);
  if (transfer.hosted_only) {
    while (!transfer.verdict && transfer.status == Status::running && transfer.plan.remaining() > 0)
      host(peer, transfer, transfer.plan.cut(MAX_SLICE, MAX_SEGMENTS), at);
    return;
  }
  peer.queues[static_cast<size_t>(transfer.priority)].push_back(transfer.id);
  peer.backlog += static_cast<double>(transfer.plan.total());
}

bool Engine::copy_directly(Peer& peer, Transfer& transfer) {
  if (transfer.hosted_only || transfer.plan.total() == 0 || transfer.plan.total() > DIRECT_BELOW) return false;
  for (const auto& link : peer.links) {
    if (link->state != LinkState::up || link->connection == nullptr || link->connection->direct == nullptr) continue;
    if (!link->connection->direct->copy(transfer.op, transfer.plan, link->connection->fd.get())) return false;
    ++link->counters.slices;
    (transfer.op == Op::write ? link->counters.bytes_out : link->counters.bytes_in) += transfer.plan.total();
    return true;
  }
  return false;
}

void Engine::open_directly(Connection& connection) {
  Reader place(connection.in.text);
  const auto fd = place.take<uint32_t>();
  const auto cell = place.take<uint32_t>();
  if (place.complete() && connection.transport->by_reference() && connection.direct == nullptr && fd <= INT32_MAX)
    connection.direct = DirectAccess::open(connection.process, static_cast<int>(fd), cell, connection.peer->info.engine);
}

Transfer* Engine::pick(Peer& peer, double at) {
  const auto front = [&](std::deque<uint64_t>& queue) -> Transfer* {
    while (!queue.empty()) {
      const auto found = peer.active.find(queue.front());
      if (found != peer.active.end() && found->second->plan.remaining() > 0) return found->second;
      queue.pop_front();
    }
    return nullptr;
  };
  if (peer.deadlines > 0) {
    double rate = 1;
    for (const auto& link : peer.links)
      if (link->usable()) rate += link->rate.bytes_per_second();
    Transfer* urgent = nullptr;
    for (const auto& [id, transfer] : peer.active) {
      if (transfer->deadline == 0 || transfer->plan.remaining() == 0) continue;
      const double needed = static_cast<double>(transfer->plan.remaining()) / rate;
      if (at + TIGHT * needed > transfer->deadline && (urgent == nullptr || transfer->deadline < urgent->deadline))
        urgent = transfer;
    }
    if (urgent != nullptr) return urgent;
  }
  Transfer* first = nullptr;
  for (auto& queue : peer.queues) {
    Transfer* candidate = front(queue);
    if (candidate == nullptr) continue;
    if (first == nullptr) {
      first = candidate;
    } else if (at - candidate->last_service > config_.promote_ms * 1e-3) {
      return candidate;
    }
  }
  return first;
}

void Engine::pump(Peer& peer, double at) {
  std::vector<LinkLoad> loads;
  while (peer.backlog > 0) {
    Transfer* transfer = peer.again.empty() ? pick(peer, at) : nullptr;
    loads.clear();
    for (const auto& link : peer.links) loads.push_back(link->load());
    if (peer.hosted != nullptr) {
      // Only what it knows all memory of, and with a link of ours that tells the target of its end.
      LinkLoad& hosted = loads.back();
      hosted.usable = hosted.usable && config_.ucx == Ucx::on && transfer != nullptr && transfer->hostable &&
                      stream_link(peer) != nullptr;
      hosted.slices = peer.hosted_flights;
    }
    const auto choice = peer.scheduler.next(loads, peer.backlog);
    if (!choice) break;
    Link& link = *peer.links[choice->link];
    if (!peer.again.empty()) {
      const auto [id, index] = peer.again.front();
      peer.again.pop_front();
      const auto found = peer.active.find(id);
      if (found == peer.active.end() || !found->second->slices[index].waiting) continue;
      Slice& slice = found->second->slices[index];
      slice.waiting = false;
      peer.backlog -= slice.cut.bytes;
      ++link.counters.repeated;
      found->second->repeated = true;
      send_slice(link, *found->second, index, at);
      continue;
    }
    if (transfer == nullptr) break;
    const Cut cut = transfer->plan.cut(choice->bytes, MAX_SEGMENTS);
    peer.backlog -= cut.bytes;
    transfer->last_service = at;
    // Turn by turn within a priority, so that a small transfer does not wait for a large one.
    auto& queue = peer.queues[static_cast<size_t>(transfer->priority)];
    if (!queue.empty() && queue.front() == transfer->id) {
      queue.pop_front();
      if (transfer->plan.remaining() > 0) queue.push_back(transfer->id);
    }
    if (&link == peer.hosted) {
      host(peer, *transfer, cut, at);
      continue;
    }
    const auto index = static_cast<uint32_t>(transfer->slices.size());
    transfer->slices.push_back({cut});
    send_slice(link, *transfer, index, at);
    if (transfer->plan.remaining() == 0 && transfer->op == Op::write && transfer->notification &&
        !transfer->unseen) {
      Control control;
      control.flags = FLAG_TOTAL | FLAG_NOTIFY;
      control.total = static_cast<uint32_t>(transfer->slices.size());
      control.payload = *transfer->notification;
      control.waiter = transfer->id;
      transfer->awaiting_end = true;
      queue_control(peer, transfer->id, std::move(control));
    }
  }
  if (peer.backlog <= 0 && config_.hedge && policy_.spray && !peer.active.empty()) hedge(peer, at);
  for (const auto& link : peer.links)
    if (link->connection != nullptr && link->state == LinkState::up && !link->connection->out.empty() && !link->connection->watching_output)
      flush(*link->connection);
}

void Engine::hedge(Peer& peer, double at) {
  if (peer.links.size() < 2) return;
  std::vector<LinkLoad> loads;
  for (const auto& link : peer.links) loads.push_back(link->load());
  if (peer.hosted != nullptr) loads.back().usable = false;   // what it has begun cannot be taken back
  for (size_t owner = 0; owner < peer.links.size(); ++owner) {
    if (peer.links[owner]->state != LinkState::up) continue;
    double ahead = 0;
    for (const InFlight& flight : std::deque<InFlight>(peer.links[owner]->in_flight)) {
      ahead += flight.bytes;
      const auto found = peer.active.find(flight.transfer);
      if (found == peer.active.end()) continue;
      const Slice& slice = found->second->slices[flight.slice];
      if (slice.done || slice.copies > 1 || slice.waiting) continue;
      const auto other = peer.scheduler.hedge(loads, owner, ahead, flight.bytes);
      if (!other) continue;
      found->second->repeated = true;
      ++peer.links[*other]->counters.repeated;
      send_slice(*peer.links[*other], *found->second, flight.slice, at);
      loads[*other] = peer.links[*other]->load();
    }
  }
}

void Engine::send_slice(Link& link, Transfer& transfer, uint32_t index, double at) {
  Slice& slice = transfer.slices[index];
  ++slice.copies;
  ++link.counters.slices;
  link.outstanding += slice.cut.bytes;
  link.in_flight.push_back({transfer.id, index, slice.cut.bytes, at});
  const bool reference = link.transport->by_reference();
  const bool write = transfer.op == Op::write;
  Header header{.kind = !write ? Kind::read : reference ? Kind::write_ref : Kind::write};
  header.transfer = transfer.id;
  header.slice = index;
  if (write && transfer.notification) header.flags = FLAG_NOTIFY;
  if (write && transfer.plan.remaining() == 0 && !transfer.unseen) {
    header.flags |= FLAG_TOTAL;
    header.aux = static_cast<uint32_t>(transfer.slices.size());
  }
  Outgoing frame;
  frame.transfer = transfer.id;
  frame.slice = index;
  std::string rows;
  std::string inline_payload;
  transfer.plan.rows(slice.cut, [&](uint8_t* local, const Piece& piece, uint64_t offset, uint32_t length) {
    ++header.segments;
    put(rows, Segment{piece.token, offset, piece.slot, length});
    if (!write) return;
    if (reference)
      put(inline_payload, Reference{reinterpret_cast<uint64_t>(local), length});
    else if (slice.cut.bytes <= COPY_BELOW)
      inline_payload.append(reinterpret_cast<const char*>(local), length);
    else
      frame.payload.push_back({local, length});
  });
  for (const iovec& row : frame.payload) frame.payload_bytes += row.iov_len;
  header.payload = static_cast<uint32_t>(inline_payload.size() + frame.payload_bytes);
  seal(header);
  frame.head.reserve(sizeof header + rows.size() + inline_payload.size());
  put(frame.head, header);
  frame.head += rows;
  frame.head += inline_payload;
  link.connection->out.push(std::move(frame));
}

std::optional<InFlight> Engine::settle(Link& link, uint64_t transfer, uint32_t slice, double at) {
  const auto found = std::find_if(link.in_flight.begin(), link.in_flight.end(), [&](const InFlight& flight) {
    return flight.transfer == transfer && flight.slice == slice;
  });
  if (found == link.in_flight.end()) return std::nullopt;
  const InFlight flight = *found;
  link.in_flight.erase(found);
  link.outstanding -= flight.bytes;
  link.rate.finished(flight.bytes, flight.sent, at, link.round_trip);
  link.last_answer = at;
  return flight;
}

void Engine::slice_finished(Connection& connection, double at) {
  Peer& peer = *connection.peer;
  const Header& header = connection.in.header;
  Link& link = *connection.link;
  if (!settle(link, header.transfer, header.slice, at)) return;
  if (link.in_flight.empty() && peer.backlog > link.rate.bytes_per_second() * link.round_trip) {
    link.depth.ran_dry();
    link.rate.ran_dry();
  } else {
    link.depth.kept_busy();
  }
  const auto found = peer.active.find(header.transfer);
  if (found == peer.active.end()) return;
  Transfer& transfer = *found->second;
  Slice& slice = transfer.slices[header.slice];
  --slice.copies;
  if (slice.done) return;
  slice.done = true;
  transfer.last_progress = at;
  if (slice.waiting) {
    slice.waiting = false;
    peer.backlog -= slice.cut.bytes;
  }
  if (transfer.op == Op::read && slice.copies > 0) discard_arriving(peer, transfer.id, header.slice);
  if (++transfer.finished == transfer.slices.size() && transfer.plan.remaining() == 0 && transfer.hosted == 0)
    all_slices_done(peer, transfer);
}

void Engine::all_slices_done(Peer& peer, Transfer& transfer) {
  // The end went with the last slice, unless the hosted engine carried some that the target does not count.
  const bool told = transfer.op == Op::write && transfer.plan.total() > 0 && !transfer.unseen;
  if (!told && (transfer.notification || (transfer.op == Op::write && transfer.unseen))) {
    Control control;
    control.flags = FLAG_TOTAL;
    control.total = transfer.op == Op::write ? static_cast<uint32_t>(transfer.slices.size()) : 0;
    if (transfer.notification) {
      control.flags |= FLAG_NOTIFY;
      control.payload = *transfer.notification;
    }
    control.waiter = transfer.id;
    transfer.awaiting_end = true;
    return queue_control(peer, transfer.op == Op::write ? transfer.id : peer.next_write++, std::move(control));
  }
  if (!transfer.awaiting_end) {
    // An empty write without a notification used a number that the target never hears of; tell it, so that its
    // list of ended transfers stays short.
    if (transfer.op == Op::write && !told) queue_control(peer, transfer.id, {.flags = FLAG_ABORT});
    finish(peer, transfer, Status::done);
  }
}

void Engine::slice_refused(Connection& connection) {
  Peer& peer = *connection.peer;
  const Header header = connection.in.header;
  settle(*connection.link, header.transfer, header.slice, now());
  const auto found = peer.active.find(header.transfer);
  if (found == peer.active.end()) return;
  const auto refusal = static_cast<Refusal>(header.aux);
  const bool transient = refusal == Refusal::memory || refusal == Refusal::busy;
  complain("agent '" + peer.agent + "' refused a slice: " + describe(refusal));
  finish(peer, *found->second, transient ? Status::failed : Status::refused);
}

void Engine::queue_again(Peer& peer, uint64_t id, uint32_t index) {
  const auto found = peer.active.find(id);
  if (found == peer.active.end()) return;
  Slice& slice = found->second->slices[index];
  if (slice.done || slice.waiting) return;
  slice.waiting = true;
  peer.backlog += slice.cut.bytes;
  peer.again.emplace_back(id, index);
}

// Copies of a read's slice (or all of its slices) that are still arriving are thrown away.
void Engine::discard_arriving(Peer& peer, uint64_t id, std::optional<uint32_t> slice) {
  for (const auto& link : peer.links) {
    if (link->connection == nullptr) continue;
    Receiver& in = link->connection->in;
    if (in.filling() && in.header.transfer == id && (!slice || in.header.slice == *slice)) in.discard();
  }
}

void Engine::finish(Peer& peer, Transfer& transfer, Status status) {
  const bool done = status == Status::done;
  const uint64_t id = transfer.id;
  peer.active.erase(id);
  if (transfer.deadline > 0) --peer.deadlines;
  if (!transfer.hosted_only) peer.backlog -= static_cast<double>(transfer.plan.remaining());
  for (Slice& slice : transfer.slices)
    if (slice.waiting) peer.backlog -= slice.cut.bytes;
  if (peer.active.empty()) peer.backlog = 0;
  if (!done || transfer.repeated) {
    for (const auto& link : peer.links)
      if (link->connection != nullptr)
        link->connection->out.forget(id, [&](uint64_t, uint32_t slice) {
          std::erase_if(link->in_flight, [&](const InFlight& flight) {
            const bool ours = flight.transfer == id && flight.slice == slice;
            if (ours) link->outstanding -= flight.bytes;
            return ours;
          });
        });
    discard_arriving(peer, id, std::nullopt);
  }
  if (!done) {
    std::erase_if(peer.control, [&](const auto& entry) { return entry.second.waiter == id; });
    if (transfer.op == Op::write && !peer.removed) queue_control(peer, id, {.flags = FLAG_ABORT});
  }
  ++(done ? finished_ : failed_);
  if (transfer.hosted > 0) transfer.verdict = status;   // its memory is not free before
  else transfer.status.store(status, std::memory_order_release);   // from here on it may be freed
}

void Engine::check_transfers(Peer& peer, double at) {
  std::vector<std::pair<Transfer*, Status>> over;
  for (const auto& [id, transfer] : peer.active) {
    if (transfer->deadline > 0 && at > transfer->deadline) over.emplace_back(transfer, Status::canceled);
    else if (at - transfer->last_progress > config_.progress_s) over.emplace_back(transfer, Status::failed);
  }
  for (const auto& [transfer, status] : over) {
    complain("transfer to agent '" + peer.agent + "' given up: " +
             (status == Status::canceled ? "its deadline passed"
                                         : "no progress for " + std::to_string(config_.progress_s) + " s"));
    finish(peer, *transfer, status);
  }
}

void Engine::queue_control(Peer& peer, uint64_t id, Control control) {
  peer.control[id] = std::move(control);
  send_controls(peer);
}

void Engine::send_controls(Peer& peer) {
  Link* best = nullptr;
  double lowest = 0;
  for (const auto& link : peer.links) {
    if (!link->usable() || link->connection == nullptr) continue;
    const double time = predicted(link->load(), 0) + link->round_trip;
    if (best == nullptr || time < lowest) best = link.get(), lowest = time;
  }
  if (best == nullptr) return;
  for (auto& [id, control] : peer.control) {
    if (control.connection != 0) continue;
    control.connection = best->connection->id;
    Header header{.kind = Kind::end, .flags = control.flags, .transfer = id, .aux = control.total};
    header.payload = static_cast<uint32_t>(control.payload.size());
    seal(header);
    Outgoing frame;
    put(frame.head, header);
    frame.head += control.payload;
    best->connection->out.push(std::move(frame));
  }
}

void Engine::end_acknowledged(Connection& connection) {
  Peer& peer = *connection.peer;
  connection.link->last_answer = now();
  const auto found = peer.control.find(connection.in.header.transfer);
  if (found == peer.control.end()) return;
  const uint64_t waiter = found->second.waiter;
  peer.control.erase(found);
  const auto active = peer.active.find(waiter);
  if (active == peer.active.end()) return;
  Transfer& transfer = *active->second;
  transfer.awaiting_end = false;
  transfer.last_progress = now();
  // The target only acknowledges the end of what it has all of, whatever acknowledgements are still on the way.
  finish(peer, transfer, Status::done);
}

void Engine::fail_all(Peer& peer, Status status) {
  if (!peer.active.empty() && status == Status::disconnected)
    complain("agent '" + peer.agent + "' is gone: " + std::to_string(peer.active.size()) + " transfers fail");
  const bool was_removed = std::exchange(peer.removed, true);
  while (!peer.active.empty()) finish(peer, *peer.active.begin()->second, status);
  peer.removed = was_removed;
  peer.control.clear();
  peer.again.clear();
  for (auto& queue : peer.queues) queue.clear();
  peer.backlog = 0;
  peer.gone_since = 0;
  for (const auto& link : peer.links) {
    if (link->connection != nullptr) close(*link->connection, "given up");
    if (link.get() == peer.hosted) continue;   // what is in it goes on
    link->in_flight.clear();
    link->outstanding = 0;
  }
  // The target's book of this generation cannot be continued: transfers were left open in it.
  peer.generation = next_generation_++;
  peer.next_write = peer.next_read = peer.next_order = 1;
}

std::optional<std::string> Engine::accept_read(Connection& connection, FrameHandler::Destination& destination) {
  const Header& header = connection.in.header;
  const auto found = connection.peer->active.find(header.transfer);
  if (found == connection.peer->active.end()) return std::nullopt;
  Transfer& transfer = *found->second;
  if (transfer.op != Op::read || header.slice >= transfer.slices.size()) return "data for a slice nobody asked for";
  const Slice& slice = transfer.slices[header.slice];
  if (slice.done) return std::nullopt;
  const Link& link = *connection.link;
  if (std::none_of(link.in_flight.begin(), link.in_flight.end(), [&](const InFlight& flight) {
        return flight.transfer == header.transfer && flight.slice == header.slice;
      }))
    return "data for a slice nobody asked for here";
  if (header.kind == Kind::read_ref) {
    destination.keep = true;
    return std::nullopt;
  }
  if (header.payload != slice.cut.bytes) return "data of the wrong length";
  transfer.plan.rows(slice.cut, [&](uint8_t* local, const Piece&, uint64_t, uint32_t length) {
    destination.into.push_back({local, length});
  });
  return std::nullopt;
}

std::optional<std::string> Engine::pull_read(Connection& connection) {
  const Header& header = connection.in.header;
  const auto found = connection.peer->active.find(header.transfer);
  if (found == connection.peer->active.end() || found->second->slices[header.slice].done ||
      connection.in.text.empty())
    return std::nullopt;
  std::vector<iovec> into;
  found->second->plan.rows(found->second->slices[header.slice].cut,
                           [&](uint8_t* local, const Piece&, uint64_t, uint32_t length) {
                             into.push_back({local, length});
                           });
  if (!pull(connection.process, std::move(into), connection.in.text)) return "cannot read the peer's memory";
  return std::nullopt;
}

}  // namespace tent
