#include "topology/topology.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <fstream>
#include <stdexcept>

namespace tent {
namespace {

constexpr size_t MAX_PATHS = 64;
constexpr const char* CONTAINER_BRIDGES[] = {"docker", "virbr", "cni", "flannel", "lxcbr", "podman"};

bool container_bridge(const std::string& name) {
  return std::any_of(std::begin(CONTAINER_BRIDGES), std::end(CONTAINER_BRIDGES),
                     [&](const char* start) { return name.starts_with(start); });
}

uint32_t nominal_mbits(const std::string& interface) {
  std::ifstream file("/sys/class/net/" + interface + "/speed");
  int64_t mbits = 0;
  return file >> mbits && mbits > 0 ? static_cast<uint32_t>(mbits) : 0;
}

uint8_t prefix_of(const void* mask, size_t bytes) {
  unsigned bits = 0;
  for (size_t i = 0; i < bytes; ++i) bits += static_cast<unsigned>(std::popcount(static_cast<const uint8_t*>(mask)[i]));
  return static_cast<uint8_t>(bits);
}

struct Raw {
  int family = AF_UNSPEC;
  std::array<uint8_t, 16> bytes{};
};

Raw parse(const std::string& text) {
  Raw raw;
  for (const int family : {AF_INET, AF_INET6})
    if (inet_pton(family, text.c_str(), raw.bytes.data()) == 1) {
      raw.family = family;
      break;
    }
  return raw;
}

bool is_loopback(const Raw& raw) {
  if (raw.family == AF_INET) return raw.bytes[0] == 127;
  constexpr std::array<uint8_t, 16> six = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1};
  return raw.family == AF_INET6 && raw.bytes == six;
}

bool same_subnet(const Endpoint& a, const Endpoint& b) {
  const Raw x = parse(a.address);
  const Raw y = parse(b.address);
  if (x.family != y.family || a.prefix == 0) return false;
  for (unsigned bit = 0; bit < a.prefix; ++bit) {
    const auto mask = static_cast<uint8_t>(0x80 >> bit % 8);
    if (((x.bytes[bit / 8] ^ y.bytes[bit / 8]) & mask) != 0) return false;
  }
  return true;
}

}  // namespace

std::string Path::label() const {
  const std::string here = local.interface.empty() ? local.address : local.interface;
  return remote.transport + ":" + here + (remote.transport == "cma" ? "" : ">" + remote.address);
}

std::vector<Address> local_addresses() {
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) throw std::runtime_error("cannot list the network interfaces");
  std::vector<Address> found;
  for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr || entry->ifa_netmask == nullptr || (entry->ifa_flags & IFF_UP) == 0) continue;
    Address address;
    address.interface = entry->ifa_name;
    address.loopback = (entry->ifa_flags & IFF_LOOPBACK) != 0;
    if (container_bridge(address.interface)) continue;
    std::array<char, INET6_ADDRSTRLEN> text{};
    if (entry->ifa_addr->sa_family == AF_INET) {
      sockaddr_in in{};
      sockaddr_in mask{};
      std::memcpy(&in, entry->ifa_addr, sizeof in);
      std::memcpy(&mask, entry->ifa_netmask, sizeof mask);
      inet_ntop(AF_INET, &in.sin_addr, text.data(), text.size());
      address.prefix = prefix_of(&mask.sin_addr, sizeof mask.sin_addr);
    } else if (entry->ifa_addr->sa_family == AF_INET6) {
      sockaddr_in6 in{};
      sockaddr_in6 mask{};
      std::memcpy(&in, entry->ifa_addr, sizeof in);
      std::memcpy(&mask, entry->ifa_netmask, sizeof mask);
      if (IN6_IS_ADDR_LINKLOCAL(&in.sin6_addr)) continue;
      inet_ntop(AF_INET6, &in.sin6_addr, text.data(), text.size());
      address.prefix = prefix_of(&mask.sin6_addr, sizeof mask.sin6_addr);
    } else {
      continue;
    }
    address.address = text.data();
    address.mbits = nominal_mbits(address.interface);
    found.push_back(std::move(address));
  }
  freeifaddrs(list);
  return found;
}

std::vector<Address> select_addresses(const std::vector<Address>& all, const std::vector<std::string>& links) {
  if (links.empty()) return all;
  std::vector<Address> chosen;
  for (const std::string& link : links) {
    const size_t before = chosen.size();
    for (const Address& address : all)
      if (address.interface == link || address.address == link) chosen.push_back(address);
    if (chosen.size() == before) {
      std::string have;
      for (const Address& address : all) have += " " + address.interface + "=" + address.address;
      throw std::invalid_argument("option links: '" + link + "' is no interface or address that is up here; have" +
                                  (have.empty() ? " none" : have));
    }
  }
  return chosen;
}

std::vector<Path> pair_endpoints(const std::vector<Endpoint>& local, const std::vector<Endpoint>& remote,
                                 bool same_host) {
  std::vector<Path> paths;
  size_t turn = 0;
  for (const Endpoint& there : remote) {
    const Raw address = parse(there.address);
    if (is_loopback(address) && !same_host) continue;
    bool paired = false;
    for (const Endpoint& here : local)
      if (is_loopback(parse(here.address)) == is_loopback(address) && same_subnet(here, there)) {
        paths.push_back({here, there, 0});
        paired = true;
      }
    if (paired || is_loopback(address)) continue;
    std::vector<const Endpoint*> family;
    for (const Endpoint& here : local)
      if (const Raw raw = parse(here.address); raw.family == address.family && !is_loopback(raw))
        family.push_back(&here);
    if (!family.empty()) paths.push_back({*family[turn++ % family.size()], there, 1});
  }
  if (paths.size() > MAX_PATHS) paths.resize(MAX_PATHS);
  return paths;
}

std::string host_identity() {
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  struct stat space{};
  const bool known = stat("/proc/self/ns/net", &space) == 0;
  return boot + "/" + (known ? std::to_string(space.st_ino) : "?");
}

}  // namespace tent
