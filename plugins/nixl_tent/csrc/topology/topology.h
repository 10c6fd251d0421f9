// The addresses of this machine, and which of them face which of a peer's.
#pragma once

#include <string>
#include <vector>

#include "wire/metadata.h"

namespace tent {

// A way from an endpoint here to one there.
struct Path {
  Endpoint local;
  Endpoint remote;
  int tier = 0;          // 0 best, LAST_RESORT for when nothing else lives
  std::string label() const;
};

struct Address {
  std::string interface;
  std::string address;   // numeric
  uint8_t prefix = 0;
  uint32_t mbits = 0;
  bool loopback = false;
};

// The addresses of interfaces that are up. Link-local ones and virtual bridges of container tools are left out.
std::vector<Address> local_addresses();

// Those that `links` (interface names or addresses) names, in its order; all when it is empty.
// Throws std::invalid_argument for a name that this machine does not have.
std::vector<Address> select_addresses(const std::vector<Address>& all, const std::vector<std::string>& links);

// One path for each pair in one subnet (tier 0); a remote address in no subnet of ours is paired in turn with ours
// of its family (tier 1). Loopback addresses only face each other, and only on one host.
std::vector<Path> pair_endpoints(const std::vector<Endpoint>& local, const std::vector<Endpoint>& remote,
                                 bool same_host);

// Equal for two processes that share the network namespace of one boot of one machine.
std::string host_identity();

}  // namespace tent
