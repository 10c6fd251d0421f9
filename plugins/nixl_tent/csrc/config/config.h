// What a user may set. Sources, strongest first: backend parameters, environment (TENT_<NAME>), a TOML file.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace tent {

enum class Mode { spray, fixed };  // fixed: equal shares whatever the links do, a baseline for measurements

enum class Ucx { off, automatic, on };  // automatic: for memory of a GPU, where there is one

enum class FileMethod { automatic, ring, threads };  // how files are read and written

struct Config {
  std::vector<std::string> links;   // interface names or addresses; empty: every usable interface
  Mode mode = Mode::spray;
  std::string secret;               // mixed into every key; peers with another one are refused
  uint64_t port = 0;                // first TCP port to listen on; 0: any free one per link
  bool cma = true;                  // copy straight between processes of one host where the kernel allows it
  bool hedge = true;                // send the last slices of a transfer twice when a link is late
  uint64_t slice_min = 16 << 10;    // bytes
  uint64_t slice_max = 1 << 20;     // bytes
  double slice_ms = 1.0;            // a slice is about this much of a link's time
  double queue_ms = 4.0;            // bytes in flight on a link: its round trip plus this much time
  double stall_ms = 6.0;            // shortest silence that is called a stall
  double dead_ms = 150.0;           // a stall this long closes the connection and dials again
  double reconnect_s = 10.0;        // without any link for so long, transfers to a peer fail
  double progress_s = 120.0;        // a transfer without any progress for so long fails
  double promote_ms = 10.0;         // a waiting transfer of lower priority gets a slice after this long
  Ucx ucx = Ucx::automatic;         // host NIXL's UCX backend
  FileMethod file_io = FileMethod::automatic;
  double spin_us = 0;               // the thread looks again for so long after something happened, before it sleeps
  bool metrics = true;              // serve a snapshot on a socket in run_dir
  std::string run_dir;              // default: $XDG_RUNTIME_DIR/kimi-tent or /tmp/kimi-tent-<uid>
};

// Option name -> its default as text, for NIXL's list of backend options.
std::map<std::string, std::string> default_options();

// Throws std::invalid_argument naming the option, the value and what is accepted.
Config read_config(const std::unordered_map<std::string, std::string>& parameters);

// The `key = value` lines of the [tent] table of a TOML file: strings, numbers, booleans, lists of strings.
std::map<std::string, std::string> parse_toml(std::string_view text);

}  // namespace tent
