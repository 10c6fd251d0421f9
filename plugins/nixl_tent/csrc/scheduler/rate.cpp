#include "scheduler/rate.h"

#include <algorithm>
#include <cmath>

namespace tent {
namespace {

constexpr double MEMORY = 20e-3;          // seconds of service after which a sample has faded to a third
constexpr double WAKING = 20e-3;          // two processes on a busy machine
constexpr double DRY_GAIN = 1.25;
constexpr double ENOUGH_BYTES = 64 << 10; // so much, over so long, or simply long, is a measurement
constexpr double ENOUGH_SECONDS = 0.5e-3;
constexpr double LONG = 10e-3;

constexpr double FIRST_DEPTH = 5e-3;
constexpr double LARGEST_DEPTH = 40e-3;   // beyond it, what lies on a link that dies would be felt
constexpr double GROWTH = 1.5;
constexpr double DECAY = 0.998;           // per slice

}  // namespace

void RateEstimate::finished(double bytes, double sent, double now, double round_trip) {
  const bool idle_before = sent >= last_finish_;
  double service = now - std::max(sent, last_finish_);
  if (idle_before) {
    // Mostly a wait for the round trip and for two processes to wake: where that explains it, it says nothing new.
    const double known = measured_ ? bytes / rate_ : 0;
    service = std::clamp(known, std::max(service - round_trip - WAKING, service / 8), service);
  }
  last_finish_ = now;
  service = std::max(service, 1e-7);
  const double faded = std::exp(-service / MEMORY);
  bytes_ = bytes_ * faded + bytes;
  time_ = time_ * faded + service;
  measured_ = measured_ || time_ > LONG || (bytes_ > ENOUGH_BYTES && time_ > ENOUGH_SECONDS);
  if (measured_) rate_ = bytes_ / time_;
}

void RateEstimate::ran_dry() {
  if (!measured_) return;
  time_ /= DRY_GAIN;
  rate_ = bytes_ / time_;
}

void RateEstimate::doubt() {
  measured_ = false;
  bytes_ = time_ = 0;
}

void QueueDepth::ran_dry() { seconds_ = std::clamp(seconds_ * GROWTH, FIRST_DEPTH, LARGEST_DEPTH); }

void QueueDepth::kept_busy() { seconds_ *= DECAY; }

}  // namespace tent
