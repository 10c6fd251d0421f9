// A transfer as a list of pieces, cut into slices one at a time, when a link has room for one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tent {

// A run of bytes that is contiguous on both sides.
struct Piece {
  uint8_t* local = nullptr;
  uint64_t token = 0;     // of the remote region
  uint64_t offset = 0;    // into the remote region
  uint64_t length = 0;
  uint32_t slot = 0;      // of the remote region
  uint64_t hosted_here = 0;    // names in the hosted engine of both regions; 0: it does not know one of them
  uint64_t hosted_there = 0;
  uint64_t address = 0;        // of the remote bytes, there
};

// Where a slice begins and how much it covers; its rows are found again from the plan when they are needed.
struct Cut {
  uint32_t piece = 0;
  uint64_t offset = 0;    // into that piece
  uint32_t bytes = 0;
};

class Plan {
 public:
  // Adds a piece; one that continues the last on both sides makes it longer instead.
  void add(const Piece& piece);

  // The next slice: about `wanted` bytes, fewer where it would exceed `rows` rows. A rest of less than a
  // quarter of `wanted` is taken along. Must not be called when `remaining()` is 0.
  Cut cut(uint32_t wanted, uint32_t rows);

  // Calls visit(local, piece, remote offset, length) for every row of a slice.
  template <typename Visit>
  void rows(const Cut& cut, Visit visit) const {
    uint64_t offset = cut.offset;
    uint32_t left = cut.bytes;
    for (size_t i = cut.piece; left > 0; ++i, offset = 0) {
      const Piece& piece = pieces_[i];
      const auto length = static_cast<uint32_t>(piece.length - offset < left ? piece.length - offset : left);
      visit(piece.local + offset, piece, piece.offset + offset, length);
      left -= length;
    }
  }

  void rewind();
  uint64_t total() const { return total_; }
  uint64_t remaining() const { return total_ - taken_; }
  size_t size() const { return pieces_.size(); }

 private:
  std::vector<Piece> pieces_;
  uint64_t total_ = 0;
  uint64_t taken_ = 0;
  size_t piece_ = 0;
  uint64_t offset_ = 0;
};

}  // namespace tent
