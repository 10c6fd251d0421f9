// What NIXL finds in this library.
#pragma once

#include "nixl/interface.h"

extern "C" __attribute__((visibility("default"))) nixl::Plugin* nixl_plugin_init();
