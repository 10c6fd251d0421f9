// An engine of another make that moves bytes between registered memory of two agents by itself: for memory that our
// links cannot reach, and as one more link for the rest.
//
// What was begun on it cannot be taken back, and when it fails nothing says whether bytes are still on their way. So
// whoever wants to move a slice elsewhere ends the engine first, on both sides.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/transfer.h"

namespace tent {

enum class MemoryKind : uint8_t { host = 0, device = 1 };

class Hosted {
 public:
  using Name = uint64_t;   // of something in it; 0: nothing

  enum class State { running, done, failed };

  // A run of bytes that is contiguous on both sides.
  struct Row {
    uint64_t here;
    uint64_t there;
    size_t bytes;
    Name local;
    Name remote;
  };

  virtual ~Hosted() = default;

  virtual const std::string& connection_info() const = 0;
  // Whether it took the peer. `peer` is a name for this life of it, never used for another.
  virtual bool load_peer(const std::string& peer, const std::string& info) = 0;

  virtual void unload_peer(const std::string& peer) = 0;

  // Memory of this side; `info` is what a peer needs of it. 0: it does not take this memory.
  virtual Name add_local(uint64_t address, size_t size, MemoryKind kind, uint64_t device, std::string& info) = 0;
  virtual Name add_remote(const std::string& peer, uint64_t address, size_t size, MemoryKind kind, uint64_t device,
                          const std::string& info) = 0;
  virtual void remove(Name memory) = 0;

  // Begins a transfer; 0: it could not, and nothing was begun.
  virtual Name post(Op op, const std::string& peer, const std::vector<Row>& rows) = 0;
  // After `done` or `failed` the name is gone, and this side's memory is not touched any more.
  virtual State check(Name posted) = 0;

  // Gives up everything. When it returns, nothing of this process's memory is read or written by it or through it any
  // more; every other function does nothing from then on. May take long.
  virtual void end() = 0;
};

}  // namespace tent
