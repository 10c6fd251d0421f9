// The C ABI of the library: a version, what this CPU can run, and kernels by name and instruction set.
#include <cstring>

#include "kernel_table.h"

#define KIMI_API extern "C" __attribute__((visibility("default")))

// Bounds of the section that KIMI_EXPORT fills (made by the linker).
extern "C" {
extern kimi::KernelEntry __start_kimi_kernel_table[] __attribute__((visibility("hidden")));
extern kimi::KernelEntry __stop_kimi_kernel_table[] __attribute__((visibility("hidden")));
}

namespace {

bool cpu_runs(const char* isa) {
  if (!std::strcmp(isa, "generic")) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!std::strcmp(isa, "avx2")) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("fma");
  if (!std::strcmp(isa, "avx512")) return avx512;
#if defined(KIMI_HAS_AVX512BF16)
  if (!std::strcmp(isa, "avx512bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#endif
  return false;
}

}  // namespace

// Raised whenever a kernel's C signature changes; the Python side refuses any other number.
KIMI_API int kimi_abi_version() { return 2; }

// Was the library built with kernels for `isa`?
KIMI_API int kimi_isa_built(const char* isa) {
  for (auto* e = __start_kimi_kernel_table; e != __stop_kimi_kernel_table; ++e) {
    if (!std::strcmp(e->isa, isa)) return 1;
  }
  return 0;
}

// Can this CPU run `isa`?
KIMI_API int kimi_isa_supported(const char* isa) { return cpu_runs(isa); }

// Address of kernel `name` for `isa`, or null.
KIMI_API void* kimi_kernel(const char* name, const char* isa) {
  for (auto* e = __start_kimi_kernel_table; e != __stop_kimi_kernel_table; ++e) {
    if (!std::strcmp(e->isa, isa) && !std::strcmp(e->name, name)) return e->function;
  }
  return nullptr;
}
