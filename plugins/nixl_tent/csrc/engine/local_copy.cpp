#include "engine/local_copy.h"

#include <algorithm>
#include <cstring>

namespace tent {
namespace {

constexpr size_t INLINE_BYTES = 256 << 10;   // about what handing it to a thread would cost
constexpr size_t STEP = 1 << 20;             // bytes between two looks at whether it was canceled

}  // namespace

LocalCopier::~LocalCopier() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void LocalCopier::copy(Transfer& transfer, std::function<void()> finished) {
  size_t total = 0;
  for (const LocalCopy& copy : transfer.copies) total += copy.bytes;
  if (total <= INLINE_BYTES) {
    for (const LocalCopy& copy : transfer.copies) std::memmove(copy.to, copy.from, copy.bytes);
    finished();
    transfer.status = Status::done;
    return;
  }
  const std::lock_guard lock(mutex_);
  if (!thread_.joinable()) thread_ = std::thread([this] { run(); });
  jobs_.push_back({&transfer, std::move(finished)});
  changed_.notify_all();
}

void LocalCopier::cancel(Transfer& transfer) {
  std::unique_lock lock(mutex_);
  std::erase_if(jobs_, [&](const Job& job) { return job.transfer == &transfer; });
  if (current_ != &transfer) return;
  canceled_ = true;
  changed_.wait(lock, [&] { return current_ != &transfer; });
}

void LocalCopier::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return stopping_ || !jobs_.empty(); });
    if (stopping_) return;
    const Job job = std::move(jobs_.front());
    jobs_.pop_front();
    current_ = job.transfer;
    canceled_ = false;
    for (const LocalCopy& copy : job.transfer->copies)
      for (size_t at = 0; at < copy.bytes && !canceled_ && !stopping_; at += STEP) {
        lock.unlock();
        std::memmove(copy.to + at, copy.from + at, std::min(STEP, copy.bytes - at));
        lock.lock();
      }
    if (!canceled_ && !stopping_) {
      job.finished();
      job.transfer->status = Status::done;
    }
    current_ = nullptr;
    changed_.notify_all();
  }
}

}  // namespace tent
