#include "slices/plan.h"

#include <algorithm>

#include "wire/frame.h"

namespace tent {

void Plan::add(const Piece& piece) {
  if (piece.length == 0) return;
  total_ += piece.length;
  if (!pieces_.empty()) {
    Piece& last = pieces_.back();
    if (last.slot == piece.slot && last.token == piece.token && last.hosted_here == piece.hosted_here &&
        last.hosted_there == piece.hosted_there && last.local + last.length == piece.local &&
        last.offset + last.length == piece.offset) {
      last.length += piece.length;
      return;
    }
  }
  pieces_.push_back(piece);
}

Cut Plan::cut(uint32_t wanted, uint32_t rows) {
  uint64_t target = std::clamp<uint64_t>(wanted, 1, MAX_SLICE);
  if (remaining() <= std::min<uint64_t>(target + target / 4, MAX_SLICE)) target = remaining();
  Cut slice{static_cast<uint32_t>(piece_), offset_, 0};
  for (uint32_t row = 0; row < rows && slice.bytes < target && piece_ < pieces_.size(); ++row) {
    const uint64_t length = std::min(pieces_[piece_].length - offset_, target - slice.bytes);
    slice.bytes += static_cast<uint32_t>(length);
    offset_ += length;
    if (offset_ == pieces_[piece_].length) ++piece_, offset_ = 0;
  }
  taken_ += slice.bytes;
  return slice;
}

void Plan::rewind() {
  taken_ = 0;
  piece_ = 0;
  offset_ = 0;
}

}  // namespace tent
