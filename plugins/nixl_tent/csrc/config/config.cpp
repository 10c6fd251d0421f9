#include "config/config.h"

#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <sstream>
#include <stdexcept>

namespace tent {
namespace {

[[noreturn]] void reject(const std::string& name, const std::string& value, const std::string& want) {
  throw std::invalid_argument("option " + name + " must be " + want + ", got '" + value + "'");
}

double to_number(const std::string& name, const std::string& value, double low, double high) {
  double number = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
  if (error != std::errc() || end != value.data() + value.size() || !(number >= low && number <= high)) {
    std::ostringstream want;
    want << "a number from " << low << " to " << high;
    reject(name, value, want.str());
  }
  return number;
}

bool to_flag(const std::string& name, const std::string& value) {
  if (value == "true" || value == "1" || value == "on") return true;
  if (value == "false" || value == "0" || value == "off") return false;
  reject(name, value, "true or false");
}

std::string trim(std::string_view text) {
  const auto is_space = [](unsigned char c) { return std::isspace(c) != 0; };
  while (!text.empty() && is_space(static_cast<unsigned char>(text.front()))) text.remove_prefix(1);
  while (!text.empty() && is_space(static_cast<unsigned char>(text.back()))) text.remove_suffix(1);
  return std::string(text);
}

std::vector<std::string> to_list(const std::string& value) {
  std::vector<std::string> items;
  std::istringstream stream(value);
  for (std::string item; std::getline(stream, item, ',');)
    if (auto name = trim(item); !name.empty() && name != "auto") items.push_back(name);
  return items;
}

struct Option {
  const char* name;
  const char* fallback;
  std::function<void(Config&, const std::string&)> set;
};

template <typename T>
Option numeric(const char* name, const char* fallback, T Config::*field, double low, double high) {
  return {name, fallback, [=](Config& config, const std::string& value) {
            config.*field = static_cast<T>(to_number(name, value, low, high));
          }};
}

Option flag(const char* name, const char* fallback, bool Config::*field) {
  return {name, fallback,
          [=](Config& config, const std::string& value) { config.*field = to_flag(name, value); }};
}

Option text(const char* name, std::string Config::*field) {
  return {name, "", [=](Config& config, const std::string& value) { config.*field = value; }};
}

const std::vector<Option>& options() {
  static const std::vector<Option> table = {
      {"links", "auto", [](Config& c, const std::string& v) { c.links = to_list(v); }},
      {"mode", "spray",
       [](Config& c, const std::string& v) {
         if (v != "spray" && v != "static") reject("mode", v, "spray or static");
         c.mode = v == "spray" ? Mode::spray : Mode::fixed;
       }},
      text("secret", &Config::secret),
      numeric("port", "0", &Config::port, 0, 65000),
      flag("cma", "true", &Config::cma),
      flag("hedge", "true", &Config::hedge),
      numeric("slice_min", "16384", &Config::slice_min, 4096, 1 << 24),
      numeric("slice_max", "1048576", &Config::slice_max, 4096, 1 << 24),
      numeric("slice_ms", "1", &Config::slice_ms, 0.05, 1000),
      numeric("queue_ms", "4", &Config::queue_ms, 0.1, 10000),
      numeric("stall_ms", "6", &Config::stall_ms, 1, 10000),
      numeric("dead_ms", "150", &Config::dead_ms, 10, 60000),
      numeric("reconnect_s", "10", &Config::reconnect_s, 0.1, 3600),
      numeric("progress_s", "120", &Config::progress_s, 0.1, 86400),
      numeric("promote_ms", "10", &Config::promote_ms, 0.1, 60000),
      numeric("spin_us", "0", &Config::spin_us, 0, 10000),
      {"ucx", "auto",
       [](Config& c, const std::string& v) {
         if (v == "auto") c.ucx = Ucx::automatic;
         else if (v == "on") c.ucx = Ucx::on;
         else if (v == "off") c.ucx = Ucx::off;
         else reject("ucx", v, "auto, on or off");
       }},
      {"file_io", "auto",
       [](Config& c, const std::string& v) {
         if (v == "auto") c.file_io = FileMethod::automatic;
         else if (v == "io_uring") c.file_io = FileMethod::ring;
         else if (v == "threads") c.file_io = FileMethod::threads;
         else reject("file_io", v, "auto, io_uring or threads");
       }},
      flag("metrics", "true", &Config::metrics),
      text("run_dir", &Config::run_dir),
  };
  return table;
}

std::string option_names() {
  std::string names;
  for (const Option& option : options()) names += (names.empty() ? "" : ", ") + std::string(option.name);
  return names;
}

void apply(Config& config, const std::string& name, const std::string& value, const std::string& source) {
  for (const Option& option : options())
    if (name == option.name) {
      try {
        return option.set(config, value);
      } catch (const std::invalid_argument& error) {
        throw std::invalid_argument(source + ": " + error.what());
      }
    }
  throw std::invalid_argument(source + ": unknown option '" + name + "'; known: " + option_names());
}

std::string environment_name(const char* option) {
  std::string name = "TENT_";
  for (const char* c = option; *c != 0; ++c)
    name += static_cast<char>(std::toupper(static_cast<unsigned char>(*c)));
  return name;
}

std::string default_run_dir() {
  if (const char* runtime = std::getenv("XDG_RUNTIME_DIR"); runtime != nullptr && *runtime != 0)
    return std::string(runtime) + "/kimi-tent";
  return "/tmp/kimi-tent-" + std::to_string(getuid());
}

}  // namespace

std::map<std::string, std::string> default_options() {
  std::map<std::string, std::string> defaults;
  for (const Option& option : options()) defaults[option.name] = option.fallback;
  return defaults;
}

std::map<std::string, std::string> parse_toml(std::string_view content) {
  std::map<std::string, std::string> values;
  std::istringstream stream{std::string(content)};
  bool ours = false;
  int number = 0;
  for (std::string raw; std::getline(stream, raw);) {
    ++number;
    bool quoted = false;
    std::string line;
    for (const char c : raw) {
      if (c == '"') quoted = !quoted;
      if (c == '#' && !quoted) break;
      line += c;
    }
    line = trim(line);
    if (line.empty()) continue;
    if (line.front() == '[') {
      ours = line == "[tent]";
      continue;
    }
    if (!ours) continue;
    const auto equals = line.find('=');
    if (equals == std::string::npos || quoted)
      throw std::invalid_argument("line " + std::to_string(number) + ": want key = value, got '" + line + "'");
    std::string value = trim(line.substr(equals + 1));
    if (!value.empty() && value.front() == '[' && value.back() == ']') value = value.substr(1, value.size() - 2);
    std::erase(value, '"');
    values[trim(line.substr(0, equals))] = trim(value);
  }
  return values;
}

Config read_config(const std::unordered_map<std::string, std::string>& parameters) {
  Config config;
  if (const char* path = std::getenv("TENT_CONFIG"); path != nullptr && *path != 0) {
    std::ifstream file(path);
    if (!file) throw std::invalid_argument(std::string("TENT_CONFIG: cannot read ") + path);
    const std::string content{std::istreambuf_iterator<char>(file), {}};
    for (const auto& [name, value] : parse_toml(content)) apply(config, name, value, path);
  }
  for (const Option& option : options())
    if (const char* value = std::getenv(environment_name(option.name).c_str()); value != nullptr)
      apply(config, option.name, value, environment_name(option.name));
  // NIXL hands every listed option back with its default; an empty text means "not set".
  for (const auto& [name, value] : parameters)
    if (!value.empty()) apply(config, name, value, "backend parameter");
  if (config.slice_min > config.slice_max)
    throw std::invalid_argument("option slice_min must not exceed slice_max, got " +
                                std::to_string(config.slice_min) + " and " + std::to_string(config.slice_max));
  if (config.run_dir.empty()) config.run_dir = default_run_dir();
  return config;
}

}  // namespace tent
