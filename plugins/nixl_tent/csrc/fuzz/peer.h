// The other end of an engine's connection, as the fuzzers play it: it knows the handshake and makes checksums right,
// so that what they try comes as far as a real peer's frames would. Everything runs on the caller's thread.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "engine/dispatcher.h"
#include "engine/engine.h"

namespace fuzz {

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %s (last system error: %s)\n", what, std::strerror(errno));
  std::abort();
}

inline tent::Config quiet_config() {
  tent::Config config;
  config.links = {"127.0.0.1"};
  config.cma = false;
  config.metrics = false;
  return config;
}

inline std::string digest(const std::string& key, const std::string& text) {
  const tent::Digest made = tent::hmac_sha256(key, text);
  return {reinterpret_cast<const char*>(made.data()), made.size()};
}

// Until the engine has nothing more to do.
inline void settle(tent::Engine& engine) {
  for (int i = 0; i < 6; ++i) engine.step(0);
}

class Stream {
 public:
  explicit Stream(int fd) : fd_(fd) {}
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() {
    constexpr linger at_once{1, 0};   // no port may linger: there are thousands a second
    setsockopt(fd_, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    close(fd_);
  }

  void send_bytes(std::string_view bytes) {
    [[maybe_unused]] const ssize_t sent = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  }

  void send_frame(tent::Header header, std::string_view rest = {}, bool own_length = false) {
    if (!own_length) header.payload = static_cast<uint32_t>(rest.size());
    tent::seal(header);
    std::string out;
    tent::put(out, header);
    send_bytes(out.append(rest));
  }

  // Payload of the next frame; empty where none came.
  std::string receive(tent::Header& header) {
    if (recv(fd_, &header, sizeof header, MSG_DONTWAIT) != static_cast<ssize_t>(sizeof header)) return {};
    std::string rest(header.segments * sizeof(tent::Segment) + header.payload, '\0');
    const auto size = static_cast<ssize_t>(rest.size());
    if (size > 0 && recv(fd_, rest.data(), rest.size(), MSG_DONTWAIT) != size) return {};
    return rest.substr(header.segments * sizeof(tent::Segment));
  }

  void drain() {
    char sink[4096];
    while (recv(fd_, sink, sizeof sink, MSG_DONTWAIT) > 0) {
    }
  }

 private:
  int fd_;
};

// Frames as the input describes them. A row's token is right unless the input says otherwise.
inline void play(tent::Engine& engine, Stream& stream, tent::Reader& input, uint64_t first_transfer,
                 const tent::RegionInfo& open) {
  for (int count = 0; input.good() && count < 64; ++count) {
    tent::Header header{.kind = static_cast<tent::Kind>(input.take<uint8_t>() % 21)};
    const auto shape = input.take<uint8_t>();
    header.flags = input.take<uint8_t>() % 16;
    header.slice = input.take<uint8_t>() % 8;
    header.transfer = first_transfer + input.take<uint8_t>() % 8;
    if (shape % 16 == 15) header.transfer ^= uint64_t{1} << 63;
    header.aux = input.take<uint8_t>() % 8;
    header.segments = shape % 4;
    std::string rest;
    uint32_t total = 0;
    for (int row = 0; row < header.segments; ++row) {
      tent::Segment segment{open.token, input.take<uint16_t>(), open.slot, input.take<uint16_t>() % 512u};
      const auto twist = input.take<uint8_t>();
      if (twist == 1) segment.token ^= 1;
      if (twist == 2) segment.slot += 1;
      if (twist == 3) segment.offset = ~segment.offset;
      if (twist == 4) segment.length = ~segment.length;
      total += segment.length;
      tent::put(rest, segment);
    }
    header.payload = (shape & 32) != 0 ? total % 2048 : input.take<uint8_t>();
    rest.append(header.payload, static_cast<char>(shape));
    if ((shape & 64) != 0) rest.resize(rest.size() / 2);   // the rest comes with the next frame, or never
    stream.send_frame(header, rest, true);
    if ((shape & 128) != 0) engine.step(0);
  }
  settle(engine);
  stream.drain();
  settle(engine);
}

}  // namespace fuzz
