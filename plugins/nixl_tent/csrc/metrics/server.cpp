#include "metrics/server.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstring>

#include "engine/engine.h"

namespace tent {
namespace {

constexpr int REQUEST_MS = 200;   // a client that says nothing for so long wants JSON

void send_all(int client, std::string_view text) {
  while (!text.empty()) {
    const ssize_t sent = send(client, text.data(), text.size(), MSG_NOSIGNAL);
    if (sent <= 0) return;
    text.remove_prefix(static_cast<size_t>(sent));
  }
}

}  // namespace

MetricsServer::MetricsServer(Engine& engine, const std::string& folder) : engine_(engine) {
  static std::atomic<unsigned> count{0};
  mkdir(folder.c_str(), 0700);
  struct stat info{};
  // In a shared /tmp somebody else may have made the folder: then nothing of ours goes there.
  if (lstat(folder.c_str(), &info) != 0 || !S_ISDIR(info.st_mode) || info.st_uid != geteuid()) return;
  path_ = folder + "/" + std::to_string(getpid()) + "-" + std::to_string(count++) + ".sock";
  sockaddr_un at{};
  at.sun_family = AF_UNIX;
  if (path_.size() >= sizeof at.sun_path) return;
  std::memcpy(at.sun_path, path_.data(), path_.size());
  unlink(path_.c_str());
  Fd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  stop_ = Fd(eventfd(0, EFD_CLOEXEC));
  if (!fd || !stop_ || bind(fd.get(), reinterpret_cast<const sockaddr*>(&at), sizeof at) != 0 ||
      listen(fd.get(), 8) != 0)
    return;
  listener_ = std::move(fd);
  thread_ = std::thread([this] { run(); });
}

MetricsServer::~MetricsServer() {
  if (!thread_.joinable()) return;
  constexpr uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(stop_.get(), &one, sizeof one);
  thread_.join();
  unlink(path_.c_str());
}

void MetricsServer::run() {
  while (true) {
    std::array<pollfd, 2> watched{{{listener_.get(), POLLIN, 0}, {stop_.get(), POLLIN, 0}}};
    if (poll(watched.data(), watched.size(), -1) < 0) continue;
    if (watched[1].revents != 0) return;
    const Fd client(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (client) answer(client.get());
  }
}

void MetricsServer::answer(int client) {
  timeval patience{};
  patience.tv_usec = REQUEST_MS * 1000;
  setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  setsockopt(client, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
  std::array<char, 1024> request{};
  const ssize_t got = recv(client, request.data(), request.size(), 0);
  if (got < 4 || std::string_view(request.data(), 4) != "GET ") return send_all(client, engine_.metrics_json());
  const std::string body = engine_.metrics_text();
  send_all(client, "HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: " +
                       std::to_string(body.size()) + "\r\n\r\n" + body);
}

}  // namespace tent
