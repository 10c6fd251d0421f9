// Small transfers on one host without the target's thread: the initiator copies into the target's memory itself, as
// far as the target's table of regions lets it. Whoever may do so is a process that the kernel lets at the other's memory
// anyway; the table is there so that what the target has taken back is not touched any more.
#pragma once

#include <sys/types.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>

#include "engine/transfer.h"
#include "transport/transport.h"

namespace tent {

constexpr uint32_t DIRECT_REGIONS = 4096;   // of later ones the target's thread takes care
constexpr uint32_t DIRECT_PEERS = 256;

// Shared by the target, which writes the rows, and its initiators, each of which writes its cell.
struct DirectPage {
  struct Row {
    std::atomic<uint64_t> token;   // 0: no region. Stored last and taken back first
    uint64_t begin;
    uint64_t size;
  };
  struct alignas(64) Cell {
    std::atomic<uint32_t> inside;   // the initiator is copying
  };
  std::array<char, 16> engine;
  std::array<Row, DIRECT_REGIONS> rows;
  std::array<Cell, DIRECT_PEERS> cells;
};
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

// The target's side. Where the kernel lacks what it needs, nothing is offered.
class DirectTable {
 public:
  explicit DirectTable(std::string_view engine);
  ~DirectTable();
  DirectTable(const DirectTable&) = delete;
  DirectTable& operator=(const DirectTable&) = delete;

  int fd() const { return fd_.get(); }
  void publish(uint32_t slot, uint64_t token, const void* begin, size_t size);
  // From now on nobody begins to copy from or to the region; `drain` waits for those who have begun.
  void retract(uint32_t slot);
  void retract_all();
  void drain();

  // A cell for the process; empty: none is left.
  std::optional<uint32_t> admit(pid_t process);
  void dismiss(uint32_t cell);

 private:
  struct Guest {
    bool present = false;
    Fd process;   // a pidfd; kept after the connection, until the cell is known to be left
  };
  bool left(uint32_t cell);   // with the lock

  Fd fd_;
  DirectPage* page_ = nullptr;
  std::mutex mutex_;
  std::array<Guest, DIRECT_PEERS> guests_;
};

// The initiator's side, of one connection.
class DirectAccess {
 public:
  // Null where the page is not there, or not what it has to be.
  static std::unique_ptr<DirectAccess> open(pid_t process, int fd, uint32_t cell, std::string_view engine);
  ~DirectAccess();
  DirectAccess(const DirectAccess&) = delete;
  DirectAccess& operator=(const DirectAccess&) = delete;

  // Copies the whole plan. False: some of it may not be touched, or the process is not at the other end of `stream`
  // any more; then frames find out which.
  bool copy(Op op, const Plan& plan, int stream);

 private:
  DirectAccess(DirectPage* page, uint32_t cell, pid_t process, Fd alive)
      : page_(page), cell_(cell), process_(process), alive_(std::move(alive)) {}
  bool copy_rows(Op op, const Plan& plan) const;

  DirectPage* page_;
  uint32_t cell_;
  pid_t process_;
  Fd alive_;   // a pidfd
};

}  // namespace tent
