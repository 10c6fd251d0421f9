// Which link gets the next slice, and how large it is. Pure: no sockets, no clock, no locks.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

namespace tent {

struct SchedulePolicy {
  bool spray = true;          // false: every link gets an equal share, in turn
  double slice_min = 16 << 10;
  double slice_max = 1 << 20;
  double slice_seconds = 1e-3;
  double queue_seconds = 4e-3;   // at least; a link that ran dry gets more
};

// What the scheduler knows of one link to a peer.
struct LinkLoad {
  bool usable = false;        // connected and not stalled
  int tier = 0;               // 0 best
  double rate = 1;            // bytes/s, > 0
  bool measured = false;      // the rate is a measurement, not a guess
  double outstanding = 0;     // bytes given to the link and not finished
  uint32_t slices = 0;        // slices given to the link and not finished
  double round_trip = 0;      // seconds, the shortest seen
  double queue_seconds = 0;   // what this link needs not to run dry
  double largest = 0;         // bytes of a slice that this link is better off with than with the policy's, if more
};

struct Choice {
  size_t link;
  uint32_t bytes;
};

// Most bytes that may be in flight: the round trip and the queue time at the link's rate. Small enough that little
// waits behind a link that dies, large enough that the link never runs dry between two rounds of the progress thread.
double window(const SchedulePolicy& policy, const LinkLoad& link);

// Seconds until a slice given to the link now would be finished.
double predicted(const LinkLoad& link, double bytes);

// A tier is a factor on the predicted time; the last tier is only for when no better link is usable.
constexpr double TIER_PENALTY[] = {1.0, 3.0};
constexpr int LAST_RESORT = 2;

class Scheduler {
 public:
  explicit Scheduler(const SchedulePolicy& policy) : policy_(policy) {}

  // For `backlog` > 0 bytes not yet given to any link. Nothing: wait until a link has finished something.
  std::optional<Choice> next(std::span<const LinkLoad> links, double backlog);

  // A link that would finish a second copy of a slice clearly before `owner`, on which `ahead` bytes (with the
  // slice) are still to be served. Only meant for when the backlog is empty.
  std::optional<size_t> hedge(std::span<const LinkLoad> links, size_t owner, double ahead, double bytes) const;

 private:
  std::optional<Choice> next_in_turn(std::span<const LinkLoad> links, double backlog);
  double slice_bytes(const LinkLoad& link, double backlog, size_t usable) const;

  SchedulePolicy policy_;
  size_t turn_ = 0;
};

}  // namespace tent
