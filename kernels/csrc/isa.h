// One source, several instruction sets: every file in isa/ is compiled once per KIMI_ISA (generic, avx2, avx512, avx512bf16)
// and registers its entry points here. Nothing runs at load time; abi.cpp looks the table up by name.
#pragma once

#ifndef KIMI_ISA
#error "isa.h is for the files compiled once per instruction set: compile with -DKIMI_ISA=generic|avx2|avx512|avx512bf16"
#endif

#include "kernel_table.h"

#define KIMI_STRINGIZE_(x) #x
#define KIMI_STRINGIZE(x) KIMI_STRINGIZE_(x)

// KIMI_EXPORT(name): publish function `name` of namespace kimi::KIMI_ISA. A plain data record in a section of its own:
// a static constructor would be code built for an instruction set that this machine may lack.
#define KIMI_EXPORT(name)                                                                     \
  __attribute__((section("kimi_kernel_table"), used)) static ::kimi::KernelEntry entry_##name = \
      {#name, KIMI_STRINGIZE(KIMI_ISA), reinterpret_cast<void*>(&name)}
