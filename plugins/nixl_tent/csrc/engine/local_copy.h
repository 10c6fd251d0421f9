// Transfers inside one process: copies on a thread of their own, so that links are not held up.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "engine/transfer.h"

namespace tent {

class LocalCopier {
 public:
  LocalCopier() = default;
  ~LocalCopier();
  // Copies at once where it is quick; otherwise the status becomes `done` later. `finished` runs before that.
  void copy(Transfer& transfer, std::function<void()> finished);
  void cancel(Transfer& transfer);

 private:
  struct Job {
    Transfer* transfer;
    std::function<void()> finished;
  };
  void run();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  Transfer* current_ = nullptr;
  bool canceled_ = false;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace tent
