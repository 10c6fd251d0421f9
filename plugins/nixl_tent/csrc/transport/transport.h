// A transport makes the byte streams that frames travel on. A new one is a file with one class and a row in
// `make_transports`; scheduling, healing and framing are the engine's and the same for all.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "config/config.h"
#include "health/stall.h"
#include "topology/topology.h"
#include "wire/metadata.h"

namespace tent {

// Owns a file descriptor.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  ~Fd();
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

struct Listener {
  Fd fd;               // non-blocking; accept4 on it gives a stream
  Endpoint endpoint;   // what the peer needs to dial it
};

class Transport {
 public:
  virtual ~Transport() = default;
  virtual std::string_view name() const = 0;

  // Opens what this agent listens on. Throws std::invalid_argument where the configuration cannot be met.
  virtual std::vector<Listener> listen(const Config& config, const std::string& engine) = 0;

  // The ways to a peer, from the endpoints of this transport on both sides.
  virtual std::vector<Path> paths(const std::vector<Endpoint>& local, const std::vector<Endpoint>& remote,
                                  bool same_host) const = 0;

  // Begins a connection without waiting; an empty Fd where that fails at once.
  virtual Fd dial(const Path& path) const = 0;

  // Sets what a stream of either side needs.
  virtual void tune(int fd) const = 0;

  // What the kernel knows of the stream's progress. One that cannot lose bytes never waits.
  virtual Evidence evidence(int fd) const = 0;

  // Whether slices carry references that the receiver pulls from the sender's process, and from which.
  virtual bool by_reference() const { return false; }
  virtual pid_t process(int fd) const;
};

std::vector<std::unique_ptr<Transport>> make_transports(const Config& config);

}  // namespace tent
