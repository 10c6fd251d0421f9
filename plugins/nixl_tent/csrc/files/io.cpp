#include "files/io.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <stdexcept>

#include "files/file.h"

namespace tent {
namespace {

constexpr unsigned DEPTH = 32;      // calls under way in a ring; all of them are waited for when one is canceled
constexpr size_t THREADS = 4;       // where there is no ring
constexpr uint64_t WAKEUP = DEPTH;  // the ring's name for the descriptor that wakes it

}  // namespace

FileIo::FileIo(FileMethod method, Say say) : method_(method), say_(say) {
  if (method_ != FileMethod::ring) return;
  std::string why;
  ring_ = Ring::open(DEPTH + 1, why);
  if (ring_ == nullptr)
    throw std::invalid_argument("option file_io: io_uring is not available here (" + why + "): use auto or threads");
}

FileIo::~FileIo() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    book_.cancel_all();
    settle();
  }
  wake();
  for (std::thread& thread : threads_) thread.join();
}

void FileIo::begin() {
  std::string why;
  if (method_ == FileMethod::automatic) ring_ = Ring::open(DEPTH + 1, why);
  if (ring_ != nullptr) {
    wakeup_ = Fd(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
    report_.method = "io_uring";
    threads_.emplace_back([this] { run_ring(); });
    return;
  }
  if (!why.empty()) say_("files are read and written by threads, because io_uring is not available here: " + why);
  report_.method = "threads";
  for (size_t i = 0; i < THREADS; ++i) threads_.emplace_back([this] { run_thread(); });
}

void FileIo::wake() {
  changed_.notify_all();
  if (!wakeup_) return;
  constexpr uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(wakeup_.get(), &one, sizeof one);
}

void FileIo::start(Transfer& transfer, std::function<void()> finished) {
  const std::lock_guard lock(mutex_);
  if (threads_.empty()) begin();
  book_.add(transfer, std::move(finished));
  wake();
}

void FileIo::cancel(Transfer& transfer) {
  std::unique_lock lock(mutex_);
  if (!book_.cancel(transfer)) return;
  settle();
  changed_.wait(lock, [&] { return !book_.holds(transfer); });
}

FileReport FileIo::report() {
  const std::lock_guard lock(mutex_);
  return report_;
}

void FileIo::answered(const FileChunk& chunk, ssize_t result) {
  if (result > 0) (chunk.write() ? report_.bytes_written : report_.bytes_read) += static_cast<uint64_t>(result);
  book_.answered(chunk, result);
}

void FileIo::settle() {
  bool any = false;
  while (const auto job = book_.take_finished()) {
    any = true;
    Status status = Status::canceled;
    if (!job->trouble.empty()) {
      ++report_.failed;
      report_.trouble = job->trouble;
      say_("transfer failed: " + job->trouble);
      status = Status::failed;
    } else if (!job->canceled) {
      ++report_.done;
      job->finished();
      status = Status::done;
    }
    job->transfer->status.store(status, std::memory_order_release);   // from here on it may be freed
  }
  if (any) changed_.notify_all();
}

void FileIo::run_ring() {
  struct Slot {
    FileChunk chunk;
    iovec row;
  };
  std::array<Slot, DEPTH> slots;
  std::vector<uint64_t> free;
  for (uint64_t i = 0; i < DEPTH; ++i) free.push_back(i);
  ring_->watch(WAKEUP, wakeup_.get());
  std::unique_lock lock(mutex_);
  while (true) {
    while (!free.empty()) {
      const auto chunk = book_.take();
      if (!chunk) break;
      const uint64_t token = free.back();
      free.pop_back();
      Slot& slot = slots[token];
      slot = {*chunk, {chunk->memory(), chunk->bytes}};
      ring_->transfer(token, chunk->piece->file->fd.get(), chunk->write(), slot.row, chunk->offset());
    }
    if (stopping_ && free.size() == DEPTH) return;
    lock.unlock();
    ring_->enter();
    lock.lock();
    uint64_t token = 0;
    for (int result = 0; ring_->next(token, result);) {
      if (token == WAKEUP) {
        uint64_t ignored = 0;
        [[maybe_unused]] const ssize_t got = ::read(wakeup_.get(), &ignored, sizeof ignored);
        ring_->watch(WAKEUP, wakeup_.get());
        continue;
      }
      answered(slots[token].chunk, result);
      free.push_back(token);
    }
    settle();
  }
}

void FileIo::run_thread() {
  std::unique_lock lock(mutex_);
  while (true) {
    const auto chunk = book_.take();
    if (!chunk) {
      if (stopping_) return;
      changed_.wait(lock);
      continue;
    }
    const int fd = chunk->piece->file->fd.get();
    const auto offset = static_cast<off_t>(chunk->offset());
    lock.unlock();
    const ssize_t got = chunk->write() ? pwrite(fd, chunk->memory(), chunk->bytes, offset)
                                       : pread(fd, chunk->memory(), chunk->bytes, offset);
    const ssize_t result = got < 0 ? -errno : got;
    lock.lock();
    answered(*chunk, result);
    settle();
  }
}

}  // namespace tent
