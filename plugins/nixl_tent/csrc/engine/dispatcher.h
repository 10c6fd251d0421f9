// Internal to the engine: what each kind of frame leads to, and constants that its files share.
#pragma once

#include "engine/engine.h"

namespace tent {

constexpr double HANDSHAKE_SECONDS = 10.0;   // generous: a starved or frozen peer is not an attacker

std::string shared_key(const std::string& secret, const std::string& key);
double first_rate(const Path& path);
void complain(const std::string& what);   // one line on standard error
// Copies from another process; false where the kernel does not allow it or the memory is not there.
bool pull(pid_t process, std::vector<iovec> into, std::string_view references);

class Engine::Dispatcher final : public FrameHandler {
 public:
  Dispatcher(Engine& engine, Connection& connection) : engine_(engine), connection_(connection) {}
  std::optional<std::string> on_header(Destination& destination) override;
  std::optional<std::string> on_payload() override;

 private:
  std::optional<std::string> handle();
  Engine& engine_;
  Connection& connection_;
};

}  // namespace tent
