// The kernel's io_uring, by its system calls: a queue of reads and writes, and what became of them. For one thread.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <string>

#include "transport/transport.h"

struct io_uring_sqe;
struct io_uring_cqe;

namespace tent {

class Ring {
 public:
  // Null where this process may not have one, with the reason.
  static std::unique_ptr<Ring> open(unsigned depth, std::string& why);
  ~Ring();
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // At most `depth` may be under way. `row` must stay where it is until the answer.
  void transfer(uint64_t token, int fd, bool write, const iovec& row, uint64_t offset);
  // Answers once when `fd` is readable.
  void watch(uint64_t token, int fd);

  // Hands all that was queued to the kernel and waits for an answer.
  void enter();
  // The next answer: bytes or a negative error; false: none is there.
  bool next(uint64_t& token, int& result);

 private:
  Ring() = default;
  io_uring_sqe& entry(uint64_t token);

  Fd fd_;
  void* rings_ = nullptr;   // both, in one mapping
  size_t rings_bytes_ = 0;
  io_uring_sqe* entries_ = nullptr;
  size_t entries_bytes_ = 0;
  unsigned* tail_ = nullptr;            // of what we ask; ours to write
  unsigned* order_ = nullptr;
  unsigned mask_ = 0;
  unsigned* answers_head_ = nullptr;    // ours to write
  unsigned* answers_tail_ = nullptr;    // the kernel's
  unsigned answers_mask_ = 0;
  io_uring_cqe* answers_ = nullptr;
  unsigned queued_ = 0;        // written, and not shown to the kernel
  unsigned shown_ = 0;         // shown, and not taken by it yet
};

}  // namespace tent
