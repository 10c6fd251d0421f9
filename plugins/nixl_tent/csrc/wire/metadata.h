// What an agent publishes through NIXL's metadata: how to reach and recognise it, and its regions.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "security/sha256.h"

namespace tent {

// Where one transport of an agent listens.
struct Endpoint {
  std::string transport;   // "tcp", "cma"
  std::string interface;   // network interface, for people
  std::string address;     // numeric address, or the name of a socket
  uint16_t port = 0;
  uint8_t prefix = 0;      // bits of the subnet
  uint32_t mbits = 0;      // nominal rate, 0: unknown
};

struct ConnectionInfo {
  std::string engine;   // 16 random bytes: one life of one agent
  std::string key;      // 32 random bytes: whoever holds this metadata may talk to the agent
  std::string host;     // equal on two engines of one network namespace of one boot
  std::vector<Endpoint> endpoints;
  std::string hosted = {};   // how to reach the engine that it hosts; empty: it hosts none
};

constexpr size_t MAX_HOSTED = 16 << 10;   // bytes of what a hosted engine publishes of itself or of a region
constexpr uint32_t NO_SLOT = UINT32_MAX;   // of a region that only a hosted engine reaches


struct RegionInfo {
  uint64_t token = 0;
  uint64_t address = 0;
  uint64_t length = 0;
  uint32_t slot = 0;
  uint8_t kind = 0;      // of memory: MemoryKind
  uint64_t device = 0;
  std::string hosted = {};   // what a peer's hosted engine needs of it; empty: it is not known there
};

std::string encode(const ConnectionInfo& info);
std::string encode(const RegionInfo& info);

// Both throw std::invalid_argument on anything but what `encode` of this version wrote.
ConnectionInfo decode_connection(std::string_view blob);
RegionInfo decode_region(std::string_view blob);

}  // namespace tent
