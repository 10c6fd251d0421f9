// Per-thread working memory: taken piece by piece, given back all at once, kept between calls.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace kimi::KIMI_ISA {

class Scratch {
 public:
  // 64-byte aligned room for n floats, valid until reset(). Not initialised.
  float* floats(size_t n) {
    size_t need = (n + 15) / 16 * 16;
    while (block_ < blocks_.size() && used_ + need > blocks_[block_].size) {
      ++block_;
      used_ = 0;
    }
    if (block_ == blocks_.size()) {
      size_t size = need > kBlockFloats ? need : kBlockFloats;
      void* p = std::aligned_alloc(64, size * sizeof(float));
      if (p == nullptr) throw std::bad_alloc();
      blocks_.push_back({std::unique_ptr<float, Free>(static_cast<float*>(p)), size});
      used_ = 0;
    }
    float* p = blocks_[block_].data.get() + used_;
    used_ += need;
    return p;
  }
  void reset() { block_ = used_ = 0; }

 private:
  static constexpr size_t kBlockFloats = 1 << 18;  // 1 MiB: a forward task at the largest head fits in one block
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  struct Block {
    std::unique_ptr<float, Free> data;
    size_t size;
  };
  std::vector<Block> blocks_;
  size_t block_ = 0, used_ = 0;
};

// One per thread and instruction set.
inline Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace kimi::KIMI_ISA
