#include "transport/transport.h"

#include <unistd.h>

#include "transport/makers.h"

namespace tent {

Fd::~Fd() {
  if (fd_ >= 0) ::close(fd_);
}

pid_t Transport::process(int) const { return -1; }

std::vector<std::unique_ptr<Transport>> make_transports(const Config& config) {
  std::vector<std::unique_ptr<Transport>> all;
  all.push_back(make_tcp());
  if (config.cma) all.push_back(make_cma());
  return all;
}

}  // namespace tent
