// The record that publishes one compiled kernel: see isa.h (writes it) and abi.cpp (reads it).
#pragma once

namespace kimi {

struct KernelEntry {
  const char* name;
  const char* isa;
  void* function;
};

}  // namespace kimi
