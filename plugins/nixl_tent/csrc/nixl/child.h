// NIXL's own UCX backend, hosted: loaded from the same installation, through the same interface that NIXL uses.
#pragma once

#include <memory>
#include <string>

#include "engine/hosted.h"

namespace tent {

// Throws std::runtime_error with the reason where there is none that works: it must be the one of this NIXL, have the
// functions of interface.h, and move bytes inside this process before anything is trusted to it.
std::unique_ptr<Hosted> host_ucx(const std::string& agent);

// Whether a GPU is here that NVIDIA's driver serves.
bool has_gpu();

// NIXL's table of functions of descriptor lists in this process; null: no library exports it. `bytes` is its size.
const void* list_table(size_t& bytes);
constexpr size_t LIST_TABLE_BYTES = 7 * sizeof(void*);   // two words, two destructors, three functions

}  // namespace tent
