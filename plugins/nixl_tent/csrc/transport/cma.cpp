// One host: frames on a Unix socket, payload copied once, by the receiver, straight from the sender's process.
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>

#include "transport/makers.h"

namespace tent {
namespace {

constexpr int BACKLOG = 256;

// In the abstract namespace: no file is left behind, and only this network namespace can dial it.
std::pair<sockaddr_un, socklen_t> socket_address(const std::string& name) {
  sockaddr_un at{};
  at.sun_family = AF_UNIX;
  const size_t size = std::min(name.size(), sizeof at.sun_path - 1);
  std::memcpy(at.sun_path + 1, name.data(), size);
  return {at, static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + size)};
}

class Cma final : public Transport {
 public:
  std::string_view name() const override { return "cma"; }

  std::vector<Listener> listen(const Config&, const std::string& engine) override {
    std::string name = "kimi-tent-";
    for (const char c : engine)
      for (const int nibble : {c >> 4 & 15, c & 15}) name += "0123456789abcdef"[nibble];
    const auto [at, size] = socket_address(name);
    Fd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (!fd || bind(fd.get(), reinterpret_cast<const sockaddr*>(&at), size) != 0 || ::listen(fd.get(), BACKLOG) != 0)
      return {};
    std::vector<Listener> listeners;
    listeners.push_back({std::move(fd), {"cma", "memory", name, 0, 0, 0}});
    return listeners;
  }

  std::vector<Path> paths(const std::vector<Endpoint>& local, const std::vector<Endpoint>& remote,
                          bool same_host) const override {
    if (!same_host || local.empty() || remote.empty()) return {};
    return {{local.front(), remote.front(), 0}};
  }

  Fd dial(const Path& path) const override {
    const auto [to, size] = socket_address(path.remote.address);
    Fd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (!fd || connect(fd.get(), reinterpret_cast<const sockaddr*>(&to), size) != 0) return {};
    return fd;
  }

  void tune(int) const override {}
  Evidence evidence(int) const override { return {}; }
  bool by_reference() const override { return true; }

  // The kernel's word, not the peer's: a peer cannot make us read some third process.
  pid_t process(int fd) const override {
    ucred peer{};
    socklen_t size = sizeof peer;
    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 ? peer.pid : -1;
  }
};

}  // namespace

std::unique_ptr<Transport> make_cma() { return std::make_unique<Cma>(); }

}  // namespace tent
