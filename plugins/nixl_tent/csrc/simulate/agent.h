// The engine's loop over simulated links: it asks the plugin's own scheduler, rate estimate, queue depth, stall clock,
// plan and pairing, and does with their answers what the engine does.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "health/stall.h"
#include "scheduler/rate.h"
#include "scheduler/scheduler.h"
#include "simulate/clock.h"
#include "simulate/network.h"
#include "slices/plan.h"

namespace tent::simulate {

// How a slice finds its link. All have the same slices, windows, stall clocks and second sendings.
enum class Binding {
  spray,    // the plugin's default: the link that will be done with it first
  stripe,   // the plugin's mode "static": equal shares, in turn
  hash,     // a transfer stays on the link that its number hashes to
  pinned,   // a peer stays on one link
};

struct Settings {
  Binding binding = Binding::spray;
  bool hedge = true;
  double stall_seconds = 6e-3;
  double dead_seconds = 150e-3;
};

struct Transfer {
  uint64_t id = 0;
  size_t from = 0;
  size_t to = 0;
  double posted = 0;
  double finished = 0;   // 0: not yet
  uint64_t bytes = 0;
  bool mouse = false;
};

struct Totals {
  double bytes = 0;            // of slices that arrived for the first time
  uint64_t slices = 0;
  uint64_t repeated = 0;       // sent a second time
  uint64_t stalls = 0;
};

class Cluster {
 public:
  Cluster(Clock& clock, Network& network, const Settings& settings, std::function<void(const Transfer&)> finished);
  ~Cluster();

  void post(const Transfer& transfer);
  const Totals& totals() const { return totals_; }
  size_t open() const { return open_; }

 private:
  struct Slice;
  struct Active;
  struct InFlight;
  struct Link;
  struct Peer;

  Peer& peer(size_t from, size_t to);
  void pump(Peer& peer);
  std::optional<Choice> choose(Peer& peer, std::span<const LinkLoad> loads);
  bool send_bound(Peer& peer, std::span<const LinkLoad> loads);
  std::optional<size_t> bound_link(const Peer& peer, uint64_t transfer) const;
  void cut_and_send(Peer& peer, Active& active, size_t link, uint32_t bytes);
  void hedge(Peer& peer);
  void send(Peer& peer, size_t link, Active& active, uint32_t slice);
  void queue_again(Peer& peer, uint64_t transfer, uint32_t slice);
  void slice_finished(Peer& peer, size_t link, uint64_t load);
  void tick();
  void check_links(Peer& peer);
  void close(Peer& peer, Link& link);

  Clock& clock_;
  Network& network_;
  Settings settings_;
  SchedulePolicy policy_;
  std::function<void(const Transfer&)> finished_;
  std::map<std::pair<size_t, size_t>, std::unique_ptr<Peer>> peers_;
  uint64_t next_load_ = 1;
  size_t open_ = 0;
  Totals totals_;
};

}  // namespace tent::simulate
