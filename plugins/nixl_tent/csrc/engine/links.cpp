// Connections: dialling, proving who is who, noticing stalls and deaths, and coming back.
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "engine/dispatcher.h"

namespace tent {
namespace {

constexpr double DIAL_SECONDS = 0.25;       // a path that does not answer by then is tried anew
constexpr double FIRST_BACKOFF = 20e-3;
constexpr double BUSY_BACKOFF = 0.1;        // longest pause between dials while there is work for the link
constexpr double IDLE_BACKOFF = 1.0;
constexpr double REFUSED_BACKOFF = 1.0;
constexpr double SHORT_HANDSHAKE = 1.0;     // where other links are up to work with
constexpr double NOBODY_LISTENS = 2.0;      // all dials refused for so long: the peer's process is gone
constexpr double DEFAULT_RATE = 1e9;        // bytes/s, a guess until the first sample
constexpr uint32_t MOST_UNPROVEN = 256;
constexpr size_t MOST_ANSWERS = 4096;       // waiting to go out; a peer that asks and does not read is not read either
constexpr double ALL_SILENT = 0.5;          // seconds after which all links but one are dialled anew
constexpr size_t NONCE = 32;

bool in_progress(int fd, int& error) {
  socklen_t size = sizeof error;
  if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0) error = errno;
  if (error != 0) return false;
  sockaddr_storage peer{};
  socklen_t length = sizeof peer;
  return getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &length) != 0;
}

std::string text_of(const Digest& digest) {
  return std::string(reinterpret_cast<const char*>(digest.data()), digest.size());
}

bool same(std::string_view sent, const Digest& expected) {
  Digest digest{};
  if (sent.size() != digest.size()) return false;
  std::memcpy(digest.data(), sent.data(), digest.size());
  return equal_digests(digest, expected);
}

// Whether this process may read the other end's memory: it must find the nonce there that came over the socket.
bool can_pull(const Connection& connection, uint64_t address, std::string_view nonce) {
  std::array<char, NONCE> seen{};
  const iovec here{seen.data(), seen.size()};
  const iovec there{reinterpret_cast<void*>(address), seen.size()};
  return process_vm_readv(connection.process, &here, 1, &there, 1, 0) == static_cast<ssize_t>(seen.size()) &&
         std::string_view(seen.data(), seen.size()) == nonce;
}

}  // namespace

std::string shared_key(const std::string& secret, const std::string& key) { return text_of(hmac_sha256(secret, key)); }

double first_rate(const Path& path) {
  const uint32_t mbits = std::min(path.local.mbits == 0 ? UINT32_MAX : path.local.mbits,
                                  path.remote.mbits == 0 ? UINT32_MAX : path.remote.mbits);
  return mbits == UINT32_MAX ? DEFAULT_RATE : mbits * 125e3;
}

Connection& Engine::add_connection(Fd fd, const Transport* transport) {
  auto connection = std::make_unique<Connection>();
  connection->id = next_connection_++;
  connection->fd = std::move(fd);
  connection->transport = transport;
  connection->since = now();
  connection->nonce = random_bytes(NONCE);
  if (transport->by_reference()) connection->process = transport->process(connection->fd.get());
  Connection& added = *connection;
  connections_[added.id] = std::move(connection);
  return added;
}

void Engine::watch(Connection& connection) {
  epoll_event event{};
  event.events = (connection.paused ? 0u : uint32_t{EPOLLIN}) | (connection.watching_output ? uint32_t{EPOLLOUT} : 0u);
  event.data.u64 = connection.id;
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, connection.fd.get(), &event) != 0)
    epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, connection.fd.get(), &event);
}

void Engine::dial(Peer& peer, Link& link, double at) {
  ++link.counters.dials;
  link.refused_dial = false;
  Fd fd = link.transport->dial(link.path);
  if (!fd) {
    link.refused_dial = errno == ECONNREFUSED;
    link.trouble = std::string("cannot dial: ") + std::strerror(errno);
    link.backoff = std::clamp(2 * link.backoff, FIRST_BACKOFF, peer.busy() ? BUSY_BACKOFF : IDLE_BACKOFF);
    link.retry_at = at + link.backoff;
    return;
  }
  Connection& connection = add_connection(std::move(fd), link.transport);
  connection.peer = &peer;
  connection.link = &link;
  connection.name = connection.id;
  link.connection = &connection;
  link.state = LinkState::dialling;
  connection.watching_output = true;   // a finished connect shows as writable
  watch(connection);
  arm(at + DIAL_SECONDS);
}

void Engine::dial_finished(Connection& connection, double at) {
  int error = 0;
  if (in_progress(connection.fd.get(), error)) return;
  Link& link = *connection.link;
  if (error != 0) {
    link.refused_dial = error == ECONNREFUSED;
    return close(connection, std::string("cannot connect: ") + std::strerror(error));
  }
  if (link.transport->by_reference()) connection.process = link.transport->process(connection.fd.get());
  link.state = LinkState::proving;
  connection.since = at;
  connection.watching_output = false;
  watch(connection);
  const Peer& peer = *connection.peer;
  uint64_t oldest = peer.next_write;
  for (const auto& [id, transfer] : peer.active)
    if (transfer->op == Op::write) oldest = std::min(oldest, id);
  if (!peer.control.empty()) oldest = std::min(oldest, peer.control.begin()->first);
  std::string hello = peer.info.engine + info_.engine + connection.nonce;
  put(hello, peer.generation);
  put(hello, oldest);
  put(hello, connection.name);
  put(hello, reinterpret_cast<uint64_t>(connection.nonce.data()));
  put_text(hello, agent_);
  connection.transcript = hello;
  send_frame(connection, Header{.kind = Kind::hello}, hello);
}

void Engine::accept_all(size_t listener) {
  while (true) {
    Fd fd(accept4(listeners_[listener].listener.fd.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!fd) return;
    if (unproven_ >= MOST_UNPROVEN) continue;   // closes it: the dialler tries again later
    listeners_[listener].transport->tune(fd.get());
    Connection& connection = add_connection(std::move(fd), listeners_[listener].transport);
    ++unproven_;
    watch(connection);
    arm(now() + HANDSHAKE_SECONDS);
  }
}

void Engine::close(Connection& connection, const std::string& why, bool abrupt) {
  if (connection.closed) return;
  connection.closed = true;
  closed_.push_back(connection.id);
  if (abrupt) {
    constexpr linger now_or_never{1, 0};   // what the kernel still holds must not be sent later
    setsockopt(connection.fd.get(), SOL_SOCKET, SO_LINGER, &now_or_never, sizeof now_or_never);
  }
  connection.fd = Fd();
  connection.direct.reset();
  if (connection.cell) direct_->dismiss(*std::exchange(connection.cell, std::nullopt));
  const double at = now();
  arm(at);   // for the connection to be forgotten and the peer's slices to go elsewhere
  if (connection.peer == nullptr) {
    if (connection.session == nullptr) {
      --unproven_;
    } else {
      connection.session->connections.erase(connection.id);
      connection.session->left = at;
      connection.session = nullptr;
    }
    return;
  }
  Peer& peer = *connection.peer;
  Link& link = *connection.link;
  connection.peer = nullptr;
  connection.link = nullptr;
  const bool was_up = link.state == LinkState::up;
  link.connection = nullptr;
  link.state = LinkState::down;
  link.stalled = false;
  link.trouble = why;
  link.backoff = was_up ? FIRST_BACKOFF
                        : std::clamp(2 * link.backoff, FIRST_BACKOFF, peer.busy() ? BUSY_BACKOFF : IDLE_BACKOFF);
  link.retry_at = at + link.backoff;
  if (!was_up) return;
  ++link.counters.deaths;
  const auto lost = std::exchange(link.in_flight, {});
  link.outstanding = 0;
  for (const InFlight& flight : lost) {
    const auto found = peer.active.find(flight.transfer);
    if (found != peer.active.end()) --found->second->slices[flight.slice].copies;
    queue_again(peer, flight.transfer, flight.slice);
  }
  for (auto& [id, control] : peer.control)
    if (control.connection == connection.id) control.connection = 0;
  // The target may still hold the other half of a connection that died here; a live link can tell it so.
  for (const auto& other : peer.links)
    if (other->usable() && other->connection != nullptr) {
      send_frame(*other->connection, Header{.kind = Kind::drop, .transfer = connection.name});
      break;
    }
}

void Engine::flush(Connection& connection) {
  uint64_t bytes = 0;
  const Io state = connection.out.flush(connection.fd.get(), bytes);
  if (connection.link != nullptr) connection.link->counters.bytes_out += bytes;
  if (state == Io::closed) return close(connection, std::string("cannot send: ") + std::strerror(errno));
  const bool blocked = state == Io::blocked;
  const bool paused = blocked && connection.session != nullptr && connection.out.waiting() > MOST_ANSWERS;
  if (connection.watching_output == blocked && connection.paused == paused) return;
  connection.watching_output = blocked;
  connection.paused = paused;
  watch(connection);
}

void Engine::send_frame(Connection& connection, Header header, std::string_view payload) {
  header.payload = static_cast<uint32_t>(payload.size());
  seal(header);
  Outgoing frame;
  put(frame.head, header);
  frame.head += payload;
  connection.out.push(std::move(frame));
  flush(connection);
}

void Engine::refuse(Connection& connection, const std::string& why) {
  ++rejected_;
  send_frame(connection, Header{.kind = Kind::refused}, why);
}

// One step of the handshake; an error closes the connection.
std::optional<std::string> Engine::shake(Connection& connection) {
  if (connection.peer == nullptr)
    return connection.in.header.kind == Kind::hello   ? meet(connection)
           : connection.in.header.kind == Kind::proof ? check_proof(connection)
                                                      : std::optional<std::string>("unexpected handshake frame");
  Peer& peer = *connection.peer;
  Link& link = *connection.link;
  Reader reader(connection.in.text);
  switch (connection.in.header.kind) {
    case Kind::refused:
      link.backoff = REFUSED_BACKOFF;
      link.refused_dial = true;
      return "the peer refused us: " + connection.in.text;
    case Kind::challenge: {
      const std::string nonce(reader.raw(NONCE));
      const auto address = reader.take<uint64_t>();
      if (!reader.complete()) return "damaged challenge";
      connection.transcript += connection.in.text;
      if (link.transport->by_reference() && !can_pull(connection, address, nonce)) {
        link.barred = true;
        return "the kernel does not let this process read the peer's memory";
      }
      const std::string proof = text_of(hmac_sha256(peer.key, "dialler" + connection.transcript)) +
                                text_of(hmac_sha256(key_, "self" + connection.transcript));
      send_frame(connection, Header{.kind = Kind::proof}, proof);
      return std::nullopt;
    }
    case Kind::welcome: {
      const std::string_view digest = reader.raw(sizeof(Digest));
      if (!reader.complete() || !same(digest, hmac_sha256(peer.key, "listener" + connection.transcript)))
        return "the peer could not prove that it is agent '" + peer.agent + "'";
      connection.in.trusted = true;
      link_up(connection, now());
      return std::nullopt;
    }
    default: return "unexpected handshake frame";
  }
}

std::optional<std::string> Engine::meet(Connection& connection) {
  Reader reader(connection.in.text);
  const bool for_us = reader.raw(16) == info_.engine;
  if (!connection.transcript.empty()) return "two hellos";
  if (!for_us) {
    refuse(connection, "this is not the agent you look for: load its new metadata");
    return "hello for another agent";
  }
  connection.transcript = connection.in.text;
  std::string challenge = connection.nonce;
  put(challenge, reinterpret_cast<uint64_t>(connection.nonce.data()));
  connection.transcript += challenge;
  send_frame(connection, Header{.kind = Kind::challenge}, challenge);
  return std::nullopt;
}

std::optional<std::string> Engine::check_proof(Connection& connection) {
  if (connection.transcript.empty()) return "proof before hello";
  Reader hello(connection.transcript);
  hello.raw(16);
  const std::string engine(hello.raw(16));
  const std::string nonce(hello.raw(NONCE));
  const auto generation = hello.take<uint64_t>();
  const auto oldest = hello.take<uint64_t>();
  const auto name = hello.take<uint64_t>();
  const auto address = hello.take<uint64_t>();
  const std::string agent = hello.text(255);
  Reader proof(connection.in.text);
  const std::string_view digest = proof.raw(sizeof(Digest));
  const std::string_view own = proof.raw(sizeof(Digest));
  if (!hello.good() || !proof.complete() || agent.empty()) return "damaged handshake";
  const auto denied = [&](const std::string& why) -> std::optional<std::string> {
    refuse(connection, why);
    return why;
  };
  if (!same(digest, hmac_sha256(key_, "dialler" + connection.transcript)))
    return denied("wrong key: the metadata is not this agent's, or the option secret differs");
  if (const auto known = peers_.find(agent); known != peers_.end()) {
    if (known->second->info.engine != engine)
      return denied("agent '" + agent + "' is known here with other metadata: load its new metadata");
    if (!same(own, hmac_sha256(known->second->key, "self" + connection.transcript)))
      return denied("could not prove to be agent '" + agent + "'");
  }
  if (connection.transport->by_reference() && !can_pull(connection, address, nonce))
    return denied("the kernel does not let the target read your memory");

  auto& session = sessions_[engine];
  if (session == nullptr) session = std::make_unique<Session>();
  if (generation < session->generation) return denied("a newer connection of this agent exists");
  if (generation > session->generation) {
    // Bytes of the old generation must not arrive after transfers of the new one.
    for (const uint64_t id : std::set<uint64_t>(session->connections))
      close(*connections_.at(id), "the peer has begun anew", true);
    *session = Session{};
    session->generation = generation;
    session->low = oldest;
  }
  session->agent = agent;
  session->connections.insert(connection.id);
  connection.session = session.get();
  connection.name = name;
  connection.in.trusted = true;
  --unproven_;
  send_frame(connection, Header{.kind = Kind::welcome},
             text_of(hmac_sha256(key_, "listener" + connection.transcript)));
  connection.transcript.clear();
  if (direct_ != nullptr && connection.transport->by_reference()) {
    connection.cell = direct_->admit(connection.process);
    if (connection.cell) {
      std::string place;
      put(place, static_cast<uint32_t>(direct_->fd()));
      put(place, *connection.cell);
      send_frame(connection, Header{.kind = Kind::direct}, place);
    }
  }
  return std::nullopt;
}

void Engine::link_up(Connection& connection, double at) {
  Link& link = *connection.link;
  link.state = LinkState::up;
  link.stalled = false;
  link.trouble.clear();
  link.backoff = 0;
  link.rate.doubt();
  const Evidence evidence = link.transport->evidence(connection.fd.get());
  link.round_trip = evidence.round_trip;
  link.stall.restart(at, evidence);
  link.last_answer = at;
  connection.peer->gone_since = 0;
  send_controls(*connection.peer);
}

void Engine::reroute(Peer& peer, Link& link) {
  // What has not begun is taken back; of the rest a second copy goes elsewhere, and the target keeps one of them.
  link.connection->out.forget(0, [&](uint64_t transfer, uint32_t slice) {
    const auto at = std::find_if(link.in_flight.begin(), link.in_flight.end(), [&](const InFlight& flight) {
      return flight.transfer == transfer && flight.slice == slice;
    });
    if (at == link.in_flight.end()) return;
    link.outstanding -= at->bytes;
    link.in_flight.erase(at);
    if (const auto found = peer.active.find(transfer); found != peer.active.end())
      --found->second->slices[slice].copies;
    queue_again(peer, transfer, slice);
  });
  for (const InFlight& flight : link.in_flight) queue_again(peer, flight.transfer, flight.slice);
  for (auto& [id, control] : peer.control)
    if (control.connection == link.connection->id) control.connection = 0;
  send_controls(peer);
}

void Engine::check_links(Peer& peer, double at, double slept) {
  size_t healthy = 0;
  std::vector<std::pair<Link*, double>> silent;   // with how long
  for (const auto& pointer : peer.links) {
    Link& link = *pointer;
    if (link.transport == nullptr) continue;
    if (link.state == LinkState::down) {
      if (peer.wanted && !link.barred && at >= link.retry_at) dial(peer, link, at);
      continue;
    }
    if (link.state != LinkState::up) {
      const bool others = std::any_of(peer.links.begin(), peer.links.end(), [](const auto& l) { return l->usable() && l->connection != nullptr; });
      const double bound = link.state == LinkState::dialling ? DIAL_SECONDS
                           : others                          ? SHORT_HANDSHAKE
                                                             : HANDSHAKE_SECONDS;
      if (at - link.connection->since > bound + slept) close(*link.connection, "no answer", true);
      continue;
    }
    Evidence evidence = link.transport->evidence(link.connection->fd.get());
    if (evidence.round_trip > 0) link.round_trip = evidence.round_trip;
    const double silence = link.stall.observe(at, evidence);
    // While other links hear from the peer's process, it is awake and would not sit on an acknowledgement.
    const bool awake = std::any_of(peer.links.begin(), peer.links.end(), [&](const auto& other) {
      return other.get() != &link && other->last_answer > link.stall.last_sign();
    });
    if (awake) evidence.few = false;
    const double limit = link.stall.limit(evidence);
    if (silence > limit) {
      silent.emplace_back(&link, silence);
    } else {
      if (link.stalled) {
        link.stalled = false;
        ++link.counters.false_alarms;
      }
      ++healthy;
    }
    // Nothing of ours may be on the wire while the peer's bytes do not come: make the kernels talk.
    const double quiet = at - std::max(link.stall.last_sign(), link.pinged);
    if (!link.in_flight.empty() && !evidence.waiting && !link.transport->by_reference() &&
        quiet > std::max(limit / 2, (at - link.last_answer) / 8)) {
      link.pinged = at;
      send_frame(*link.connection, Header{.kind = Kind::ping});
    }
  }
  for (const auto& [link, silence] : silent) {
    if (link->state != LinkState::up) continue;
    if (healthy == 0) {
      // All silent at once: the peer or this machine pauses, or all links are gone. There is nowhere else to go, so
      // one connection is kept whatever happens. The others are dialled anew after a while: that reaches the peer as
      // soon as a link is well again, where an old connection waits for its next retransmission.
      const double patience = std::max(ALL_SILENT, config_.dead_ms * 1e-3);
      if (link != silent.back().first && silence > patience + slept) close(*link->connection, "all links are silent", true);
      continue;
    }
    if (!link->stalled) {
      link->stalled = true;
      link->stalled_since = at;
      ++link->counters.stalls;
      link->counters.rerouted(link->stall.unheard(at) * 1e3);
      reroute(peer, *link);
    } else if (at - link->stalled_since > config_.dead_ms * 1e-3 + slept) {
      close(*link->connection, "silent for " + std::to_string(static_cast<int>(silence * 1e3)) + " ms", true);
    }
  }

  // A link that is silent while all others are down is no link: its peer may have died behind it.
  if (healthy > 0 || !peer.wanted || !peer.busy()) {
    peer.gone_since = 0;
    return;
  }
  if (peer.gone_since == 0) peer.gone_since = at;
  peer.gone_since = std::min(at, peer.gone_since + slept);
  const bool nobody = std::all_of(peer.links.begin(), peer.links.end(),
                                  [](const auto& link) {
    return link->barred || link->refused_dial || link->transport == nullptr;
  });
  const double gone = at - peer.gone_since;
  if (gone > config_.reconnect_s || (nobody && gone > std::min(NOBODY_LISTENS, config_.reconnect_s)))
    fail_all(peer, Status::disconnected);
}

bool pull(pid_t process, std::vector<iovec> into, std::string_view references) {
  std::vector<iovec> from;
  Reader reader(references);
  while (!reader.complete()) {
    const auto row = reader.take<Reference>();
    if (!reader.good()) return false;
    from.push_back({reinterpret_cast<void*>(row.address), row.length});
  }
  size_t total = 0;
  size_t offered = 0;
  for (const iovec& row : into) total += row.iov_len;
  for (const iovec& row : from) offered += row.iov_len;
  if (offered != total) return false;
  size_t to = 0;
  size_t at = 0;
  const auto advance = [](std::vector<iovec>& rows, size_t& index, size_t bytes) {
    while (bytes > 0) {
      const size_t step = std::min(bytes, rows[index].iov_len);
      rows[index].iov_base = static_cast<char*>(rows[index].iov_base) + step;
      rows[index].iov_len -= step;
      bytes -= step;
      if (rows[index].iov_len == 0) ++index;
    }
  };
  for (size_t done = 0; done < total;) {
    const ssize_t got =
        process_vm_readv(process, into.data() + to, into.size() - to, from.data() + at, from.size() - at, 0);
    if (got <= 0) return false;
    done += static_cast<size_t>(got);
    advance(into, to, static_cast<size_t>(got));
    advance(from, at, static_cast<size_t>(got));
  }
  return true;
}

}  // namespace tent
