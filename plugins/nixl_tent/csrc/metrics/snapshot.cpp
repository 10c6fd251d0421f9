// The engine's state as JSON (for `kimi-stack tent top`) and as Prometheus text.
#include <cstdio>

#include "engine/engine.h"

namespace tent {
namespace {

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) out += c;
  }
  return out + '"';
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", value);
  return text;
}

const char* name_of(const Link& link) {
  if (link.barred) return "barred";
  switch (link.state) {
    case LinkState::down: return "down";
    case LinkState::dialling: return "dialling";
    case LinkState::proving: return "proving";
    case LinkState::up: return link.stalled ? "stalled" : "up";
  }
  return "?";
}

struct Column {
  const char* name;
  const char* type;
  const char* help;
  double (*value)(const Link&);
};

template <auto Field>
double counter(const Link& link) {
  return static_cast<double>(link.counters.*Field);
}

constexpr Column COLUMNS[] = {
    {"up", "gauge", "1 while the link takes slices", [](const Link& l) { return l.usable() ? 1.0 : 0.0; }},
    {"rate_bytes_per_second", "gauge", "measured service rate", [](const Link& l) { return l.rate.bytes_per_second(); }},
    {"queue_bytes", "gauge", "bytes given to the link and not finished", [](const Link& l) { return l.outstanding; }},
    {"round_trip_seconds", "gauge", "shortest round trip", [](const Link& l) { return l.round_trip; }},
    {"sent_bytes_total", "counter", "bytes sent", counter<&LinkCounters::bytes_out>},
    {"received_bytes_total", "counter", "bytes received", counter<&LinkCounters::bytes_in>},
    {"slices_total", "counter", "slices given to the link", counter<&LinkCounters::slices>},
    {"repeated_slices_total", "counter", "of these, second copies", counter<&LinkCounters::repeated>},
    {"stalls_total", "counter", "times the link was found silent", counter<&LinkCounters::stalls>},
    {"false_alarms_total", "counter", "stalls that ended by themselves", counter<&LinkCounters::false_alarms>},
    {"deaths_total", "counter", "connections lost or given up", counter<&LinkCounters::deaths>},
    {"dials_total", "counter", "connections tried", counter<&LinkCounters::dials>},
    {"last_reroute_ms", "gauge", "silence until slices went elsewhere, last stall", counter<&LinkCounters::last_reroute_ms>},
    {"worst_reroute_ms", "gauge", "the same, longest", counter<&LinkCounters::worst_reroute_ms>},
};

// One link's lines of the histogram of how long it was silent until its slices went elsewhere.
std::string reroute_lines(const std::string& labels, const LinkCounters& counters) {
  std::string out;
  uint64_t count = 0;
  for (size_t i = 0; i < counters.reroutes.size(); ++i) {
    count += counters.reroutes[i];
    const std::string bound = i < REROUTE_BUCKETS_MS.size() ? number(REROUTE_BUCKETS_MS[i] * 1e-3) : "+Inf";
    out += "tent_link_reroute_seconds_bucket{" + labels + ",le=\"" + bound + "\"} " + std::to_string(count) + "\n";
  }
  out += "tent_link_reroute_seconds_sum{" + labels + "} " + number(counters.reroute_ms_sum * 1e-3) + "\n";
  return out + "tent_link_reroute_seconds_count{" + labels + "} " + std::to_string(count) + "\n";
}

}  // namespace

std::string Engine::metrics_json() {
  const FileReport files = files_.report();
  const std::lock_guard lock(mutex_);
  std::string out = "{\"agent\":" + quoted(agent_) + ",\"transfers_done\":" + std::to_string(finished_) +
                    ",\"transfers_failed\":" + std::to_string(failed_) + ",\"refused\":" + std::to_string(rejected_) +
                    ",\"regions\":" + std::to_string(regions_.size() - free_slots_.size()) +
                    ",\"incoming_peers\":" + std::to_string(sessions_.size()) +
                    ",\"files\":{\"method\":" + quoted(files.method) + ",\"done\":" + std::to_string(files.done) +
                    ",\"failed\":" + std::to_string(files.failed) +
                    ",\"bytes_read\":" + std::to_string(files.bytes_read) +
                    ",\"bytes_written\":" + std::to_string(files.bytes_written) +
                    ",\"trouble\":" + quoted(files.trouble) + "},\"peers\":[";
  const char* between_peers = "";
  for (const auto& [name, peer] : peers_) {
    out += between_peers + ("{\"agent\":" + quoted(name)) + ",\"transfers\":" + std::to_string(peer->active.size()) +
           ",\"backlog\":" + number(peer->backlog) + ",\"links\":[";
    between_peers = ",";
    const char* between_links = "";
    for (const auto& link : peer->links) {
      out += between_links + ("{\"name\":" + quoted(link->path.label())) + ",\"state\":\"" + name_of(*link) +
             "\",\"tier\":" + std::to_string(link->path.tier) + ",\"trouble\":" + quoted(link->trouble);
      for (const Column& column : COLUMNS) out += ",\"" + std::string(column.name) + "\":" + number(column.value(*link));
      out += "}";
      between_links = ",";
    }
    out += "]}";
  }
  return out + "]}\n";
}

std::string Engine::metrics_text() {
  const FileReport files = files_.report();
  const std::lock_guard lock(mutex_);
  std::string out;
  const auto scalar = [&](const char* name, uint64_t value) {
    out += "# TYPE tent_" + std::string(name) + " counter\ntent_" + name + "{agent=" + quoted(agent_) + "} " +
           std::to_string(value) + "\n";
  };
  scalar("transfers_done_total", finished_);
  scalar("transfers_failed_total", failed_);
  scalar("refused_total", rejected_);
  scalar("file_transfers_done_total", files.done);
  scalar("file_transfers_failed_total", files.failed);
  scalar("file_read_bytes_total", files.bytes_read);
  scalar("file_written_bytes_total", files.bytes_written);
  const auto labels = [&](const std::string& agent, const Link& link) {
    return "agent=" + quoted(agent_) + ",peer=" + quoted(agent) + ",link=" + quoted(link.path.label());
  };
  for (const Column& column : COLUMNS) {
    const std::string name = "tent_link_" + std::string(column.name);
    out += "# HELP " + name + " " + column.help + "\n# TYPE " + name + " " + column.type + "\n";
    for (const auto& [agent, peer] : peers_)
      for (const auto& link : peer->links)
        out += name + "{" + labels(agent, *link) + "} " + number(column.value(*link)) + "\n";
  }
  out += "# HELP tent_link_reroute_seconds silence of a link until its slices went elsewhere\n"
         "# TYPE tent_link_reroute_seconds histogram\n";
  for (const auto& [agent, peer] : peers_)
    for (const auto& link : peer->links) out += reroute_lines(labels(agent, *link), link->counters);
  return out;
}

}  // namespace tent
