// Everything that turns bytes into values without an engine: metadata, regions, TOML, options, frames of a stream.
// The first byte chooses.
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <stdexcept>

#include "config/config.h"
#include "engine/connection.h"
#include "wire/metadata.h"

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

template <typename Decode>
void decode(std::string_view bytes, Decode decoder) {
  try {
    require(tent::encode(decoder(bytes)) == bytes);   // what is accepted says all there was
  } catch (const std::invalid_argument&) {
  }
}

void options(std::string_view text) {
  try {
    const auto values = tent::parse_toml(text);
    const tent::Config config = tent::read_config({values.begin(), values.end()});
    require(config.slice_min <= config.slice_max && config.port <= 65000 && config.dead_ms >= 10);
  } catch (const std::invalid_argument&) {
  }
}

// Gives every payload a place, in turns: a buffer, the text, nowhere.
class Sink final : public tent::FrameHandler {
 public:
  explicit Sink(tent::Receiver& in) : in_(in) {}
  std::optional<std::string> on_header(Destination& destination) override {
    require(in_.header.segments <= tent::MAX_SEGMENTS && in_.rows.size() == in_.header.segments);
    require(in_.header.payload <= tent::MAX_SLICE);
    if (in_.header.slice % 3 == 0) {
      destination.keep = true;
    } else if (in_.header.slice % 3 == 1 && in_.header.payload > 0) {
      memory_.assign(in_.header.payload, 0);
      const size_t half = memory_.size() / 2;
      destination.into = {{memory_.data(), half}, {memory_.data() + half, memory_.size() - half}};
    }
    return std::nullopt;
  }
  std::optional<std::string> on_payload() override {
    require(in_.header.slice % 3 != 0 || in_.text.size() == in_.header.payload);
    return std::nullopt;
  }

 private:
  tent::Receiver& in_;
  std::vector<uint8_t> memory_;
};

void frames(std::string_view bytes, bool trusted) {
  int ends[2];
  require(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) == 0);
  tent::Receiver in;
  in.trusted = trusted;
  Sink sink(in);
  std::string error;
  uint64_t count = 0;
  // Header fields are drawn from the input; the checksum is made right, or nothing would pass it.
  tent::Reader reader(bytes);
  while (reader.good()) {
    tent::Header header{.kind = static_cast<tent::Kind>(reader.take<uint8_t>())};
    header.segments = reader.take<uint8_t>();
    header.slice = reader.take<uint8_t>();
    header.payload = reader.take<uint16_t>() % 4096;
    if (const auto shift = reader.take<uint8_t>(); shift > 200) header.payload <<= shift % 16;
    tent::seal(header);
    std::string out;
    tent::put(out, header);
    out.append(std::min<size_t>(header.segments, 130) * sizeof(tent::Segment), 'r');
    out.append(std::min<size_t>(header.payload, 5000), 'p');
    if (write(ends[0], out.data(), out.size()) < 0) break;
    if (in.read(ends[1], sink, 1 << 20, count, error) == tent::Io::closed) break;
  }
  close(ends[0]);
  close(ends[1]);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  switch (data[0] % 5) {
    case 0: decode(bytes, tent::decode_connection); break;
    case 1: decode(bytes, tent::decode_region); break;
    case 2: options(bytes); break;
    default: frames(bytes, data[0] % 5 == 3); break;
  }
  return 0;
}
