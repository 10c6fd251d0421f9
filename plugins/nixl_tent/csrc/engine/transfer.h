// A transfer and its slices, as the initiator keeps them.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "slices/plan.h"

namespace tent {

enum class Op { read, write };

enum class Status : int {   // the numbers are NIXL's
  running = 1,
  done = 0,
  failed = -3,          // no progress within the bound, or the target's memory cannot be used
  refused = -6,         // the target does not let us there
  disconnected = -10,   // the target is gone
  canceled = -11,       // the deadline passed
};

enum class Priority : uint8_t { high = 0, normal = 1, low = 2 };
constexpr size_t PRIORITIES = 3;

struct Slice {
  Cut cut;
  bool done = false;
  uint8_t copies = 0;     // in flight
  bool waiting = false;   // in the queue of slices to send again
};

// A copy inside this process.
struct LocalCopy {
  uint8_t* to;
  const uint8_t* from;
  size_t bytes;
};

struct File;

// A run of bytes between this process and a file.
struct FilePiece {
  std::shared_ptr<const File> file;
  uint64_t offset;
  uint8_t* memory;
  uint64_t bytes;
};

struct Peer;

struct Transfer {
  // Set when it is prepared.
  Op op = Op::write;
  std::shared_ptr<Peer> peer;      // empty: local
  Plan plan;
  std::vector<LocalCopy> copies;   // local
  std::vector<FilePiece> files;    // local; then there are no copies. None is empty
  Priority priority = Priority::normal;
  double deadline_seconds = 0;     // after the post; 0: none
  bool hostable = false;           // the hosted engine knows all of its memory
  bool hosted_only = false;        // and nothing else reaches it

  // Read by any thread.
  std::atomic<Status> status{Status::done};

  // The engine's, under its lock, from post to the end.
  uint64_t id = 0;
  std::optional<std::string> notification;
  std::deque<Slice> slices;
  uint32_t finished = 0;           // slices
  bool repeated = false;           // some slice had two copies
  bool queued = false;             // in its peer's queue
  bool awaiting_end = false;       // the notification is not acknowledged yet
  uint32_t hosted = 0;             // slices under way in the hosted engine, or waiting for its end
  bool unseen = false;         // the target does not know of some slices: it is told of the end by a frame
  std::optional<Status> verdict;   // how it ends once no slice is under way in the hosted engine
  double posted = 0;
  double deadline = 0;             // absolute; 0: none
  double last_progress = 0;
  double last_service = 0;         // when it last got a slice
};

}  // namespace tent
