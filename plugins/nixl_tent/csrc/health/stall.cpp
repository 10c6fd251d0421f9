#include "health/stall.h"

#include <algorithm>

namespace tent {
namespace {

constexpr double GAP_DECAY = 0.98;           // per step of progress: one odd gap is forgotten after some hundred
constexpr double DELAYED_ACK = 50e-3;        // Linux delays an acknowledgement by up to 40 ms
constexpr double WIDEST_LEARNT = 15e-3;      // a wider gap is an outage that ended, not this link's habit

}  // namespace

void StallClock::restart(double now, const Evidence& evidence) {
  counter_ = evidence.counter;
  held_ = evidence.held;
  last_progress_ = last_sign_ = last_look_ = last_change_ = now;
}

double StallClock::observe(double now, const Evidence& evidence) {
  const double unseen = std::max(0.0, now - last_look_ - look_);
  last_look_ = now;
  last_progress_ += unseen;
  last_sign_ += unseen;
  if (evidence.counter != counter_) {
    const double gap = now - last_progress_;
    widest_gap_ = std::max(widest_gap_ * GAP_DECAY, std::min(gap, WIDEST_LEARNT));
    counter_ = evidence.counter;
    last_progress_ = last_sign_ = last_change_ = now;
  } else if (!evidence.waiting || evidence.held != held_) {
    last_progress_ = now;
  }
  held_ = evidence.held;
  return now - last_progress_;
}

double StallClock::limit(const Evidence& evidence) const {
  const double adaptive = std::max({floor_, 2 * widest_gap_ + floor_ / 2, 4 * evidence.round_trip});
  return evidence.few ? std::max(adaptive, DELAYED_ACK) : adaptive;
}

}  // namespace tent
