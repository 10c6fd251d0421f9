#include "scheduler/scheduler.h"

#include <algorithm>
#include <limits>

namespace tent {
namespace {

constexpr double FIRST_WINDOW = 256 << 10;   // until the rate is known
constexpr double LEAST_WINDOW = 128 << 10;   // with less, waking up would look like a slow link, and stay so
constexpr double LARGEST_WINDOW = 16 << 20;
constexpr uint32_t MOST_SLICES = 256;        // of one link; small slices are bounded by number, not by bytes
constexpr double HEDGE_FACTOR = 2.0;         // a copy must promise to be so much faster than the original
constexpr double HEDGE_FLOOR = 2e-3;         // and gain at least this much time: scheduling noise is no reason

int best_tier(std::span<const LinkLoad> links) {
  int best = std::numeric_limits<int>::max();
  for (const LinkLoad& link : links)
    if (link.usable) best = std::min(best, link.tier);
  return best;
}

bool admitted(const LinkLoad& link, int best) {
  return link.usable && (link.tier < LAST_RESORT || link.tier == best);
}

bool has_room(const SchedulePolicy& policy, const LinkLoad& link) {
  return link.slices < MOST_SLICES && link.outstanding < window(policy, link);
}

double penalty(const LinkLoad& link) { return link.tier < LAST_RESORT ? TIER_PENALTY[link.tier] : 1.0; }

}  // namespace

double window(const SchedulePolicy& policy, const LinkLoad& link) {
  if (!link.measured) return FIRST_WINDOW;
  const double flight = link.rate * (link.round_trip + std::max(policy.queue_seconds, link.queue_seconds));
  return std::clamp(flight, LEAST_WINDOW, LARGEST_WINDOW);
}

double predicted(const LinkLoad& link, double bytes) { return (link.outstanding + bytes) / link.rate; }

double Scheduler::slice_bytes(const LinkLoad& link, double backlog, size_t usable) const {
  // The last slices are smaller, so that the links finish together.
  const double share = backlog / (2.0 * static_cast<double>(usable));
  const double largest = std::max(policy_.slice_max, link.largest);
  const double wanted = usable > 1 ? std::min(link.rate * policy_.slice_seconds, share) : largest;
  return std::clamp(wanted, policy_.slice_min, largest);
}

std::optional<Choice> Scheduler::next(std::span<const LinkLoad> links, double backlog) {
  if (!policy_.spray) return next_in_turn(links, backlog);
  const int best = best_tier(links);
  double all_rate = 0;
  double all_outstanding = 0;
  size_t usable = 0;
  for (const LinkLoad& link : links)
    if (admitted(link, best)) all_rate += link.rate, all_outstanding += link.outstanding, ++usable;
  const auto time_on = [&](const LinkLoad& link) {
    return predicted(link, std::min(slice_bytes(link, backlog, usable), backlog));
  };
  double earliest = std::numeric_limits<double>::infinity();
  for (const LinkLoad& link : links)
    if (admitted(link, best)) earliest = std::min(earliest, time_on(link));

  std::optional<Choice> choice;
  double lowest = std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < links.size(); ++i) {
    const LinkLoad& link = links[i];
    if (!admitted(link, best) || !has_room(policy_, link)) continue;
    const double bytes = slice_bytes(link, backlog, usable);
    const double time = time_on(link);
    // Would the others be through with everything before this link is with one slice? Then it is theirs. They are not
    // through before the first of them is with a slice of its own, however many there are to share the rest.
    const double others = all_rate - link.rate;
    if (usable > 1 && link.measured && others > 0 &&
        time > std::max(earliest, (backlog + all_outstanding - link.outstanding) / others))
      continue;
    if (const double score = time * penalty(link); score < lowest) {
      lowest = score;
      choice = Choice{i, static_cast<uint32_t>(bytes)};
    }
  }
  return choice;
}

std::optional<Choice> Scheduler::next_in_turn(std::span<const LinkLoad> links, double) {
  const int best = best_tier(links);
  for (size_t step = 0; step < links.size(); ++step) {
    const size_t i = (turn_ + step) % links.size();
    if (!admitted(links[i], best)) continue;
    // Its turn stays its turn: a link that is full makes the others wait, as a split made at submit does.
    if (!has_room(policy_, links[i])) return std::nullopt;
    turn_ = i + 1;
    return Choice{i, static_cast<uint32_t>(std::clamp(256.0 * 1024, policy_.slice_min, policy_.slice_max))};
  }
  return std::nullopt;
}

std::optional<size_t> Scheduler::hedge(std::span<const LinkLoad> links, size_t owner, double ahead,
                                       double bytes) const {
  const int best = best_tier(links);
  const double original = ahead / links[owner].rate;
  std::optional<size_t> choice;
  double lowest = original / HEDGE_FACTOR;
  for (size_t i = 0; i < links.size(); ++i) {
    if (i == owner || !admitted(links[i], best) || !has_room(policy_, links[i])) continue;
    const double time = predicted(links[i], bytes) + links[i].round_trip;
    if (time < lowest && original - time > HEDGE_FLOOR) {
      lowest = time;
      choice = i;
    }
  }
  return choice;
}

}  // namespace tent
