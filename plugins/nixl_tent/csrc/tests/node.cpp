// One engine as a process, without NIXL, driven by lines on standard input: `tests/nixl/nodes.py` is the other half.
//
//   tent_node NAME [option=value ...]
//
// Every line is a command and its words; every answer is one line that begins with "ok" or "error".
#include <dirent.h>
#include <malloc.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/engine.h"

namespace {

using Clock = std::chrono::steady_clock;

std::string to_hex(std::string_view bytes) {
  std::string text;
  for (const char c : bytes)
    for (const int nibble : {c >> 4 & 15, c & 15}) text += "0123456789abcdef"[nibble];
  return text;
}

std::string from_hex(const std::string& text) {
  std::string bytes;
  for (size_t at = 0; at + 1 < text.size(); at += 2)
    bytes += static_cast<char>(std::stoi(text.substr(at, 2), nullptr, 16));
  return bytes;
}

int entries(const char* folder) {
  DIR* open = opendir(folder);
  int count = 0;
  while (readdir(open) != nullptr) ++count;
  closedir(open);
  return count - 2 - (std::strcmp(folder, "/proc/self/fd") == 0 ? 1 : 0);   // . and .., and this very look
}

// Two buffers with the same digest are the same: 64 bits, eight bytes at a time.
uint64_t digest(const uint8_t* data, size_t size) {
  uint64_t state = size;
  for (size_t at = 0; at < size; at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, data + at, std::min<size_t>(8, size - at));
    state = (state ^ word) * 0x9e3779b97f4a7c15;
    state ^= state >> 29;
  }
  return state;
}

// What a process must have as much of after an engine as before it.
struct Usage {
  int descriptors = entries("/proc/self/fd");
  int threads = entries("/proc/self/task");
  size_t heap = mallinfo2().uordblks;
};

// Mapped, not from the heap: the heap is watched for leaks.
struct Memory {
  Memory(tent::Engine& engine, size_t bytes) : size(bytes) {
    void* mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (mapped == MAP_FAILED) throw std::runtime_error("no memory");
    begin = static_cast<uint8_t*>(mapped);
    region = engine.add_region(begin, size);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { munmap(begin, size); }

  uint8_t* begin;
  size_t size;
  tent::Region* region;
};

class Node {
 public:
  Node(std::string name, const std::unordered_map<std::string, std::string>& options)
      : engine_(std::make_unique<tent::Engine>(tent::read_config(options), std::move(name))) {}

  std::string answer(const std::string& line) {
    std::istringstream words(line);
    std::string command;
    words >> command;
    if (command == "info") return to_hex(engine_->connection_info());
    if (command == "memory") return memory(words);
    if (command == "load") return load(words);
    if (command == "fill") return fill(words);
    if (command == "digest") return digest_of(words);
    if (command == "post") return post(words);
    if (command == "wait") return wait(words);
    if (command == "release") return release(words);
    if (command == "notifications") return notifications();
    if (command == "metrics") return metrics();
    if (command == "cpu") return cpu();
    if (command == "close") return close();
    throw std::invalid_argument("unknown command '" + command + "'");
  }

 private:
  static size_t number(std::istream& words) {
    size_t value = 0;
    if (!(words >> value)) throw std::invalid_argument("a number is missing");
    return value;
  }

  Memory& named(std::istream& words) {
    std::string name;
    words >> name;
    return *memories_.at(name);
  }

  std::string memory(std::istream& words) {
    std::string name;
    words >> name;
    auto made = std::make_unique<Memory>(*engine_, number(words));
    const std::string info = to_hex(tent::encode(tent::Engine::describe_region(*made->region)));
    memories_[name] = std::move(made);
    return info;
  }

  std::string load(std::istream& words) {
    std::string name, info;
    words >> name >> info;
    engine_->load_peer(name, from_hex(info));
    return "";
  }

  // NAME OFFSET LENGTH SEED; seed 0 writes zeros.
  std::string fill(std::istream& words) {
    Memory& memory = named(words);
    const size_t offset = number(words);
    const size_t length = number(words);
    uint64_t state = number(words);
    for (size_t at = 0; at < length; ++at) {
      if (at % 8 == 0) state ^= state << 13, state ^= state >> 7, state ^= state << 17;
      memory.begin[offset + at] = static_cast<uint8_t>(state >> at % 8 * 8);
    }
    return "";
  }

  // NAME OFFSET LENGTH
  std::string digest_of(std::istream& words) {
    const Memory& memory = named(words);
    const size_t offset = number(words);
    return std::to_string(digest(memory.begin + offset, number(words)));
  }

  // ID READ|WRITE PEER MEMORY OFFSET LENGTH REGION REMOTE_OFFSET PIECES PRIORITY [NOTIFICATION]
  // Pieces are laid back to front on both sides, so that they do not join.
  std::string post(std::istream& words) {
    const size_t id = number(words);
    std::string op, peer, region, notification;
    words >> op >> peer;
    const Memory& memory = named(words);
    const size_t offset = number(words);
    const size_t length = number(words);
    words >> region;
    const tent::RegionInfo info = tent::decode_region(from_hex(region));
    const size_t remote = number(words);
    const size_t pieces = number(words);
    const size_t priority = number(words);
    words >> notification;
    auto transfer = engine_->prepare(op == "READ" ? tent::Op::read : tent::Op::write, peer);
    if (transfer == nullptr) throw std::invalid_argument("unknown peer '" + peer + "'");
    transfer->priority = static_cast<tent::Priority>(priority);
    for (size_t piece = pieces; piece-- > 0;) {
      const size_t from = length * piece / pieces;
      const size_t to = length * (piece + 1) / pieces;
      transfer->plan.add({memory.begin + offset + from, info.token, remote + from, to - from, info.slot});
    }
    tent::Transfer& posted = *transfer;
    transfers_[id] = std::move(transfer);
    begun_[id] = Clock::now();
    engine_->post(posted, notification.empty() ? std::nullopt : std::optional(notification));
    return "";
  }

  // ID SECONDS; the status and the seconds since the post.
  std::string wait(std::istream& words) {
    const size_t id = number(words);
    const tent::Transfer& transfer = *transfers_.at(id);
    const auto end = Clock::now() + std::chrono::seconds(number(words));
    const auto status = [&] { return transfer.status.load(std::memory_order_acquire); };
    while (status() == tent::Status::running && Clock::now() < end)
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    const std::chrono::duration<double> took = Clock::now() - begun_.at(id);
    return std::to_string(static_cast<int>(status())) + " " + std::to_string(took.count());
  }

  std::string release(std::istream& words) {
    const size_t id = number(words);
    engine_->release(*transfers_.at(id));
    transfers_.erase(id);
    begun_.erase(id);
    return "";
  }

  std::string notifications() {
    std::string all;
    for (const auto& [agent, message] : engine_->take_notifications()) all += agent + "=" + message + " ";
    return all;
  }

  std::string metrics() {
    std::string text = engine_->metrics_json();
    std::replace(text.begin(), text.end(), '\n', ' ');
    return text;
  }

  static std::string cpu() {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    const auto seconds = [](const timeval& time) { return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6; };
    return std::to_string(seconds(usage.ru_utime)) + " " + std::to_string(seconds(usage.ru_stime));
  }

  // Ends the engine; descriptors, threads and heap bytes that are there now and were not before it.
  std::string close() {
    for (const auto& [id, transfer] : transfers_) engine_->release(*transfer);
    transfers_.clear();
    begun_.clear();
    engine_.reset();
    memories_.clear();
    const Usage after;
    return std::to_string(after.descriptors - before_.descriptors) + " " +
           std::to_string(after.threads - before_.threads) + " " +
           std::to_string(static_cast<int64_t>(after.heap) - static_cast<int64_t>(before_.heap));
  }

  const Usage before_;
  std::unique_ptr<tent::Engine> engine_;
  std::unordered_map<std::string, std::unique_ptr<Memory>> memories_;
  std::map<size_t, std::unique_ptr<tent::Transfer>> transfers_;
  std::map<size_t, Clock::time_point> begun_;
};

}  // namespace

int main(int argc, char** argv) {
  try {
    std::unordered_map<std::string, std::string> options{{"metrics", "false"}};
    for (int i = 2; i < argc; ++i) {
      const std::string word = argv[i];
      options[word.substr(0, word.find('='))] = word.substr(word.find('=') + 1);
    }
    Node node(argc > 1 ? argv[1] : "", options);
    std::printf("ok\n");
    std::fflush(stdout);
    for (std::string line; std::getline(std::cin, line);) {
      std::string text;
      try {
        text = "ok " + node.answer(line);
      } catch (const std::exception& error) {
        text = std::string("error ") + error.what();
      }
      std::printf("%s\n", text.c_str());
      std::fflush(stdout);
    }
  } catch (const std::exception& error) {
    std::printf("error %s\n", error.what());
    return 1;
  }
  return 0;
}
