// A target that answers anything to an engine that writes to it and reads from it. Only the memory that is read into
// may change, and every transfer must end when the peer is given up.
#include <algorithm>

#include "fuzz/peer.h"

namespace {

constexpr size_t SIZE = 256;   // so small that the data of a whole slice fits into what `play` sends

struct World {
  tent::Engine engine{fuzz::quiet_config(), "initiator", tent::Drive::stepped};
  int listener = -1;
  uint16_t port = 0;
  std::string host = tent::decode_connection(engine.connection_info()).host;
  std::vector<uint8_t> source = std::vector<uint8_t>(SIZE, 9);
  std::vector<uint8_t> sink = std::vector<uint8_t>(SIZE, 7);

  World() {
    sockaddr_in at{};
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof at;
    listener = socket(AF_INET, SOCK_STREAM, 0);
    fuzz::require(bind(listener, reinterpret_cast<const sockaddr*>(&at), sizeof at) == 0 && listen(listener, 64) == 0 &&
                  getsockname(listener, reinterpret_cast<sockaddr*>(&at), &size) == 0,
                  "a target can listen");
    port = ntohs(at.sin_port);
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  static auto* world = new World;
  tent::Engine& engine = world->engine;
  tent::ConnectionInfo info{std::string(16, 't'), std::string(32, 'k'), world->host, {}};
  info.endpoints = {{"tcp", "lo", "127.0.0.1", world->port, 8, 0}};
  engine.load_peer("target", tent::encode(info));
  engine.connect("target");
  fuzz::settle(engine);
  {
    fuzz::Stream stream(accept(world->listener, nullptr, nullptr));
    fuzz::settle(engine);
    tent::Reader input({reinterpret_cast<const char*>(data) + 1, size - 1});
    tent::Header header;
    const std::string hello = stream.receive(header);
    std::vector<std::unique_ptr<tent::Transfer>> transfers;
    for (const tent::Op op : {tent::Op::write, tent::Op::read, tent::Op::read}) {
      auto transfer = engine.prepare(op, "target");
      auto* memory = op == tent::Op::write ? world->source.data() : world->sink.data();
      transfer->plan.add({memory, 1, 0, SIZE / 2, 0});
      transfer->plan.add({memory + SIZE / 2 + 1, 1, SIZE, SIZE / 2 - 1, 0});
      engine.post(*transfer, op == tent::Op::write ? std::optional<std::string>("told") : std::nullopt);
      transfers.push_back(std::move(transfer));
    }
    if (data[0] % 4 == 0) {
      stream.send_bytes(input.raw(size - 1));
    } else {
      std::string challenge(32, 'c');
      tent::put(challenge, uint64_t{0});
      stream.send_frame({.kind = tent::Kind::challenge}, challenge);
      fuzz::settle(engine);
      stream.receive(header);
      std::string welcome = fuzz::digest(tent::shared_key("", info.key), "listener" + hello + challenge);
      if (data[0] % 4 == 1) welcome[0] ^= static_cast<char>(input.take<uint8_t>() & 1);
      stream.send_frame({.kind = tent::Kind::welcome}, welcome);
      fuzz::settle(engine);
      // Reads are numbered from 2^63 on.
      fuzz::play(engine, stream, input, data[0] % 4 == 2 ? 1 : uint64_t{1} << 63 | 1, {1, 0, SIZE, 0});
    }
    fuzz::settle(engine);
    engine.disconnect("target");
    fuzz::settle(engine);
    for (const auto& transfer : transfers) fuzz::require(transfer->status != tent::Status::running, "transfers end with the peer");
  }
  fuzz::require(std::all_of(world->source.begin(), world->source.end(), [](uint8_t byte) { return byte == 9; }),
                "what is only read from is as it was");
  fuzz::require(world->sink[SIZE / 2] == 7, "what lies between the pieces that are read into is as it was");
  return 0;
}
