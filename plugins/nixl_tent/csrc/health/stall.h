// When silence on a link means that the link is broken, and when it means something else. Pure: times are arguments.
#pragma once

#include <cstdint>

namespace tent {

// What the operating system knows of a connection, whether or not the peer's process is running.
struct Evidence {
  uint64_t counter = 0;      // grows whenever the peer's kernel takes or sends anything
  bool waiting = false;      // bytes are on their way that the peer's kernel has not acknowledged
  bool few = false;          // so few that the peer may be delaying the acknowledgement on purpose
  double round_trip = 0;     // seconds, the shortest seen; 0: unknown
  uint64_t held = 0;         // grows while the peer's kernel has no room: its process does not read
};

class StallClock {
 public:
  // Of the time between two looks at most `look` counts (the link may have been idle, this process asleep): less than
  // `floor`, so that it takes several looks in a row to see a silence.
  StallClock(double floor_seconds, double look) : floor_(floor_seconds), look_(look) {}

  void restart(double now, const Evidence& evidence);

  // One look at the evidence; returns how long the link has been silent, in seconds.
  double observe(double now, const Evidence& evidence);

  // Silence beyond this is a stall. Grows with the gaps seen on this link while it was healthy.
  double limit(const Evidence& evidence) const;

  // Seconds on the wall since the peer's kernel was last heard of, whoever slept meanwhile.
  double unheard(double now) const { return now - last_change_; }

  // When it was last heard of, in the time that counts.
  double last_sign() const { return last_sign_; }

 private:
  double floor_;
  double look_;
  double last_look_ = 0;
  uint64_t counter_ = 0;
  uint64_t held_ = 0;
  double last_progress_ = 0;
  double last_sign_ = 0;
  double last_change_ = 0;
  double widest_gap_ = 0;
};

}  // namespace tent
