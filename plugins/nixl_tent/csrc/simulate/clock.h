// Virtual time: what is to happen, in order; and numbers that look random but are the same on every machine.
#pragma once

#include <cstdint>
#include <functional>
#include <queue>
#include <vector>

namespace tent::simulate {

class Clock {
 public:
  double now() const { return now_; }

  void at(double time, std::function<void()> what) { events_.push({time, next_++, std::move(what)}); }

  // Runs one event; false: there is none before `end`.
  bool step(double end) {
    if (events_.empty() || events_.top().time > end) return false;
    now_ = events_.top().time;
    const std::function<void()> what = std::move(const_cast<Event&>(events_.top()).what);
    events_.pop();
    what();
    return true;
  }

 private:
  struct Event {
    double time;
    uint64_t order;   // of two events at one time the one that was planned first
    std::function<void()> what;
    bool operator<(const Event& other) const {
      return time != other.time ? time > other.time : order > other.order;
    }
  };
  std::priority_queue<Event> events_;
  uint64_t next_ = 0;
  double now_ = 0;
};

// SplitMix64.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() { return mix(state_ += 0x9e3779b97f4a7c15); }
  uint64_t below(uint64_t bound) { return next() % bound; }
  double unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }

  static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }

 private:
  uint64_t state_;
};

}  // namespace tent::simulate
