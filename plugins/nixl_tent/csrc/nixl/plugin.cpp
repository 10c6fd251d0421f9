// NIXL's view of the engine: translation only.
#include <sys/stat.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <sstream>
#include <mutex>
#include <stdexcept>
#include <unordered_set>

#include "engine/engine.h"
#include "nixl/child.h"
#include "nixl/interface.h"
#include "nixl/plugin.h"

namespace {

constexpr const char* NAME = "TENT";

void say(const std::string& what) { std::fprintf(stderr, "TENT: %s\n", what.c_str()); }

// Which list a piece of metadata may stand in is known by the list's kind of memory.
struct LocalMetadata final : nixl::Metadata {
  explicit LocalMetadata(tent::Region* r) : Metadata(true), region(r) {}
  tent::Region* region;
};

struct FileMetadata final : nixl::Metadata {
  FileMetadata(std::shared_ptr<const tent::File> f, std::optional<uint64_t> d)
      : Metadata(true), file(std::move(f)), named_as(d) {}
  std::shared_ptr<const tent::File> file;
  std::optional<uint64_t> named_as;   // the devId of a file that was named by path
};

struct RemoteMetadata final : nixl::Metadata {
  RemoteMetadata(const tent::RegionInfo& i, tent::Hosted::Name h) : Metadata(false), info(i), hosted(h) {}
  tent::RegionInfo info;
  tent::Hosted::Name hosted;
};

// What an agent publishes of its files, which only itself may use: NIXL wants a text for each.
constexpr const char* FILE_INFO = "TENTf";

struct Handle final : nixl::Request {
  std::unique_ptr<tent::Transfer> transfer;
};

// Refuses to work with a NIXL whose structures are not those of interface.h, before anything is read from them that
// could be wrong: a text where the type must be, sane flags, a map that answers.
void self_test(const nixl::InitParameters& init) {
  const auto fail = [](const std::string& what) {
    throw std::runtime_error("this NIXL does not fit this plugin (" + what +
                             "): it works with 1.0 to 1.5; run `kimi-stack tent doctor`");
  };
  // A std::string holds a pointer and a length; one in the wrong place shows in the length already.
  size_t type_length = 0;
  std::memcpy(&type_length, reinterpret_cast<const char*>(&init.type) + sizeof(void*), sizeof type_length);
  if (type_length != std::strlen(NAME) || init.type != NAME) fail("the backend's type is not where it must be");
  if (init.options == nullptr || init.options->size() > 4096) fail("the options are not where they must be");
  size_t table_bytes = 0;
  if (tent::list_table(table_bytes) != nullptr && table_bytes != 0 && table_bytes != tent::LIST_TABLE_BYTES)
    fail("descriptor lists have other functions");
}

tent::Priority priority_of(const std::string& name) {
  if (name == "high") return tent::Priority::high;
  if (name == "normal") return tent::Priority::normal;
  if (name == "low") return tent::Priority::low;
  throw std::invalid_argument("priority must be high, normal or low, got '" + name + "'");
}

// NIXL's free text of a transfer: "priority=low deadline_ms=50".
void apply_custom(const std::string& text, tent::Transfer& transfer) {
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    const std::string name = word.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : word.substr(equals + 1);
    if (name == "priority") {
      transfer.priority = priority_of(value);
    } else if (name == "deadline_ms") {
      char* end = nullptr;
      transfer.deadline_seconds = std::strtod(value.c_str(), &end) * 1e-3;
      if (value.empty() || *end != 0 || !(transfer.deadline_seconds > 0))
        throw std::invalid_argument("deadline_ms must be a positive number, got '" + value + "'");
    } else {
      throw std::invalid_argument("unknown transfer parameter '" + word + "'; known: priority=, deadline_ms=");
    }
  }
}

nixl::Result result_of(tent::Status status) { return static_cast<nixl::Result>(status); }

class Backend final : public nixl::Engine {
 public:
  explicit Backend(const nixl::InitParameters& init)
      : Backend(init, tent::read_config(*init.options)) {}

  bool supports_remote() const override { return true; }
  bool supports_local() const override { return true; }
  bool supports_notifications() const override { return true; }
  std::vector<nixl::Memory> memories() const override {
    if (engine_.hosts()) return {nixl::DRAM, nixl::FILE, nixl::VRAM};
    return {nixl::DRAM, nixl::FILE};
  }

  nixl::Result register_memory(const nixl::BlobDescriptor& memory, const nixl::Memory& kind,
                               nixl::Metadata*& out) override {
    if (kind == nixl::FILE) return register_file(memory, out);
    if (kind != nixl::DRAM && kind != nixl::VRAM) return nixl::ERR_NOT_SUPPORTED;
    tent::Region* region = engine_.add_region(reinterpret_cast<void*>(memory.address), memory.length, kind_of(kind), memory.device);
    if (region == nullptr) return nixl::ERR_NOT_SUPPORTED;
    out = new LocalMetadata(region);
    return nixl::SUCCESS;
  }

  nixl::Result deregister_memory(nixl::Metadata* metadata) override {
    const std::unique_ptr<nixl::Metadata> owned(metadata);
    if (const auto* local = dynamic_cast<LocalMetadata*>(metadata)) {
      engine_.remove_region(local->region);
    } else if (const auto* file = dynamic_cast<FileMetadata*>(metadata); file != nullptr && file->named_as) {
      const std::lock_guard lock(mutex_);
      named_files_.erase(*file->named_as);
    }
    return nixl::SUCCESS;
  }

  nixl::Result connect(const std::string& agent) override {
    return engine_.connect(agent) ? nixl::SUCCESS : nixl::ERR_NOT_FOUND;
  }

  nixl::Result disconnect(const std::string& agent) override {
    engine_.disconnect(agent);
    return nixl::SUCCESS;
  }

  nixl::Result unload_metadata(nixl::Metadata* metadata) override {
    // `load_local` hands out the region's own metadata, which an agent that closes may have deregistered already:
    // what is not in our book must not even be looked at.
    const std::lock_guard lock(mutex_);
    if (remote_.erase(metadata) > 0) {
      const std::unique_ptr<RemoteMetadata> ours(static_cast<RemoteMetadata*>(metadata));
      engine_.unload_region(ours->hosted);
    }
    return nixl::SUCCESS;
  }

  nixl::Result prepare(const nixl::Operation& operation, const nixl::MetaList& local, const nixl::MetaList& remote,
                       const std::string& agent, nixl::Request*& handle,
                       const nixl::TransferOptions* options) const override try {
    if (local.items.size() != remote.items.size()) return nixl::ERR_INVALID_PARAM;
    auto transfer = engine_.prepare(operation == nixl::WRITE ? tent::Op::write : tent::Op::read, agent);
    if (transfer == nullptr) return nixl::ERR_NOT_FOUND;
    if (options != nullptr) apply_custom(options->custom, *transfer);
    const bool on_device = local.memory == nixl::VRAM || remote.memory == nixl::VRAM;
    if (local.memory != nixl::DRAM && !on_device)
      throw std::invalid_argument("the local side of a transfer must be DRAM or VRAM");
    if (on_device && (transfer->peer == nullptr || remote.memory == nixl::FILE))
      throw std::invalid_argument("VRAM moves between two agents only, not inside one and not to files");
    transfer->hosted_only = on_device;
    transfer->hostable = true;
    if (remote.memory == nixl::FILE && transfer->peer != nullptr)
      throw std::invalid_argument("files of agent '" + agent + "' can only be used by that agent itself");
    for (size_t i = 0; i < local.items.size(); ++i) {
      if (remote.memory == nixl::FILE) add_file(*transfer, local.items[i], remote.items[i]);
      else if (!add(*transfer, local.items[i], remote.items[i])) return nixl::ERR_MISMATCH;
    }
    if (transfer->hosted_only && !transfer->hostable)
      throw std::invalid_argument("VRAM needs NIXL's UCX on both sides (option ucx): agent '" + agent + "' or this one has none");
    auto made = std::make_unique<Handle>();
    made->transfer = std::move(transfer);
    handle = made.release();
    return nixl::SUCCESS;
  } catch (const std::invalid_argument& error) {
    say(error.what());
    return nixl::ERR_INVALID_PARAM;
  }

  nixl::Result post(const nixl::Operation&, const nixl::MetaList&, const nixl::MetaList&, const std::string&,
                    nixl::Request*& handle, const nixl::TransferOptions* options) const override {
    tent::Transfer& transfer = *static_cast<Handle*>(handle)->transfer;
    std::optional<std::string> notification;
    if (options != nullptr && options->has_notification) {
      if (options->notification.size() > tent::MAX_NOTIFICATION) return nixl::ERR_INVALID_PARAM;
      notification = options->notification;
    }
    engine_.post(transfer, std::move(notification));
    return result_of(transfer.status);
  }

  nixl::Result check(nixl::Request* handle) const override {
    const tent::Transfer& transfer = *static_cast<Handle*>(handle)->transfer;
    engine_.hurry(transfer);
    return result_of(transfer.status.load(std::memory_order_acquire));
  }

  nixl::Result release(nixl::Request* handle) const override {
    const std::unique_ptr<Handle> owned(static_cast<Handle*>(handle));
    engine_.release(*owned->transfer);
    return nixl::SUCCESS;
  }

  nixl::Result remote_view(const void*, void*&, const nixl::TransferOptions*) const override {
    return nixl::ERR_NOT_SUPPORTED;
  }
  nixl::Result local_view(const void*, void*&, const nixl::TransferOptions*) const override {
    return nixl::ERR_NOT_SUPPORTED;
  }
  void release_view(void*) const override {}

  nixl::Result public_data(const nixl::Metadata* metadata, std::string& out) const override {
    const auto* local = dynamic_cast<const LocalMetadata*>(metadata);
    out = local == nullptr ? FILE_INFO : tent::encode(tent::Engine::describe_region(*local->region));
    return nixl::SUCCESS;
  }

  nixl::Result connection_info(std::string& out) const override {
    out = engine_.connection_info();
    return nixl::SUCCESS;
  }

  nixl::Result load_connection_info(const std::string& agent, const std::string& info) override try {
    engine_.load_peer(agent, info);
    return nixl::SUCCESS;
  } catch (const std::invalid_argument& error) {
    say("metadata of agent '" + agent + "': " + error.what());
    return nixl::ERR_MISMATCH;
  }

  nixl::Result load_remote(const nixl::BlobDescriptor& input, const nixl::Memory& kind, const std::string& agent,
                           nixl::Metadata*& out) override try {
    if (kind != nixl::DRAM && kind != nixl::VRAM && kind != nixl::FILE) return nixl::ERR_NOT_SUPPORTED;
    tent::RegionInfo info;
    if (kind != nixl::FILE) {
      info = tent::decode_region(input.blob);
      if (info.address != input.address || info.length != input.length || info.kind != static_cast<uint8_t>(kind_of(kind)))
        throw std::invalid_argument("region info does not belong to its descriptor");
    }
    out = new RemoteMetadata(info, engine_.load_region(agent, info));
    const std::lock_guard lock(mutex_);
    remote_.insert(out);
    return nixl::SUCCESS;
  } catch (const std::invalid_argument& error) {
    say("metadata of agent '" + agent + "': " + error.what());
    return nixl::ERR_MISMATCH;
  }

  nixl::Result load_local(nixl::Metadata* input, nixl::Metadata*& out) override {
    out = input;
    return nixl::SUCCESS;
  }

  nixl::Result notifications(nixl::NotificationList& out) override {
    if (!out.empty()) return nixl::ERR_INVALID_PARAM;
    out = engine_.take_notifications();
    return nixl::SUCCESS;
  }

  nixl::Result notify(const std::string& agent, const std::string& message) const override {
    if (message.size() > tent::MAX_NOTIFICATION - sizeof(uint64_t)) return nixl::ERR_INVALID_PARAM;
    return engine_.notify(agent, message) ? nixl::SUCCESS : nixl::ERR_NOT_FOUND;
  }

  // As NIXL's file backends answer: a path is in the descriptor's text, with or without a mode before it.
  nixl::Result query(const nixl::RegisterList& list, std::vector<nixl::QueryAnswer>& out) const override {
    if (list.memory != nixl::FILE) return nixl::ERR_NOT_SUPPORTED;
    out.clear();
    for (const nixl::BlobDescriptor& asked : list.items) {
      const auto named = tent::parse_file_name(asked.blob);
      struct stat found {};
      if (stat((named ? named->path : asked.blob).c_str(), &found) != 0) {
        out.emplace_back(std::nullopt);
        continue;
      }
      out.emplace_back(nixl::Options{{"size", std::to_string(found.st_size)},
                                     {"mode", std::to_string(found.st_mode)},
                                     {"mtime", std::to_string(found.st_mtime)}});
    }
    return nixl::SUCCESS;
  }

  nixl::Result estimate(const nixl::Operation&, const nixl::MetaList&, const nixl::MetaList&, const std::string&,
                        nixl::Request* const&, std::chrono::microseconds&, std::chrono::microseconds&, int&,
                        const void*) const override {
    return nixl::ERR_NOT_SUPPORTED;
  }

 private:
  Backend(const nixl::InitParameters& init, const tent::Config& config)
      : Engine(init), engine_(config, init.agent, tent::Drive::threaded, hosted_for(config, init.agent)) {}

  static std::unique_ptr<tent::Hosted> hosted_for(const tent::Config& config, const std::string& agent) {
    if (config.ucx == tent::Ucx::off || (config.ucx == tent::Ucx::automatic && !tent::has_gpu())) return nullptr;
    try {
      return tent::host_ucx(agent);
    } catch (const std::runtime_error& error) {
      if (config.ucx == tent::Ucx::on)
        throw std::runtime_error(std::string("option ucx: NIXL's UCX cannot be hosted here: ") + error.what());
      say(std::string("VRAM is not supported here, because NIXL's UCX cannot be hosted: ") + error.what());
      return nullptr;
    }
  }

  static tent::MemoryKind kind_of(nixl::Memory memory) {
    return memory == nixl::VRAM ? tent::MemoryKind::device : tent::MemoryKind::host;
  }

  static bool inside(uintptr_t address, size_t length, uintptr_t begin, size_t size) {
    return address >= begin && length <= size && address - begin <= size - length;
  }

  static bool inside(const nixl::MetaDescriptor& here, const tent::Region& region) {
    return inside(here.address, here.length, reinterpret_cast<uintptr_t>(region.begin), region.size);
  }

  nixl::Result register_file(const nixl::BlobDescriptor& memory, nixl::Metadata*& out) try {
    auto file = tent::open_file(memory.device, memory.blob, memory.address, memory.length);
    // NIXL finds a registered file by its devId: two that are named by path must not share one.
    std::optional<uint64_t> named_as;
    if (const std::lock_guard lock(mutex_); tent::parse_file_name(memory.blob)) {
      named_as = memory.device;
      const auto [known, fresh] = named_files_.try_emplace(memory.device, file->name);
      if (!fresh)
        throw std::invalid_argument("devId " + std::to_string(memory.device) + " is that of file " + known->second +
                                    " already: give file " + file->name + " another");
    }
    out = new FileMetadata(std::move(file), named_as);
    return nixl::SUCCESS;
  } catch (const std::invalid_argument& error) {
    say(error.what());
    return nixl::ERR_INVALID_PARAM;
  }

  static void add_file(tent::Transfer& transfer, const nixl::MetaDescriptor& here, const nixl::MetaDescriptor& there) {
    const auto* local = dynamic_cast<const LocalMetadata*>(here.metadata);
    const auto* target = dynamic_cast<const FileMetadata*>(there.metadata);
    if (local == nullptr || target == nullptr || here.length != there.length || !inside(here, *local->region))
      throw std::invalid_argument("memory and file of a transfer must be registered, and equally long");
    const tent::File& file = *target->file;
    if (!file.holds(there.address, there.length))
      throw std::invalid_argument(std::to_string(there.length) + " bytes at " + std::to_string(there.address) +
                                  " lie outside of what was registered of file " + file.name);
    if (!(transfer.op == tent::Op::write ? file.writable : file.readable))
      throw std::invalid_argument("file " + file.name + " is not open for " +
                                  (transfer.op == tent::Op::write ? "writing" : "reading"));
    if (here.length > 0)
      transfer.files.push_back({target->file, there.address, reinterpret_cast<uint8_t*>(here.address), here.length});
  }

  // Both ranges must lie in registered regions; the target checks its own again.
  static bool add(tent::Transfer& transfer, const nixl::MetaDescriptor& here, const nixl::MetaDescriptor& there) {
    if (here.length != there.length || here.metadata == nullptr || there.metadata == nullptr) return false;
    auto* local = reinterpret_cast<uint8_t*>(here.address);
    const tent::Region& region = *static_cast<const LocalMetadata*>(here.metadata)->region;
    if (!inside(here, region)) return false;
    if (transfer.peer == nullptr) {
      const tent::Region& other = *static_cast<const LocalMetadata*>(there.metadata)->region;
      if (!inside(there, other)) return false;
      auto* target = reinterpret_cast<uint8_t*>(there.address);
      if (transfer.op == tent::Op::write) transfer.copies.push_back({target, local, here.length});
      else transfer.copies.push_back({local, target, here.length});
      return true;
    }
    const tent::RegionInfo& info = static_cast<const RemoteMetadata*>(there.metadata)->info;
    if (!inside(there.address, there.length, info.address, info.length)) return false;
    const tent::Hosted::Name hosted = static_cast<const RemoteMetadata*>(there.metadata)->hosted;
    transfer.plan.add({local, info.token, there.address - info.address, there.length, info.slot, region.hosted, hosted,
                       there.address});
    transfer.hostable = transfer.hostable && region.hosted != 0 && hosted != 0;
    return true;
  }

  std::mutex mutex_;
  std::unordered_set<nixl::Metadata*> remote_;
  std::unordered_map<uint64_t, std::string> named_files_;   // by devId
  // NIXL's interface has const functions that change the engine.
  mutable tent::Engine engine_;
};

nixl::Engine* create(const nixl::InitParameters* init) {
  try {
    self_test(*init);
    return new Backend(*init);
  } catch (const std::exception& error) {
    say(error.what());
    return nullptr;
  }
}

void destroy(nixl::Engine* engine) { delete engine; }
const char* name() { return NAME; }
const char* version() { return TENT_VERSION; }

nixl::Options options() {
  nixl::Options all;
  for (const auto& [key, value] : tent::default_options()) all[key] = value;
  return all;
}

std::vector<nixl::Memory> memories() { return {nixl::DRAM, nixl::FILE}; }

}  // namespace

extern "C" {

nixl::Plugin* nixl_plugin_init() {
  static nixl::Plugin plugin{1, create, destroy, name, version, options, memories};
  return &plugin;
}

__attribute__((visibility("default"))) void nixl_plugin_fini() {}
}
