#include "wire/frame.h"

#include <array>

namespace tent {
namespace {

constexpr std::array<uint32_t, 256> crc_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) value = (value & 1) != 0 ? 0xedb88320u ^ (value >> 1) : value >> 1;
    table[i] = value;
  }
  return table;
}
constexpr std::array<uint32_t, 256> CRC = crc_table();

struct Bounds {
  Kind kind;
  bool handshake;      // allowed before, and only before, the peer is trusted
  uint32_t segments;   // most rows
  uint32_t payload;    // most bytes
};

constexpr uint32_t REFERENCES = MAX_SEGMENTS * sizeof(Reference);
constexpr Bounds BOUNDS[] = {
    {Kind::hello, true, 0, MAX_HANDSHAKE},
    {Kind::challenge, true, 0, MAX_HANDSHAKE},
    {Kind::proof, true, 0, MAX_HANDSHAKE},
    {Kind::welcome, true, 0, MAX_HANDSHAKE},
    {Kind::refused, true, 0, MAX_HANDSHAKE},
    {Kind::write, false, MAX_SEGMENTS, MAX_SLICE},
    {Kind::write_ref, false, MAX_SEGMENTS, REFERENCES},
    {Kind::read, false, MAX_SEGMENTS, 0},
    {Kind::read_data, false, 0, MAX_SLICE},
    {Kind::read_ref, false, 0, REFERENCES},
    {Kind::ack, false, 0, 0},
    {Kind::nack, false, 0, 0},
    {Kind::end, false, 0, MAX_NOTIFICATION},
    {Kind::end_ack, false, 0, 0},
    {Kind::ping, false, 0, 0},
    {Kind::pong, false, 0, 0},
    {Kind::drop, false, 0, 0},
    {Kind::fence, false, 0, 0},
    {Kind::fenced, false, 0, 0},
    {Kind::direct, false, 0, 2 * sizeof(uint32_t)},
};

}  // namespace

const char* describe(Refusal refusal) {
  switch (refusal) {
    case Refusal::none: return "nothing";
    case Refusal::region: return "no such registered region";
    case Refusal::token: return "the token is not the region's";
    case Refusal::range: return "the range is not inside the region";
    case Refusal::memory: return "the memory cannot be read or written";
    case Refusal::busy: return "too many transfers are open";
  }
  return "an unknown reason";
}

uint32_t checksum(const void* data, size_t size) {
  uint32_t value = ~0u;
  for (const auto* byte = static_cast<const uint8_t*>(data); size > 0; --size, ++byte)
    value = CRC[(value ^ *byte) & 0xff] ^ (value >> 8);
  return ~value;
}

void seal(Header& header) { header.check = checksum(&header, offsetof(Header, check)); }

std::optional<std::string> problem(const Header& header, bool trusted) {
  if (header.magic != MAGIC) return "not a TENT frame";
  if (header.version != WIRE_VERSION)
    return "wire version " + std::to_string(header.version) + ", this side speaks " + std::to_string(WIRE_VERSION);
  if (header.check != checksum(&header, offsetof(Header, check))) return "damaged header";
  for (const Bounds& bounds : BOUNDS) {
    if (bounds.kind != header.kind) continue;
    if (bounds.handshake == trusted) return "frame out of place: kind " + std::to_string(int(header.kind));
    if (header.segments > bounds.segments) return "too many rows: " + std::to_string(header.segments);
    if (header.payload > bounds.payload) return "payload too long: " + std::to_string(header.payload);
    if (header.slice >= MAX_SLICES_OF_TRANSFER || ((header.flags & FLAG_TOTAL) != 0 && header.aux > MAX_SLICES_OF_TRANSFER))
      return "slice number out of range: " + std::to_string(header.slice);
    return std::nullopt;
  }
  return "unknown frame kind " + std::to_string(int(header.kind));
}

void put_text(std::string& out, std::string_view text) {
  put(out, static_cast<uint16_t>(text.size()));
  out.append(text.substr(0, UINT16_MAX));
}

std::string_view Reader::raw(size_t size) {
  if (!good_ || size > data_.size()) {
    good_ = false;
    return {};
  }
  const std::string_view bytes = data_.substr(0, size);
  data_.remove_prefix(size);
  return bytes;
}

std::string Reader::text(size_t limit) {
  const auto size = take<uint16_t>();
  if (size > limit) good_ = false;
  return std::string(raw(size));
}

}  // namespace tent
