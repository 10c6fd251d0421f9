// One scenario in virtual time: `tent_simulate name=value ...` prints what became of it as one line of JSON.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "simulate/agent.h"
#include "simulate/clock.h"
#include "simulate/network.h"

namespace {

using namespace tent::simulate;

// Everything is a number but the binding. Times in milliseconds.
struct Arguments {
  std::string binding = "spray";
  std::map<std::string, double> numbers = {
      {"seed", 0},
      {"nodes", 64},
      {"ports", 8},
      {"gbit", 200},         // of one port, each way
      {"delay_us", 5},       // one way
      {"end_ms", 30},        // no transfer is posted after it
      {"limit_ms", 10000},   // what is not done by then is lost
      {"fan", 0},            // to how many other nodes a node sends; 0: all
      {"senders", 0},        // how many nodes send; 0: all
      {"elephants", 4},      // under way at once, per sender
      {"elephant_kib", 65536},
      {"mice", 0},           // likewise; to the peers that elephants go to
      {"mouse_kib", 64},
      {"hedge", 1},
      {"slow", 0},           // share of the nodes with a slow port
      {"slow_factor", 0.25},
      {"slow_at_ms", 0},
      {"cut", 0},            // share of the nodes with a port that is cut
      {"cut_at_ms", 0},
      {"heal_at_ms", -1},    // negative: never
  };

  double operator[](const char* name) const { return numbers.at(name); }
  size_t count(const char* name) const { return static_cast<size_t>(numbers.at(name)); }
};

Arguments parse(int count, char** words) {
  Arguments arguments;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    const size_t equals = word.find('=');
    const std::string name = word.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : word.substr(equals + 1);
    if (name == "binding") {
      arguments.binding = value;
      continue;
    }
    char* rest = nullptr;
    const double number = std::strtod(value.c_str(), &rest);
    if (!arguments.numbers.contains(name) || value.empty() || *rest != 0)
      throw std::invalid_argument("'" + word + "': want name=number with a name that is known");
    arguments.numbers[name] = number;
  }
  const auto within = [&](const char* name, double low, double high) {
    const double value = arguments[name];
    if (!(value >= low && value <= high))
      throw std::invalid_argument(std::string(name) + " must be " + std::to_string(low) + " to " +
                                  std::to_string(high) + ", got " + std::to_string(value));
  };
  within("nodes", 2, 10000);
  within("ports", 1, 9);
  within("gbit", 0.001, 1e6);
  within("delay_us", 0, 1e6);
  within("end_ms", 0.001, 1e6);
  within("elephants", 0, 1e4);
  within("mice", 0, 1e4);
  within("elephant_kib", 1, 1e9);
  within("mouse_kib", 1, 1e9);
  within("fan", 0, arguments["nodes"] - 1);
  within("senders", 0, arguments["nodes"]);
  within("slow", 0, 1);
  within("slow_factor", 1e-6, 1e6);
  within("cut", 0, 1);
  return arguments;
}

Binding binding_of(const std::string& name) {
  if (name == "spray") return Binding::spray;
  if (name == "stripe") return Binding::stripe;
  if (name == "hash") return Binding::hash;
  if (name == "pinned") return Binding::pinned;
  throw std::invalid_argument("binding must be spray, stripe, hash or pinned, got '" + name + "'");
}

double percentile(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(share * static_cast<double>(values.size() - 1) + 0.5)];
}

class Scenario {
 public:
  explicit Scenario(const Arguments& arguments)
      : arguments_(arguments),
        random_(static_cast<uint64_t>(arguments["seed"])),
        end_(arguments["end_ms"] * 1e-3),
        network_(clock_, arguments.count("nodes"), arguments.count("ports"), arguments["gbit"] * 1e9 / 8,
                 arguments["delay_us"] * 1e-6),
        cluster_(clock_, network_, settings(arguments), [this](const Transfer& done) { finished(done); }) {
    disturb("slow", "slow_at_ms", [this](Cable& cable) {
      network_.set_rate(cable, cable.out.rate * arguments_["slow_factor"]);
    });
    const double heal = arguments_["heal_at_ms"] * 1e-3;
    disturb("cut", "cut_at_ms", [this, heal](Cable& cable) {
      network_.cut(cable);
      if (heal >= 0) clock_.at(heal, [this, &cable] { network_.heal(cable); });
    });
    const size_t senders = arguments_.count("senders");
    for (size_t node = 0; node < (senders == 0 ? network_.nodes() : senders); ++node) {
      for (size_t i = 0; i < arguments_.count("elephants"); ++i) post(node, false);
      for (size_t i = 0; i < arguments_.count("mice"); ++i) post(node, true);
    }
  }

  void run() {
    const double step = end_ / BINS;
    for (int bin = 1; bin <= BINS; ++bin) {
      const double before = cluster_.totals().bytes;
      while (clock_.step(step * bin)) {
      }
      goodput_.push_back((cluster_.totals().bytes - before) / step);
    }
    bytes_at_end_ = cluster_.totals().bytes;
    while (cluster_.open() > 0 && clock_.step(arguments_["limit_ms"] * 1e-3)) {
    }
  }

  void print() const {
    const Totals& totals = cluster_.totals();
    std::printf("{\"bytes_per_second\": %.0f, \"transfers\": %zu, \"lost\": %zu, ", bytes_at_end_ / end_,
                elephants_.size() + mice_.size(), cluster_.open());
    for (const auto& [name, times] : {std::pair{"elephants", &elephants_}, std::pair{"mice", &mice_}})
      std::printf("\"%s\": {\"count\": %zu, \"p50\": %.9f, \"p99\": %.9f}, ", name, times->size(),
                  percentile(*times, 0.5), percentile(*times, 0.99));
    std::printf("\"slices\": %llu, \"repeated\": %llu, \"stalls\": %llu, \"goodput\": [",
                static_cast<unsigned long long>(totals.slices), static_cast<unsigned long long>(totals.repeated),
                static_cast<unsigned long long>(totals.stalls));
    for (size_t i = 0; i < goodput_.size(); ++i) std::printf("%s%.0f", i == 0 ? "" : ", ", goodput_[i]);
    std::printf("]}\n");
  }

 private:
  static constexpr int BINS = 50;

  static Settings settings(const Arguments& arguments) {
    Settings settings;
    settings.binding = binding_of(arguments.binding);
    settings.hedge = arguments["hedge"] != 0;
    return settings;
  }

  // One port, drawn by lot, of a share of the nodes, spread evenly.
  template <typename What>
  void disturb(const char* share, const char* when, What what) {
    double owed = 0;
    for (size_t node = 0; node < network_.nodes(); ++node) {
      owed += arguments_[share];
      if (owed < 1 - 1e-9) continue;
      owed -= 1;
      Cable& cable = network_.cable(node, random_.below(network_.ports()));
      if (const double at = arguments_[when] * 1e-3; at > 0)
        clock_.at(at, [what, &cable] { what(cable); });
      else
        what(cable);
    }
  }

  void post(size_t from, bool mouse) {
    const size_t others = network_.nodes() - 1;
    const size_t fan = arguments_.count("fan") == 0 ? others : arguments_.count("fan");
    Transfer transfer;
    transfer.id = next_++;
    transfer.from = from;
    transfer.to = (from + 1 + random_.below(fan) * (others / fan)) % network_.nodes();
    transfer.posted = clock_.now();
    transfer.bytes = static_cast<uint64_t>(arguments_[mouse ? "mouse_kib" : "elephant_kib"] * 1024);
    transfer.mouse = mouse;
    cluster_.post(transfer);
  }

  void finished(const Transfer& done) {
    (done.mouse ? mice_ : elephants_).push_back(done.finished - done.posted);
    if (clock_.now() < end_) post(done.from, done.mouse);
  }

  const Arguments& arguments_;
  Clock clock_;
  Random random_;
  double end_;
  Network network_;
  Cluster cluster_;
  uint64_t next_ = 1;
  double bytes_at_end_ = 0;
  std::vector<double> elephants_;
  std::vector<double> mice_;
  std::vector<double> goodput_;
};

}  // namespace

int main(int count, char** words) {
  try {
    const Arguments arguments = parse(count, words);
    Scenario scenario(arguments);
    scenario.run();
    scenario.print();
    return 0;
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "tent_simulate: %s\n", error.what());
    return 2;
  }
}
