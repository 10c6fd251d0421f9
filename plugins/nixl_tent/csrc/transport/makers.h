#pragma once

#include <memory>

#include "transport/transport.h"

namespace tent {

std::unique_ptr<Transport> make_tcp();
std::unique_ptr<Transport> make_cma();

}  // namespace tent
