// Transfers between this process's memory and files: by io_uring, or by a few threads where that is not permitted.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "config/config.h"
#include "files/book.h"
#include "files/ring.h"

namespace tent {

struct FileReport {
  std::string method;        // "io_uring" or "threads"; empty: not used yet
  uint64_t done = 0;         // transfers
  uint64_t failed = 0;
  uint64_t bytes_read = 0;
  uint64_t bytes_written = 0;
  std::string trouble;       // of the last that failed
};

class FileIo {
 public:
  using Say = void (*)(const std::string&);

  // Nothing is started before the first transfer. Throws std::invalid_argument where `method` is io_uring and this
  // process may not use it.
  FileIo(FileMethod method, Say say);
  ~FileIo();

  // The status becomes `done` when every byte is through, and `failed` when an error or the end of a file was met and
  // nothing is under way any more. `finished` runs before it becomes `done`.
  void start(Transfer& transfer, std::function<void()> finished);
  // After this the transfer's memory is not touched any more.
  void cancel(Transfer& transfer);
  FileReport report();

 private:
  void begin();
  void wake();
  void run_ring();
  void run_thread();
  void settle();
  void answered(const FileChunk& chunk, ssize_t result);

  FileMethod method_;
  const Say say_;
  std::unique_ptr<Ring> ring_;
  Fd wakeup_;
  std::mutex mutex_;   // everything from here on
  std::condition_variable changed_;
  FileBook book_;
  FileReport report_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace tent
