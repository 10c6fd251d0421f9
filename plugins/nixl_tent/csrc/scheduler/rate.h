// How fast a link serves bytes, with the time that they wait in its queue taken out.
#pragma once

namespace tent {

// Slices of a link finish in order, so the service of one begins when the one before it has finished, or when it
// was sent, whichever is later. A slice that met an idle link also waited for the round trip, which is no service.
// The estimate is bytes over time, both fading: answers come in bursts when this process was away, and a mean of the
// single quotients would take a burst for speed.
class RateEstimate {
 public:
  explicit RateEstimate(double first_guess) : rate_(first_guess) {}

  // Times in seconds; `round_trip` is the link's shortest.
  void finished(double bytes, double sent, double now, double round_trip);

  double bytes_per_second() const { return rate_; }
  bool measured() const { return measured_; }
  // The link ran dry while there was work: part of what was taken for service was waiting for us. Without this, a
  // link that was once taken for slow would get too little to ever prove the contrary.
  void ran_dry();

  // A new connection: the old figure stays as a guess until there is enough to go by.
  void doubt();

 private:
  double rate_;
  bool measured_ = false;
  double last_finish_ = 0;
  double bytes_ = 0;
  double time_ = 0;
};

// How much work must lie ready on a link so that it does not run dry while this process is not looking. Learned from
// its running dry: a process that has a core to itself needs a few milliseconds, one on a busy machine more.
class QueueDepth {
 public:
  void ran_dry();
  void kept_busy();
  double seconds() const { return seconds_; }

 private:
  double seconds_ = 0;
};

}  // namespace tent
