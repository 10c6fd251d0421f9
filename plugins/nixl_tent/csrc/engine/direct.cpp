#include "engine/direct.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>

#include "engine/dispatcher.h"

namespace tent {
namespace {

constexpr const char* NAME = "kimi-tent-regions";
constexpr int SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;   // who has mapped it need not fear SIGBUS
constexpr size_t ROWS_A_CALL = 256;
constexpr auto PATIENCE = std::chrono::seconds(1);   // before the user hears why a deregistration waits

DirectPage* map(int fd) {
  void* mapped = mmap(nullptr, sizeof(DirectPage), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  return mapped == MAP_FAILED ? nullptr : static_cast<DirectPage*>(mapped);
}

Fd open_process(pid_t process) { return Fd(static_cast<int>(syscall(SYS_pidfd_open, process, 0))); }

// Of a process, or what is at the other end of a stream as well. An error of poll itself counts.
bool has_ended(int process, int stream = -1) {
  std::array<pollfd, 2> looks{{{process, POLLIN, 0}, {stream, POLLRDHUP, 0}}};
  return poll(looks.data(), looks.size(), 0) != 0;
}

}  // namespace

DirectTable::DirectTable(std::string_view engine) {
  Fd fd(memfd_create(NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd || ftruncate(fd.get(), sizeof(DirectPage)) != 0 || fcntl(fd.get(), F_ADD_SEALS, SEALS) != 0) return;
  page_ = map(fd.get());
  if (page_ == nullptr) return;
  engine.copy(page_->engine.data(), page_->engine.size());
  fd_ = std::move(fd);
}

DirectTable::~DirectTable() {
  if (page_ != nullptr) munmap(page_, sizeof *page_);
}

void DirectTable::publish(uint32_t slot, uint64_t token, const void* begin, size_t size) {
  if (page_ == nullptr || slot >= DIRECT_REGIONS) return;
  DirectPage::Row& row = page_->rows[slot];
  row.begin = reinterpret_cast<uint64_t>(begin);
  row.size = size;
  row.token = token;
}

void DirectTable::retract(uint32_t slot) {
  if (page_ != nullptr && slot < DIRECT_REGIONS) page_->rows[slot].token = 0;
}

void DirectTable::retract_all() {
  if (page_ == nullptr) return;
  for (DirectPage::Row& row : page_->rows)
    if (row.token != 0) row.token = 0;
}

bool DirectTable::left(uint32_t cell) {
  Guest& guest = guests_[cell];
  std::atomic<uint32_t>& inside = page_->cells[cell].inside;
  if (inside != 0 && has_ended(guest.process.get())) inside = 0;
  return inside == 0;
}

void DirectTable::drain() {
  if (page_ == nullptr) return;
  const auto since = std::chrono::steady_clock::now();
  bool said = false;
  for (uint32_t cell = 0; cell < DIRECT_PEERS;) {
    {
      const std::lock_guard lock(mutex_);
      if (!guests_[cell].process || left(cell)) {
        ++cell;
        continue;
      }
    }
    if (!said && std::chrono::steady_clock::now() - since > PATIENCE) {
      said = true;
      complain("a process that is copying from or to this memory does not go on; its end, or its going on, is awaited");
    }
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

std::optional<uint32_t> DirectTable::admit(pid_t process) {
  if (page_ == nullptr) return std::nullopt;
  Fd opened = open_process(process);
  if (!opened) return std::nullopt;
  const std::lock_guard lock(mutex_);
  for (uint32_t cell = 0; cell < DIRECT_PEERS; ++cell) {
    Guest& guest = guests_[cell];
    if (guest.present || (guest.process && !left(cell))) continue;
    page_->cells[cell].inside = 0;
    guest.present = true;
    guest.process = std::move(opened);
    return cell;
  }
  return std::nullopt;
}

void DirectTable::dismiss(uint32_t cell) {
  const std::lock_guard lock(mutex_);
  guests_[cell].present = false;
  if (left(cell)) guests_[cell].process = Fd();
}

std::unique_ptr<DirectAccess> DirectAccess::open(pid_t process, int fd, uint32_t cell, std::string_view engine) {
  Fd alive = open_process(process);   // before the page is found by its number: then both are the same process's
  if (cell >= DIRECT_PEERS || !alive) return nullptr;
  const std::string path = "/proc/" + std::to_string(process) + "/fd/" + std::to_string(fd);
  // Looked at before it is opened: some kinds of files do something when they are.
  std::array<char, 64> target{};
  const ssize_t length = readlink(path.c_str(), target.data(), target.size());
  const std::string expected = std::string("/memfd:") + NAME;
  if (length <= 0 || !std::string_view(target.data(), static_cast<size_t>(length)).starts_with(expected)) return nullptr;
  const Fd opened(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK));
  struct stat found {};
  if (!opened || fstat(opened.get(), &found) != 0 || found.st_size != static_cast<off_t>(sizeof(DirectPage)) ||
      (fcntl(opened.get(), F_GET_SEALS) & SEALS) != SEALS)
    return nullptr;
  DirectPage* page = map(opened.get());
  if (page == nullptr) return nullptr;
  std::unique_ptr<DirectAccess> access(new DirectAccess(page, cell, process, std::move(alive)));
  if (std::string_view(page->engine.data(), page->engine.size()) != engine) return nullptr;
  return access;
}

DirectAccess::~DirectAccess() { munmap(page_, sizeof *page_); }

bool DirectAccess::copy(Op op, const Plan& plan, int stream) {
  std::atomic<uint32_t>& inside = page_->cells[cell_].inside;
  inside = 1;   // in one order with the target's store of 0 into a row: one of the two sees the other
  // The process's number may be another's once it has ended, its memory another program's once its sockets are closed.
  const bool copied = !has_ended(alive_.get(), stream) && copy_rows(op, plan);
  inside.store(0, std::memory_order_release);
  return copied;
}

bool DirectAccess::copy_rows(Op op, const Plan& plan) const {
  std::array<iovec, ROWS_A_CALL> here;
  std::array<iovec, ROWS_A_CALL> there;
  size_t count = 0;
  ssize_t bytes = 0;
  bool good = true;
  const auto flush = [&] {
    if (!good || count == 0) return;
    const auto call = op == Op::write ? process_vm_writev : process_vm_readv;
    good = call(process_, here.data(), count, there.data(), count, 0) == bytes;
    count = 0;
    bytes = 0;
  };
  plan.rows({0, 0, static_cast<uint32_t>(plan.total())},
            [&](uint8_t* local, const Piece& piece, uint64_t offset, uint32_t length) {
              if (!good) return;
              if (piece.slot >= DIRECT_REGIONS || piece.token == 0) {
                good = false;
                return;
              }
              const DirectPage::Row& row = page_->rows[piece.slot];
              good = row.token == piece.token && length <= row.size && offset <= row.size - length;
              if (!good) return;
              here[count] = {local, length};
              there[count++] = {reinterpret_cast<void*>(row.begin + offset), length};
              bytes += length;
              if (count == ROWS_A_CALL) flush();
            });
  flush();
  return good;
}

}  // namespace tent
