// What travels on a connection: a fixed header, then `segments` table rows, then `payload` bytes.
// Everything a peer sends is checked against the bounds here before memory is touched or allocated.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>

namespace tent {

static_assert(std::endian::native == std::endian::little, "the wire format is little-endian");

constexpr uint16_t MAGIC = 0x5e27;
constexpr uint8_t WIRE_VERSION = 1;
constexpr uint32_t MAX_SEGMENTS = 128;             // rows of one slice; below IOV_MAX
constexpr uint32_t MAX_SLICE = 16u << 20;          // payload of one slice
constexpr uint32_t MAX_NOTIFICATION = 16u << 20;   // bytes of one notification
constexpr uint32_t MAX_HANDSHAKE = 1024;           // payload of a handshake frame
constexpr uint32_t MAX_SLICES_OF_TRANSFER = 1u << 22;

enum class Kind : uint8_t {
  hello = 1,    // dialler: who I am, whom I want
  challenge,    // listener: prove it
  proof,        // dialler: keyed digests of the conversation
  welcome,      // listener: keyed digest, so that the listener is proven too
  refused,      // listener: why not, as text
  write,        // slice: rows (where to), payload
  write_ref,    // slice: rows (where to), payload = rows of the sender's own memory to pull from
  read,         // slice: rows (where from)
  read_data,    // slice: payload
  read_ref,     // slice: payload = rows of the sender's own memory to pull from
  ack,          // slice is written, and no other copy of it will be
  nack,         // slice is refused; aux = Refusal
  end,          // transfer has aux slices; payload = notification
  end_ack,      // transfer is complete at the target, or given up
  ping,         // makes the kernels exchange acknowledgements, and the processes a word
  pong,
  drop,         // close the connection named by `transfer`: its dialler has given it up
  fence,        // end the engine that you host: slices that it carried will be sent again
  fenced,       // it has ended: nothing is written through it any more
  direct,       // payload: where the dialler finds the table of regions, and its cell there (engine/direct.h)
};

enum Flags : uint16_t {
  FLAG_TOTAL = 1,    // aux is the number of slices of the transfer
  FLAG_NOTIFY = 2,   // end: deliver the payload as a notification
  FLAG_ABORT = 4,    // end: whatever arrives of this transfer from now on is thrown away
  FLAG_ORDERED = 8,  // end: the payload begins with a u64, its place among the plain notifications
};

enum class Refusal : uint32_t { none = 0, region, token, range, memory, busy };
const char* describe(Refusal refusal);

struct Header {
  uint16_t magic = MAGIC;
  uint8_t version = WIRE_VERSION;
  Kind kind{};
  uint16_t segments = 0;
  uint16_t flags = 0;
  uint32_t slice = 0;
  uint32_t payload = 0;
  uint64_t transfer = 0;
  uint32_t aux = 0;
  uint32_t check = 0;  // over the bytes before it: a stream that lost its place is noticed at once
};
static_assert(sizeof(Header) == 32 && std::has_unique_object_representations_v<Header>);

// One row: a piece of a registered region of the receiver.
struct Segment {
  uint64_t token = 0;
  uint64_t offset = 0;
  uint32_t slot = 0;
  uint32_t length = 0;
};
static_assert(sizeof(Segment) == 24 && std::has_unique_object_representations_v<Segment>);

// One row of a reference: a piece of the sender's address space.
struct Reference {
  uint64_t address = 0;
  uint64_t length = 0;
};
static_assert(sizeof(Reference) == 16);

uint32_t checksum(const void* data, size_t size);
void seal(Header& header);

// Why a header cannot be accepted, or nothing. `trusted` is false until the handshake is over.
std::optional<std::string> problem(const Header& header, bool trusted);

template <typename T>
void put(std::string& out, const T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}
void put_text(std::string& out, std::string_view text);  // length as u16, then the bytes

// Reads what `put` wrote; never past the end. After a failure every later read fails too.
class Reader {
 public:
  explicit Reader(std::string_view data) : data_(data) {}
  template <typename T>
  T take() {
    T value{};
    if (const auto bytes = raw(sizeof value); bytes.size() == sizeof value)
      std::memcpy(&value, bytes.data(), sizeof value);
    return value;
  }
  std::string text(size_t limit);
  std::string_view raw(size_t size);
  bool complete() const { return good_ && data_.empty(); }
  bool good() const { return good_; }

 private:
  std::string_view data_;
  bool good_ = true;
};

}  // namespace tent
