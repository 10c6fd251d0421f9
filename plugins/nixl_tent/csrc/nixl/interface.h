// What a NIXL backend plugin must look like to NIXL 1.x: our own declaration, because neither the wheels nor any
// source distribution ship headers. Only order and layout matter; names are ours. Checked against 1.0.1 to 1.5.1.
// Where a later NIXL moves something, `self_test` in plugin.cpp refuses to start.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace nixl {

using Options = std::unordered_map<std::string, std::string>;

enum Memory : int { DRAM, VRAM, BLOCK, OBJECT, FILE };
enum Operation : int { READ, WRITE };
enum Result : int {
  IN_PROGRESS = 1,
  SUCCESS = 0,
  ERR_INVALID_PARAM = -2,
  ERR_BACKEND = -3,
  ERR_NOT_FOUND = -4,
  ERR_MISMATCH = -5,
  ERR_NOT_SUPPORTED = -9,
};

struct InitParameters {
  std::string agent;
  std::string type;
  Options* options;
  bool progress_thread;
  uint64_t progress_delay;
  int sync_mode;
  bool telemetry;
};
static_assert(offsetof(InitParameters, type) == 32 && offsetof(InitParameters, options) == 64 &&
              offsetof(InitParameters, telemetry) == 92);

// A descriptor, and one with a text behind it, as handed to registration.
struct Descriptor {
  uintptr_t address;
  size_t length;
  uint64_t device;
};
struct BlobDescriptor : Descriptor {
  std::string blob;
};
static_assert(sizeof(Descriptor) == 24 && sizeof(BlobDescriptor) == 56);

// Base of whatever the backend wants to remember of a region.
class Metadata {
 public:
  explicit Metadata(bool is_private) : is_private_(is_private) {}
  virtual ~Metadata() = default;

 protected:
  bool is_private_;
};
static_assert(sizeof(Metadata) == 16);

struct MetaDescriptor : Descriptor {
  Metadata* metadata;
};
static_assert(sizeof(MetaDescriptor) == 32);

// Base of the backend's handle of a transfer.
class Request {
 public:
  virtual ~Request() = default;
};

// NIXL makes these; we only read them, so the virtual functions (two destructors, resize, add, find) stay out.
template <typename T>
struct List {
  const void* const* table;
  Memory memory;
  std::vector<T> items;
};
using MetaList = List<MetaDescriptor>;
using RegisterList = List<BlobDescriptor>;
static_assert(sizeof(MetaList) == 40 && offsetof(MetaList, memory) == 8);

struct TransferOptions {
  std::string notification;
  bool has_notification;
  std::string custom;
};
static_assert(sizeof(TransferOptions) == 72 && offsetof(TransferOptions, custom) == 40);

using NotificationList = std::vector<std::pair<std::string, std::string>>;
using QueryAnswer = std::optional<Options>;

struct TelemetryEvent {
  char bytes[16];
};

// The data members are NIXL's: it reads type and options through functions compiled into itself.
class Engine {
 public:
  explicit Engine(const InitParameters& init)
      : type_(init.type), options_(*init.options), agent_(init.agent), telemetry_(init.telemetry) {}
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  virtual ~Engine() = default;

  virtual bool supports_remote() const = 0;
  virtual bool supports_local() const = 0;
  virtual bool supports_notifications() const = 0;
  virtual std::vector<Memory> memories() const = 0;
  virtual Result register_memory(const BlobDescriptor& memory, const Memory& kind, Metadata*& out) = 0;
  virtual Result deregister_memory(Metadata* metadata) = 0;
  virtual Result connect(const std::string& agent) = 0;
  virtual Result disconnect(const std::string& agent) = 0;
  virtual Result unload_metadata(Metadata* metadata) = 0;
  virtual Result prepare(const Operation& operation, const MetaList& local, const MetaList& remote,
                         const std::string& agent, Request*& handle, const TransferOptions* options) const = 0;
  virtual Result post(const Operation& operation, const MetaList& local, const MetaList& remote,
                      const std::string& agent, Request*& handle, const TransferOptions* options) const = 0;
  virtual Result check(Request* handle) const = 0;
  virtual Result release(Request* handle) const = 0;
  virtual Result remote_view(const void* list, void*& view, const TransferOptions* options) const = 0;
  virtual Result local_view(const void* list, void*& view, const TransferOptions* options) const = 0;
  virtual void release_view(void* view) const = 0;
  virtual Result public_data(const Metadata* metadata, std::string& out) const = 0;
  virtual Result connection_info(std::string& out) const = 0;
  virtual Result load_connection_info(const std::string& agent, const std::string& info) = 0;
  virtual Result load_remote(const BlobDescriptor& input, const Memory& kind, const std::string& agent,
                             Metadata*& out) = 0;
  virtual Result load_local(Metadata* input, Metadata*& out) = 0;
  virtual Result notifications(NotificationList& out) = 0;
  virtual Result notify(const std::string& agent, const std::string& message) const = 0;
  virtual Result query(const RegisterList& list, std::vector<QueryAnswer>& out) const = 0;
  virtual Result estimate(const Operation& operation, const MetaList& local, const MetaList& remote,
                          const std::string& agent, Request* const& handle, std::chrono::microseconds& duration,
                          std::chrono::microseconds& margin, int& method, const void* options) const = 0;

 private:
  std::string type_;
  Options options_;
  std::vector<TelemetryEvent> events_;
  std::mutex events_mutex_;

 protected:
  bool failed_ = false;
  const std::string agent_;
  const bool telemetry_;
};
static_assert(sizeof(Engine) == 208, "layout of NIXL's backend engine");

struct Plugin {
  int interface_version;   // 1
  Engine* (*create)(const InitParameters* init);
  void (*destroy)(Engine* engine);
  const char* (*name)();
  const char* (*version)();
  Options (*options)();
  std::vector<Memory> (*memories)();
};

}  // namespace nixl
