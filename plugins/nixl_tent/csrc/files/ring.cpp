#include "files/ring.h"

#include <linux/io_uring.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

namespace tent {
namespace {

template <typename T>
T* at(void* base, size_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(base) + offset);
}

unsigned load(unsigned* shared) { return std::atomic_ref(*shared).load(std::memory_order_acquire); }
void store(unsigned* shared, unsigned value) { std::atomic_ref(*shared).store(value, std::memory_order_release); }

}  // namespace

std::unique_ptr<Ring> Ring::open(unsigned depth, std::string& why) {
  io_uring_params parameters{};
  std::unique_ptr<Ring> ring(new Ring());
  ring->fd_ = Fd(static_cast<int>(syscall(SYS_io_uring_setup, depth, &parameters)));
  if (!ring->fd_) {
    why = std::strerror(errno);
    return nullptr;
  }
  if ((parameters.features & IORING_FEAT_SINGLE_MMAP) == 0) {
    why = "this kernel's is too old";
    return nullptr;
  }
  const auto& ask = parameters.sq_off;
  const auto& answer = parameters.cq_off;
  ring->rings_bytes_ = std::max(ask.array + parameters.sq_entries * sizeof(unsigned),
                                answer.cqes + parameters.cq_entries * sizeof(io_uring_cqe));
  ring->entries_bytes_ = parameters.sq_entries * sizeof(io_uring_sqe);
  const auto map = [&](size_t bytes, off_t what) {
    void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd_.get(), what);
    return mapped == MAP_FAILED ? nullptr : mapped;
  };
  ring->rings_ = map(ring->rings_bytes_, IORING_OFF_SQ_RING);
  ring->entries_ = static_cast<io_uring_sqe*>(map(ring->entries_bytes_, IORING_OFF_SQES));
  if (ring->rings_ == nullptr || ring->entries_ == nullptr) {
    why = std::strerror(errno);
    return nullptr;
  }
  ring->tail_ = at<unsigned>(ring->rings_, ask.tail);
  ring->order_ = at<unsigned>(ring->rings_, ask.array);
  ring->mask_ = *at<unsigned>(ring->rings_, ask.ring_mask);
  ring->answers_head_ = at<unsigned>(ring->rings_, answer.head);
  ring->answers_tail_ = at<unsigned>(ring->rings_, answer.tail);
  ring->answers_mask_ = *at<unsigned>(ring->rings_, answer.ring_mask);
  ring->answers_ = at<io_uring_cqe>(ring->rings_, answer.cqes);
  return ring;
}

Ring::~Ring() {
  if (entries_ != nullptr) munmap(entries_, entries_bytes_);
  if (rings_ != nullptr) munmap(rings_, rings_bytes_);
}

io_uring_sqe& Ring::entry(uint64_t token) {
  const unsigned tail = *tail_ + queued_++;
  io_uring_sqe& entry = entries_[tail & mask_];
  std::memset(&entry, 0, sizeof entry);
  entry.user_data = token;
  order_[tail & mask_] = tail & mask_;
  return entry;
}

void Ring::transfer(uint64_t token, int fd, bool write, const iovec& row, uint64_t offset) {
  io_uring_sqe& ask = entry(token);
  ask.opcode = write ? IORING_OP_WRITEV : IORING_OP_READV;   // older kernels know no other
  ask.fd = fd;
  ask.off = offset;
  ask.addr = reinterpret_cast<uint64_t>(&row);
  ask.len = 1;
}

void Ring::watch(uint64_t token, int fd) {
  io_uring_sqe& ask = entry(token);
  ask.opcode = IORING_OP_POLL_ADD;
  ask.fd = fd;
  ask.poll_events = POLLIN;
}

void Ring::enter() {
  store(tail_, *tail_ + queued_);
  shown_ += std::exchange(queued_, 0);
  const long taken = syscall(SYS_io_uring_enter, fd_.get(), shown_, 1u, IORING_ENTER_GETEVENTS, nullptr, 0);
  if (taken >= 0) shown_ -= static_cast<unsigned>(taken);
  else if (errno != EINTR && errno != EBUSY) usleep(1000);   // out of memory: it may pass
}

bool Ring::next(uint64_t& token, int& result) {
  const unsigned head = *answers_head_;
  if (head == load(answers_tail_)) return false;
  const io_uring_cqe& answer = answers_[head & answers_mask_];
  token = answer.user_data;
  result = answer.res;
  store(answers_head_, head + 1);
  return true;
}

}  // namespace tent
