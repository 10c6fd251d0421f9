// Nodes with several full-duplex ports each; port i of a node reaches port i of every other one.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <vector>

#include "simulate/clock.h"

namespace tent::simulate {

struct Stream;

// One direction of one port of one node.
struct Port {
  double rate = 0;               // bytes/s
  std::deque<Stream*> ready;     // sending side: who has something to send, in turn
  bool sending = false;
  std::deque<Stream*> waiting;   // receiving side: who waits until there is room before this port
  bool waking = false;
  double free_at = 0;            // receiving side: when all that is on its way to it will be through
};

// A cable: both directions of a port live and die together.
struct Cable {
  Port out;
  Port in;
  bool up = true;
  uint64_t outages = 0;   // what was on its way when one began is lost
};

// A slice on its way.
struct Load {
  uint64_t id = 0;
  double bytes = 0;
  double sent = 0;
  double arrived = 0;
};

// A connection over one cable of each side. Bytes arrive in order, and slices with them.
struct Stream {
  Cable* from = nullptr;
  Cable* to = nullptr;
  std::deque<Load> loads;          // not acknowledged
  size_t sending = 0;              // the first of `loads` that is not sent as a whole
  double in_network = 0;           // bytes sent and not acknowledged
  bool queued = false;             // in a list of a port
  bool granted = false;            // the receiving port has made room
  uint64_t life = 0;               // a new one begins when the connection is closed or its rest is sent again
  uint64_t outages = 0;            // of both cables when this life began
  uint64_t acknowledged = 0;       // bytes
  std::function<void(uint64_t)> finished;   // a load has arrived as a whole, and the sender knows

  bool path_up() const { return from->up && to->up; }
  uint64_t path_outages() const { return from->outages + to->outages; }
};

class Network {
 public:
  // `rate` in bytes/s, `delay` in seconds one way.
  Network(Clock& clock, size_t nodes, size_t ports, double rate, double delay);

  Cable& cable(size_t node, size_t port) { return cables_[node * ports_ + port]; }
  size_t nodes() const { return nodes_; }
  size_t ports() const { return ports_; }
  double round_trip() const { return 2 * delay_; }
  void set_rate(Cable& cable, double rate);
  void cut(Cable& cable);
  void heal(Cable& cable);

  void send(Stream& stream, uint64_t id, double bytes);
  // Forgets every load; what is on its way is lost.
  void close(Stream& stream);
  // Sends again what an outage took, once the path is back, as a kernel does.
  void recover(Stream& stream);

 private:
  void enqueue(Stream& stream);
  void serve(Port& port);
  void sent(Port& port, Stream& stream, uint64_t life, double bytes);
  void acknowledged(Stream& stream, double bytes);
  void wake(Port& in);

  Clock& clock_;
  size_t nodes_;
  size_t ports_;
  double delay_;
  std::vector<Cable> cables_;
};

}  // namespace tent::simulate
