// The side that is asked: slices are checked, written once and acknowledged; reads are served.
#include <algorithm>

#include "engine/dispatcher.h"

namespace tent {
namespace {

constexpr size_t MOST_OPEN = 1 << 16;             // transfers of one session
constexpr uint64_t MOST_SLICE_BITS = 1 << 26;     // remembered of all its open transfers: 8 MiB
constexpr size_t MOST_EARLY = 1 << 16;            // plain notifications that overtook others
constexpr double FORGET_SECONDS = 600.0;          // a session without connections

}  // namespace

std::optional<std::string> Engine::Dispatcher::on_header(Destination& destination) {
  if (connection_.closed) return "closed";
  Receiver& in = connection_.in;
  const Kind kind = in.header.kind;
  const bool from_target = connection_.link != nullptr;
  connection_.refusal = Refusal::none;
  if (!in.trusted) {
    destination.keep = true;
    return std::nullopt;
  }
  switch (kind) {
    case Kind::write:
    case Kind::write_ref:
      if (from_target) return "a target does not write";
      return engine_.accept_write(connection_, destination);
    case Kind::end:
      destination.keep = true;
      [[fallthrough]];
    case Kind::read:
    case Kind::ping:
    case Kind::drop:
    case Kind::fence:
      if (from_target) return "a target does not ask";
      return std::nullopt;
    case Kind::read_data:
    case Kind::read_ref:
      if (!from_target) return "an initiator does not answer";
      return engine_.accept_read(connection_, destination);
    case Kind::direct:
      destination.keep = true;
      [[fallthrough]];
    case Kind::ack:
    case Kind::nack:
    case Kind::end_ack:
    case Kind::pong:
    case Kind::fenced:
      if (!from_target) return "an initiator does not answer";
      return std::nullopt;
    default: return "unknown frame";
  }
}

std::optional<std::string> Engine::Dispatcher::on_payload() {
  const auto wrong = handle();
  // Handling may have closed it; its descriptor must not be read again.
  return connection_.closed ? "closed" : wrong;
}

std::optional<std::string> Engine::Dispatcher::handle() {
  Receiver& in = connection_.in;
  if (connection_.closed) return "closed";
  if (!in.trusted) return engine_.shake(connection_);
  switch (in.header.kind) {
    case Kind::write: engine_.write_finished(connection_); break;
    case Kind::write_ref: return engine_.pull_write(connection_);
    case Kind::read: engine_.serve_read(connection_); break;
    case Kind::end: engine_.end_received(connection_); break;
    case Kind::ping: engine_.answer(connection_, Kind::pong); break;
    case Kind::fence: engine_.fence_asked(connection_); break;
    case Kind::fenced: fence_stands(connection_); break;
    case Kind::drop: engine_.drop_named(*connection_.session, in.header.transfer); break;
    case Kind::read_ref:
      if (auto wrong = engine_.pull_read(connection_)) return wrong;
      [[fallthrough]];
    case Kind::read_data:
    case Kind::ack: engine_.slice_finished(connection_, now()); break;
    case Kind::nack: engine_.slice_refused(connection_); break;
    case Kind::end_ack: engine_.end_acknowledged(connection_); break;
    case Kind::pong: connection_.link->last_answer = now(); break;
    case Kind::direct: open_directly(connection_); break;
    default: return "unknown frame";
  }
  return std::nullopt;
}

Refusal Engine::locate(const std::vector<Segment>& rows, std::vector<iovec>& out) const {
  for (const Segment& row : rows) {
    if (row.slot >= regions_.size() || regions_[row.slot] == nullptr) return Refusal::region;
    const Region& region = *regions_[row.slot];
    if (row.token != region.token) return Refusal::token;
    if (row.length > region.size || row.offset > region.size - row.length) return Refusal::range;
    out.push_back({region.begin + row.offset, row.length});
  }
  return Refusal::none;
}

void Engine::answer(Connection& connection, Kind kind, uint32_t aux) {
  Header header{.kind = kind};
  header.slice = connection.in.header.slice;
  header.transfer = connection.in.header.transfer;
  header.aux = aux;
  seal(header);
  Outgoing frame;
  put(frame.head, header);
  connection.out.push(std::move(frame));   // flushed when all that has arrived is read: answers travel together
}

std::optional<std::string> Engine::accept_write(Connection& connection, FrameHandler::Destination& destination) {
  const Header& header = connection.in.header;
  Session& session = *connection.session;
  if (session.has_ended(header.transfer)) return std::nullopt;   // a late copy: thrown away, acknowledged
  auto open = session.open.find(header.transfer);
  if (open != session.open.end() && header.slice < open->second.done.size() && open->second.done[header.slice])
    return std::nullopt;
  std::vector<iovec> into;
  connection.refusal = locate(connection.in.rows, into);
  size_t total = 0;
  for (const Segment& row : connection.in.rows) total += row.length;
  if (total > MAX_SLICE || (header.kind == Kind::write && total != header.payload)) return "rows and payload differ";
  if (connection.refusal == Refusal::none && open == session.open.end()) {
    if (session.open.size() >= MOST_OPEN) connection.refusal = Refusal::busy;
    else open = session.open.try_emplace(header.transfer).first;
  }
  if (connection.refusal != Refusal::none) {
    ++rejected_;
    return std::nullopt;
  }
  Incoming& incoming = open->second;
  if (header.slice >= incoming.done.size()) {
    const uint64_t more = header.slice + 1 - incoming.done.size();
    if (session.slice_bits + more > MOST_SLICE_BITS) {
      connection.refusal = Refusal::busy;
      return std::nullopt;
    }
    session.slice_bits += more;
    incoming.done.resize(header.slice + 1, false);
  }
  if (header.kind == Kind::write_ref) destination.keep = true;
  else destination.into = std::move(into);
  return std::nullopt;
}

std::optional<std::string> Engine::pull_write(Connection& connection) {
  const Header& header = connection.in.header;
  const Session& session = *connection.session;
  const auto open = session.open.find(header.transfer);
  const bool wanted = connection.refusal == Refusal::none && open != session.open.end() &&
                      header.slice < open->second.done.size() && !open->second.done[header.slice];
  if (wanted) {
    std::vector<iovec> into;
    connection.refusal = locate(connection.in.rows, into);
    if (connection.refusal == Refusal::none && !pull(connection.process, std::move(into), connection.in.text))
      connection.refusal = Refusal::memory;
  }
  write_finished(connection);
  return std::nullopt;
}

void Engine::write_finished(Connection& connection) {
  const Header& header = connection.in.header;
  Session& session = *connection.session;
  if (connection.refusal != Refusal::none)
    return answer(connection, Kind::nack, static_cast<uint32_t>(connection.refusal));
  if (const auto open = session.open.find(header.transfer); open != session.open.end()) {
    Incoming& incoming = open->second;
    if (!incoming.done[header.slice]) {
      incoming.done[header.slice] = true;
      ++incoming.finished;
      // Another copy may be half way in on another link. What it still brings is thrown away, and whatever comes
      // later finds the slice done: after this acknowledgement nothing is written for it, ever.
      for (const uint64_t id : session.connections) {
        Connection& other = *connections_.at(id);
        if (&other != &connection && other.in.filling() && other.in.header.transfer == header.transfer &&
            other.in.header.slice == header.slice)
          other.in.discard();
      }
    }
    if ((header.flags & FLAG_TOTAL) != 0) incoming.total = header.aux;
  }
  answer(connection, Kind::ack);
  const auto open = session.open.find(header.transfer);
  if (open == session.open.end() || !open->second.total || open->second.finished != *open->second.total) return;
  // Where the slices announce a notification, the transfer ends with it.
  if ((header.flags & FLAG_NOTIFY) == 0 || open->second.notification) complete(session, header.transfer);
}

void Engine::serve_read(Connection& connection) {
  const Header asked = connection.in.header;
  std::vector<iovec> from;
  connection.refusal = locate(connection.in.rows, from);
  size_t total = 0;
  for (const iovec& row : from) total += row.iov_len;
  if (connection.refusal == Refusal::none && total > MAX_SLICE) connection.refusal = Refusal::range;
  if (connection.refusal != Refusal::none) {
    ++rejected_;
    return answer(connection, Kind::nack, static_cast<uint32_t>(connection.refusal));
  }
  Header header{.kind = Kind::read_data, .slice = asked.slice, .transfer = asked.transfer};
  Outgoing frame;
  frame.transfer = asked.transfer;
  frame.slice = asked.slice;
  std::string references;
  if (connection.transport->by_reference()) {
    header.kind = Kind::read_ref;
    for (const iovec& row : from)
      put(references, Reference{reinterpret_cast<uint64_t>(row.iov_base), row.iov_len});
  } else {
    frame.payload = std::move(from);
    frame.payload_bytes = total;
  }
  header.payload = static_cast<uint32_t>(references.size() + frame.payload_bytes);
  seal(header);
  put(frame.head, header);
  frame.head += references;
  connection.out.push(std::move(frame));
}

void Engine::end_received(Connection& connection) {
  const Header& header = connection.in.header;
  Session& session = *connection.session;
  if (session.has_ended(header.transfer)) return answer(connection, Kind::end_ack);
  if ((header.flags & FLAG_ABORT) != 0) {
    for (const uint64_t id : session.connections) {
      Receiver& in = connections_.at(id)->in;
      if (in.filling() && in.header.transfer == header.transfer) in.discard();
    }
    end_incoming(session, header.transfer);
    return answer(connection, Kind::end_ack);
  }
  if (session.open.size() >= MOST_OPEN && !session.open.contains(header.transfer)) return;
  std::string message = std::move(connection.in.text);
  if ((header.flags & FLAG_ORDERED) != 0) {
    Reader reader(message);
    const auto order = reader.take<uint64_t>();
    if (!reader.good() || order < session.next_order || session.early.size() > MOST_EARLY) return;
    session.early[order] = message.substr(sizeof order);
    for (auto next = session.early.begin(); next != session.early.end() && next->first == session.next_order;
         next = session.early.erase(next), ++session.next_order)
      deliver(session.agent, std::move(next->second));
    end_incoming(session, header.transfer);
    return answer(connection, Kind::end_ack);
  }
  Incoming& incoming = session.open[header.transfer];
  incoming.total = header.aux;
  if ((header.flags & FLAG_NOTIFY) != 0) incoming.notification = std::move(message);
  incoming.waiting_end.push_back(connection.id);
  if (incoming.finished == *incoming.total) complete(session, header.transfer);
}

void Engine::complete(Session& session, uint64_t transfer) {
  Incoming& incoming = session.open.at(transfer);
  if (incoming.notification) deliver(session.agent, std::move(*incoming.notification));
  for (const uint64_t id : incoming.waiting_end)
    if (const auto found = connections_.find(id); found != connections_.end() && !found->second->closed) {
      send_frame(*found->second, Header{.kind = Kind::end_ack, .transfer = transfer});
    }
  end_incoming(session, transfer);
}

void Engine::end_incoming(Session& session, uint64_t transfer) {
  if (const auto open = session.open.find(transfer); open != session.open.end())
    session.slice_bits -= open->second.done.size();
  session.end(transfer);
}

void Engine::drop_named(Session& session, uint64_t name) {
  for (const uint64_t id : session.connections)
    if (Connection& other = *connections_.at(id); other.name == name)
      return close(other, "its dialler has given it up", true);
}

void Engine::forget_sessions(double at) {
  std::erase_if(sessions_, [&](const auto& entry) {
    return entry.second->connections.empty() && at - entry.second->left > FORGET_SECONDS;
  });
}

}  // namespace tent
