// A dialler that says anything, before, in and after a handshake. What it has the token for may change; the region
// beside it must not.
#include <algorithm>

#include "fuzz/peer.h"

namespace {

constexpr size_t SIZE = 4096;

struct World {
  std::vector<uint8_t> open = std::vector<uint8_t>(SIZE);
  std::vector<uint8_t> closed = std::vector<uint8_t>(SIZE, 7);
  tent::Engine engine{fuzz::quiet_config(), "target", tent::Drive::stepped};
  tent::Region* region = engine.add_region(open.data(), open.size());
  tent::Region* other = engine.add_region(closed.data(), closed.size());
  tent::ConnectionInfo info = tent::decode_connection(engine.connection_info());
  std::string key = tent::shared_key("", info.key);
  uint64_t generation = 0;
};

int dial(uint16_t port) {
  sockaddr_in at{};
  at.sin_family = AF_INET;
  at.sin_port = htons(port);
  at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  // libFuzzer's alarm may interrupt a call: the connection goes on being made.
  while (fd >= 0 && connect(fd, reinterpret_cast<const sockaddr*>(&at), sizeof at) != 0 && errno != EISCONN)
    fuzz::require(errno == EINTR || errno == EALREADY, "a peer can dial");
  fuzz::require(fd >= 0, "there are descriptors left");
  return fd;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  static auto* world = new World;   // one engine for all inputs; each begins a new generation of the same initiator
  tent::Reader input({reinterpret_cast<const char*>(data) + 1, size - 1});
  fuzz::Stream stream(dial(world->info.endpoints.front().port));
  fuzz::settle(world->engine);
  if (data[0] % 4 == 0) {
    stream.send_bytes(input.raw(size - 1));
    fuzz::settle(world->engine);
  } else {
    std::string hello = world->info.engine + std::string(16, 'i') + std::string(32, 'n');
    tent::put(hello, ++world->generation);
    tent::put(hello, uint64_t{1});
    tent::put(hello, uint64_t{1});
    tent::put(hello, uint64_t{0});
    tent::put_text(hello, data[0] % 4 == 1 ? std::string(input.raw(3)) : "dialler");
    stream.send_frame({.kind = tent::Kind::hello}, hello);
    fuzz::settle(world->engine);
    tent::Header header;
    const std::string transcript = hello + stream.receive(header);
    std::string proof = fuzz::digest(world->key, "dialler" + transcript) + std::string(32, 'o');
    if (data[0] % 4 == 1) proof[input.take<uint8_t>() % proof.size()] ^= static_cast<char>(input.take<uint8_t>() & 1);
    stream.send_frame({.kind = tent::Kind::proof}, proof);
    fuzz::settle(world->engine);
    stream.receive(header);
    fuzz::play(world->engine, stream, input, 1, tent::Engine::describe_region(*world->region));
  }
  world->engine.take_notifications();
  fuzz::require(std::all_of(world->closed.begin(), world->closed.end(), [](uint8_t byte) { return byte == 7; }),
                "the region whose token nobody was told is as it was");
  return 0;
}
