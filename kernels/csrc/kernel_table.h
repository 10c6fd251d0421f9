// The record that publishes one compiled kernel: see isa.h (writes it) and abi.cpp (reads it).
#pragma once

namespace kimi {

// As large as it is aligned, so that the entries of a section form an array.
struct alignas(32) KernelEntry {
  const char* name;
  const char* isa;
  void* function;
};

}  // namespace kimi
