// Answers whoever connects to a socket file with a snapshot: `GET /metrics` in Prometheus' text format over HTTP,
// anything else as JSON.
#pragma once

#include <string>
#include <thread>

#include "transport/transport.h"

namespace tent {

class Engine;

class MetricsServer {
 public:
  // The file is <folder>/<pid>-<n>.sock, for the same user only. A folder that cannot be used is no error.
  MetricsServer(Engine& engine, const std::string& folder);
  ~MetricsServer();
  MetricsServer(const MetricsServer&) = delete;
  MetricsServer& operator=(const MetricsServer&) = delete;

 private:
  void run();
  void answer(int client);

  Engine& engine_;
  std::string path_;
  Fd listener_;
  Fd stop_;
  std::thread thread_;
};

}  // namespace tent
