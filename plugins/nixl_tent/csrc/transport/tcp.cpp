// TCP, one stream per pair of addresses.
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "scheduler/scheduler.h"
#include "transport/makers.h"

namespace tent {
namespace {

constexpr int BACKLOG = 256;
// A side that only answers learns of a dead path by this: it has no transfers of its own to judge by.
constexpr unsigned PASSIVE_TIMEOUT_MS = 30'000;
// And of a peer that vanished without a word, while nothing is under way.
constexpr int KEEPALIVE_IDLE_S = 20;
constexpr int KEEPALIVE_INTERVAL_S = 5;
// This few segments may be waiting for the peer's delayed acknowledgement.
constexpr uint32_t FEW_SEGMENTS = 2;

struct Socket {
  sockaddr_storage storage{};
  socklen_t size = 0;
  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
};

Socket socket_address(const std::string& address, uint16_t port) {
  Socket socket;
  sockaddr_in four{};
  sockaddr_in6 six{};
  if (inet_pton(AF_INET, address.c_str(), &four.sin_addr) == 1) {
    four.sin_family = AF_INET;
    four.sin_port = htons(port);
    std::memcpy(&socket.storage, &four, sizeof four);
    socket.size = sizeof four;
  } else if (inet_pton(AF_INET6, address.c_str(), &six.sin6_addr) == 1) {
    six.sin6_family = AF_INET6;
    six.sin6_port = htons(port);
    std::memcpy(&socket.storage, &six, sizeof six);
    socket.size = sizeof six;
  }
  return socket;
}

class Tcp final : public Transport {
 public:
  std::string_view name() const override { return "tcp"; }

  std::vector<Listener> listen(const Config& config, const std::string&) override {
    std::vector<Listener> listeners;
    uint64_t port = config.port;
    for (const Address& address : select_addresses(local_addresses(), config.links)) {
      Socket at = socket_address(address.address, static_cast<uint16_t>(port));
      Fd fd(::socket(at.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
      constexpr int on = 1;
      setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
      if (!fd || bind(fd.get(), at.get(), at.size) != 0 || ::listen(fd.get(), BACKLOG) != 0)
        throw std::invalid_argument("cannot listen on " + address.address + " port " + std::to_string(port) + ": " +
                                    std::strerror(errno));
      getsockname(fd.get(), at.get(), &at.size);
      uint16_t bound = 0;
      std::memcpy(&bound, reinterpret_cast<const char*>(&at.storage) + offsetof(sockaddr_in, sin_port), sizeof bound);
      listeners.push_back({std::move(fd),
                           {"tcp", address.interface, address.address, ntohs(bound), address.prefix, address.mbits}});
      if (port != 0) ++port;
    }
    return listeners;
  }

  std::vector<Path> paths(const std::vector<Endpoint>& local, const std::vector<Endpoint>& remote,
                          bool same_host) const override {
    std::vector<Path> all = pair_endpoints(local, remote, same_host);
    if (!same_host) return all;
    // On one host every address leads through the same memory: one stream is as fast as many, and it is only
    // there for when the direct copy between processes is not allowed.
    if (!all.empty()) all.resize(1);
    for (Path& path : all) path.tier = LAST_RESORT;
    return all;
  }

  Fd dial(const Path& path) const override {
    Socket from = socket_address(path.local.address, 0);
    Socket to = socket_address(path.remote.address, path.remote.port);
    Fd fd(::socket(to.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (!fd || bind(fd.get(), from.get(), from.size) != 0) return {};
    tune(fd.get());
    if (connect(fd.get(), to.get(), to.size) != 0 && errno != EINPROGRESS) return {};
    return fd;
  }

  void tune(int fd) const override {
    constexpr int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &KEEPALIVE_IDLE_S, sizeof KEEPALIVE_IDLE_S);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &KEEPALIVE_INTERVAL_S, sizeof KEEPALIVE_INTERVAL_S);
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &PASSIVE_TIMEOUT_MS, sizeof PASSIVE_TIMEOUT_MS);
  }

  Evidence evidence(int fd) const override {
    tcp_info info{};
    socklen_t size = sizeof info;
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) != 0) return {};
    Evidence evidence;
    evidence.counter = info.tcpi_bytes_acked + info.tcpi_bytes_received;
    // Where the route itself is gone, nothing is sent and so nothing unacknowledged: it shows as never sent.
    evidence.waiting = info.tcpi_unacked > 0 || info.tcpi_notsent_bytes > 0;
    evidence.few = info.tcpi_unacked <= FEW_SEGMENTS && info.tcpi_notsent_bytes == 0;
    evidence.round_trip = info.tcpi_min_rtt < UINT32_MAX ? info.tcpi_min_rtt * 1e-6 : 0;
    evidence.held = info.tcpi_rwnd_limited;
    return evidence;
  }
};

}  // namespace

std::unique_ptr<Transport> make_tcp() { return std::make_unique<Tcp>(); }

}  // namespace tent
