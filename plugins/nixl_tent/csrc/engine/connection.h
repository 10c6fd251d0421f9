// One byte stream: frames queued to go out, and the frame that is coming in.
#pragma once

#include <sys/uio.h>

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "transport/transport.h"
#include "wire/frame.h"

namespace tent {

class DirectAccess;
struct Link;
struct Peer;
struct Session;

struct Outgoing {
  std::string head;             // header, rows, and payload that is small or must outlive its owner
  std::vector<iovec> payload;   // borrowed memory
  size_t payload_bytes = 0;
  size_t sent = 0;              // of head and payload together
  uint64_t transfer = 0;        // 0: belongs to none
  uint32_t slice = 0;
  bool begun() const { return sent > 0; }
};

enum class Io { more, blocked, closed };

// The queue of a stream. `forget` lets memory go that frames borrowed: what has not begun is dropped, what has
// begun must be finished, so its rest is copied.
class Sender {
 public:
  void push(Outgoing frame) { frames_.push_back(std::move(frame)); }
  Io flush(int fd, uint64_t& bytes);
  bool empty() const { return frames_.empty(); }
  size_t waiting() const { return frames_.size(); }

  // Calls dropped(transfer, slice) for every frame of `transfer` (0: of any) that had not begun.
  template <typename Dropped>
  void forget(uint64_t transfer, Dropped dropped) {
    std::deque<Outgoing> kept;
    for (Outgoing& frame : frames_) {
      const bool ours = frame.transfer != 0 && (transfer == 0 || frame.transfer == transfer);
      if (ours && !frame.begun()) {
        dropped(frame.transfer, frame.slice);
        continue;
      }
      if (ours) own_rest(frame);
      kept.push_back(std::move(frame));
    }
    frames_ = std::move(kept);
  }
  // The same for every frame that borrows from [begin, begin + size); nothing is dropped.
  void release_memory(const uint8_t* begin, size_t size);

 private:
  static void own_rest(Outgoing& frame);
  std::deque<Outgoing> frames_;
};

// What a receiver of frames does with them.
class FrameHandler {
 public:
  virtual ~FrameHandler() = default;
  struct Destination {
    std::vector<iovec> into;   // exactly `payload` bytes, or empty: throw the payload away
    bool keep = false;         // collect the payload in Receiver::text instead
  };
  // The header and rows are complete. Returns an error to close the stream with, or nothing.
  virtual std::optional<std::string> on_header(Destination& destination) = 0;
  virtual std::optional<std::string> on_payload() = 0;
};

class Receiver {
 public:
  Header header;
  std::vector<Segment> rows;
  std::string text;        // a payload that is kept
  bool trusted = false;    // the handshake is over

  // Reads until the stream blocks or `budget` bytes are through.
  Io read(int fd, FrameHandler& handler, size_t budget, uint64_t& bytes, std::string& error);

  // The rest of the payload that is coming in is not to be written any more.
  void discard() { drain_ = true; }
  bool filling() const { return stage_ == Stage::payload && !drain_ && !keep_; }
  bool touches(const uint8_t* begin, size_t size) const;

 private:
  enum class Stage { header, rows, payload };
  std::optional<std::string> parse(FrameHandler& handler, bool& progress);
  void store(const char* data, size_t size);
  size_t targets(std::array<iovec, MAX_SEGMENTS + 1>& out, size_t budget);
  void advance(size_t size);

  Stage stage_ = Stage::header;
  bool drain_ = false;
  bool keep_ = false;
  std::vector<iovec> into_;
  size_t at_ = 0;          // the row of into_ that is being filled
  size_t left_ = 0;        // payload bytes to come
  std::array<char, 16 << 10> buffer_;
  size_t begin_ = 0;
  size_t end_ = 0;
};

struct Connection {
  Connection();
  ~Connection();
  uint64_t id = 0;             // in this engine, for epoll
  Fd fd;
  const Transport* transport = nullptr;
  Peer* peer = nullptr;        // dialled by us for this peer,
  Link* link = nullptr;        // over this link,
  Session* session = nullptr;  // or accepted and proven to be of this session
  uint64_t name = 0;           // the dialler's name for it
  pid_t process = -1;          // the other end's, where slices are by reference
  std::unique_ptr<DirectAccess> direct;   // to its memory; dialled by us
  std::optional<uint32_t> cell;           // the other end's in our table; accepted
  double since = 0;            // when it was opened
  bool watching_output = false;
  bool paused = false;         // not read until the other side has taken some of our answers
  bool closed = false;
  std::string nonce;           // ours, in the handshake
  std::string transcript;      // hello and challenge as they were sent
  Refusal refusal = Refusal::none;   // of the slice that is coming in
  Sender out;
  Receiver in;
};

}  // namespace tent
