#include "simulate/network.h"

#include <algorithm>

namespace tent::simulate {
namespace {

constexpr double QUANTUM = 128 << 10;         // bytes of a stream before the next one has its turn
constexpr double IN_NETWORK = 1 << 20;        // bytes of a stream between the two hosts: over a port's round trip
constexpr double QUEUE_SECONDS = 50e-6;       // before a receiving port; beyond it, senders wait for their turn

// What a stream puts on the wire in its next turn; 0: it was closed meanwhile.
double next_bytes(const Stream& stream) {
  if (stream.sending == stream.loads.size()) return 0;
  const Load& load = stream.loads[stream.sending];
  return std::min(QUANTUM, load.bytes - load.sent);
}

}  // namespace

Network::Network(Clock& clock, size_t nodes, size_t ports, double rate, double delay)
    : clock_(clock), nodes_(nodes), ports_(ports), delay_(delay), cables_(nodes * ports) {
  for (Cable& cable : cables_) set_rate(cable, rate);
}

void Network::set_rate(Cable& cable, double rate) { cable.out.rate = cable.in.rate = rate; }

void Network::cut(Cable& cable) {
  cable.up = false;
  ++cable.outages;
}

void Network::heal(Cable& cable) { cable.up = true; }

void Network::send(Stream& stream, uint64_t id, double bytes) {
  stream.loads.push_back({id, bytes});
  enqueue(stream);
}

void Network::close(Stream& stream) {
  ++stream.life;
  stream.outages = stream.path_outages();
  stream.loads.clear();
  stream.sending = 0;
  stream.in_network = 0;
}

void Network::recover(Stream& stream) {
  if (!stream.path_up() || stream.outages == stream.path_outages()) return;
  ++stream.life;
  stream.outages = stream.path_outages();
  for (Load& load : stream.loads) load.sent = load.arrived;
  stream.sending = 0;
  stream.in_network = 0;
  enqueue(stream);
}

void Network::enqueue(Stream& stream) {
  if (stream.queued || stream.sending == stream.loads.size() || stream.in_network >= IN_NETWORK) return;
  stream.queued = true;
  stream.from->out.ready.push_back(&stream);
  serve(stream.from->out);
}

void Network::serve(Port& port) {
  while (!port.sending && !port.ready.empty()) {
    Stream& stream = *port.ready.front();
    port.ready.pop_front();
    if (stream.sending == stream.loads.size()) {   // closed meanwhile
      stream.queued = stream.granted = false;
      continue;
    }
    Port& in = stream.to->in;
    const bool full = !in.waiting.empty() || in.free_at > clock_.now() + QUEUE_SECONDS;
    if (full && !stream.granted) {
      in.waiting.push_back(&stream);
      if (!in.waking) {
        in.waking = true;
        clock_.at(std::max(clock_.now(), in.free_at - QUEUE_SECONDS), [this, &in] { wake(in); });
      }
      continue;
    }
    stream.queued = stream.granted = false;
    const double bytes = next_bytes(stream);
    Load& load = stream.loads[stream.sending];
    load.sent += bytes;
    if (load.sent >= load.bytes) ++stream.sending;
    stream.in_network += bytes;
    port.sending = true;
    clock_.at(clock_.now() + bytes / port.rate,
              [this, &port, &stream, life = stream.life, bytes] { sent(port, stream, life, bytes); });
  }
}

void Network::wake(Port& in) {
  in.waking = false;
  if (in.waiting.empty()) return;
  Stream& stream = *in.waiting.front();
  in.waiting.pop_front();
  stream.granted = true;
  // The next one may begin when this one's share will be through: what is left of its slice may be less than a quantum.
  if (!in.waiting.empty()) {
    in.waking = true;
    clock_.at(clock_.now() + next_bytes(stream) / in.rate, [this, &in] { wake(in); });
  }
  stream.from->out.ready.push_front(&stream);
  serve(stream.from->out);
}

void Network::sent(Port& port, Stream& stream, uint64_t life, double bytes) {
  port.sending = false;
  if (stream.life == life) {
    Port& in = stream.to->in;
    in.free_at = std::max(clock_.now() + delay_, in.free_at) + bytes / in.rate;
    if (stream.path_up() && stream.outages == stream.path_outages())   // after a loss nothing arrives in order
      clock_.at(in.free_at + delay_, [this, &stream, life, bytes] {
        if (stream.life == life && stream.outages == stream.path_outages()) acknowledged(stream, bytes);
      });
    enqueue(stream);
  }
  serve(port);
}

void Network::acknowledged(Stream& stream, double bytes) {
  stream.in_network -= bytes;
  stream.acknowledged += static_cast<uint64_t>(bytes);
  Load& load = stream.loads.front();
  load.arrived += bytes;
  const bool whole = load.arrived >= load.bytes;
  const uint64_t id = load.id;
  if (whole) {
    stream.loads.pop_front();
    --stream.sending;
  }
  enqueue(stream);
  if (whole) stream.finished(id);
}

}  // namespace tent::simulate
