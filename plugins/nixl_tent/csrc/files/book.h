// Which piece of which transfer is read or written next, and what its result means. Pure: no threads, no calls to the
// kernel.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/transfer.h"

namespace tent {

constexpr uint32_t FILE_CHUNK = 1 << 20;   // bytes of one call: so much is waited for at most when one is canceled

struct FileJob {
  Transfer* transfer;
  std::function<void()> finished;   // runs when all bytes are through, before the status says so
  size_t piece = 0;                 // the next to be cut
  uint64_t at = 0;                  // into it
  uint32_t in_flight = 0;
  std::string trouble;              // the first error; nothing more is begun then
  bool canceled = false;
};

struct FileChunk {
  FileJob* job = nullptr;
  const FilePiece* piece = nullptr;
  uint64_t at = 0;       // into the piece
  uint32_t bytes = 0;

  bool write() const { return job->transfer->op == Op::write; }
  uint8_t* memory() const { return piece->memory + at; }
  uint64_t offset() const { return piece->offset + at; }
};

class FileBook {
 public:
  void add(Transfer& transfer, std::function<void()> finished);

  // The next chunk: of the highest priority, and of its transfers in turn. Nothing: all is under way.
  std::optional<FileChunk> take();

  // What the kernel answered: bytes, or a negative error. The rest of a short one is offered again.
  void answered(const FileChunk& chunk, ssize_t result);

  // A transfer that is over, with its last answer: it is in the book no longer.
  std::unique_ptr<FileJob> take_finished();

  // Begins nothing more of it. Whether it was here; it leaves by `take_finished`.
  bool cancel(const Transfer& transfer);
  void cancel_all();
  bool holds(const Transfer& transfer) const;
  bool empty() const { return jobs_.empty(); }

 private:
  static bool over(const FileJob& job);
  std::deque<std::unique_ptr<FileJob>> jobs_;
  std::deque<FileChunk> again_;
};

}  // namespace tent
