#include "nixl/child.h"

#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <unordered_map>

#include "nixl/interface.h"
#include "nixl/plugin.h"
#include "wire/metadata.h"

namespace tent {
namespace {

constexpr const char* NAME = "UCX";
constexpr const char* FILE_NAME = "libplugin_UCX.so";
constexpr const char* ENGINE_TABLE = "_ZTV17nixlBackendEngine";
constexpr size_t ENGINE_TABLE_BYTES = 29 * sizeof(void*);   // two words and the functions of nixl::Engine
constexpr uint64_t PROGRESS_DELAY_US = 100;
constexpr size_t TEST_BYTES = 64 << 10;
constexpr auto TEST_TIME = std::chrono::seconds(10);

size_t symbol_bytes(const void* symbol) {
  Dl_info info{};
  const ElfW(Sym)* entry = nullptr;
  if (symbol == nullptr ||
      dladdr1(symbol, &info, reinterpret_cast<void**>(const_cast<ElfW(Sym)**>(&entry)), RTLD_DL_SYMENT) == 0 ||
      entry == nullptr)
    return 0;
  return entry->st_size;
}

std::string folder_of(const void* symbol) {
  Dl_info info{};
  if (symbol == nullptr || dladdr(symbol, &info) == 0 || info.dli_fname == nullptr) return "";
  const std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/'));
}

// Beside this plugin, or where the NIXL of this process keeps its own.
std::string find_library() {
  size_t ignored = 0;
  const std::string core = folder_of(list_table(ignored));
  for (const std::string& folder : {core + "/plugins", folder_of(reinterpret_cast<const void*>(&nixl_plugin_init))}) {
    const std::string path = folder + "/" + FILE_NAME;
    if (access(path.c_str(), R_OK) == 0) return path;
  }
  throw std::runtime_error(std::string(FILE_NAME) + " is not where this NIXL keeps its plugins");
}

nixl::Memory memory_of(MemoryKind kind) { return kind == MemoryKind::device ? nixl::VRAM : nixl::DRAM; }

class Child final : public Hosted {
 public:
  explicit Child(const std::string& agent) : agent_(agent) {
    size_t bytes = 0;
    const void* table = list_table(bytes);
    if (table == nullptr || bytes != LIST_TABLE_BYTES)
      throw std::runtime_error("this NIXL's descriptor lists have other functions than those known here");
    list_functions_ = static_cast<const void* const*>(table) + 2;
    const std::string path = find_library();
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (library == nullptr) throw std::runtime_error(dlerror());
    if (symbol_bytes(dlsym(library, ENGINE_TABLE)) != ENGINE_TABLE_BYTES)
      throw std::runtime_error(path + " has other functions than those known here");
    auto* begin = reinterpret_cast<nixl::Plugin* (*)()>(dlsym(library, "nixl_plugin_init"));
    plugin_ = begin == nullptr ? nullptr : begin();
    if (plugin_ == nullptr || plugin_->interface_version != 1 || std::strcmp(plugin_->name(), NAME) != 0)
      throw std::runtime_error(path + " is no " + NAME + " plugin of interface version 1");
    nixl::Options options = plugin_->options();
    const nixl::InitParameters init{agent_, NAME, &options, true, PROGRESS_DELAY_US, 1, false};
    engine_ = plugin_->create(&init);
    if (engine_ == nullptr) throw std::runtime_error(std::string(NAME) + " does not start here");
    try {
      self_test();
      if (engine_->connection_info(info_) != nixl::SUCCESS || info_.empty() || info_.size() > MAX_HOSTED)
        throw std::runtime_error("it does not say how it is reached");
    } catch (...) {
      end();
      throw;
    }
  }

  ~Child() override { end(); }

  const std::string& connection_info() const override { return info_; }

  bool load_peer(const std::string& peer, const std::string& info) override {
    const std::lock_guard lock(mutex_);
    if (engine_ == nullptr || engine_->load_connection_info(peer, info) != nixl::SUCCESS) return false;
    peers_.insert(peer);
    return engine_->connect(peer) >= 0;
  }

  void unload_peer(const std::string& peer) override {
    const std::lock_guard lock(mutex_);
    if (engine_ != nullptr && peers_.erase(peer) > 0) engine_->disconnect(peer);
  }

  Name add_local(uint64_t address, size_t size, MemoryKind kind, uint64_t device, std::string& info) override {
    const std::lock_guard lock(mutex_);
    if (engine_ == nullptr) return 0;
    nixl::BlobDescriptor memory;
    memory.address = address;
    memory.length = size;
    memory.device = device;
    nixl::Metadata* metadata = nullptr;
    if (engine_->register_memory(memory, memory_of(kind), metadata) != nixl::SUCCESS) return 0;
    if (engine_->public_data(metadata, info) != nixl::SUCCESS || info.empty() || info.size() > MAX_HOSTED) {
      info.clear();
      engine_->deregister_memory(metadata);
      return 0;
    }
    memories_[++last_name_] = {metadata, kind, device, true};
    return last_name_;
  }

  Name add_remote(const std::string& peer, uint64_t address, size_t size, MemoryKind kind, uint64_t device,
                  const std::string& info) override {
    const std::lock_guard lock(mutex_);
    if (engine_ == nullptr || !peers_.contains(peer)) return 0;
    nixl::BlobDescriptor memory;
    memory.address = address;
    memory.length = size;
    memory.device = device;
    memory.blob = info;
    nixl::Metadata* metadata = nullptr;
    if (engine_->load_remote(memory, memory_of(kind), peer, metadata) != nixl::SUCCESS) return 0;
    memories_[++last_name_] = {metadata, kind, device, false};
    return last_name_;
  }

  void remove(Name name) override {
    const std::lock_guard lock(mutex_);
    const auto found = memories_.find(name);
    if (found == memories_.end()) return;
    forget(found->second);
    memories_.erase(found);
  }

  Name post(Op op, const std::string& peer, const std::vector<Row>& rows) override {
    const std::lock_guard lock(mutex_);
    if (engine_ == nullptr || !peers_.contains(peer) || rows.empty()) return 0;
    auto posted = std::make_unique<Posted>();
    for (nixl::MetaList* list : {&posted->local, &posted->remote}) list->table = list_functions_;
    for (const Row& row : rows) {
      const auto local = memories_.find(row.local);
      const auto remote = memories_.find(row.remote);
      if (local == memories_.end() || remote == memories_.end()) return 0;
      posted->local.memory = memory_of(local->second.kind);
      posted->remote.memory = memory_of(remote->second.kind);
      posted->local.items.push_back({{row.here, row.bytes, local->second.device}, local->second.metadata});
      posted->remote.items.push_back({{row.there, row.bytes, remote->second.device}, remote->second.metadata});
    }
    const nixl::Operation operation = op == Op::write ? nixl::WRITE : nixl::READ;
    if (engine_->prepare(operation, posted->local, posted->remote, peer, posted->handle, nullptr) != nixl::SUCCESS)
      return 0;
    posted->result = engine_->post(operation, posted->local, posted->remote, peer, posted->handle, nullptr);
    // Whatever it says now: some rows may have been begun.
    posted_[++last_name_] = std::move(posted);
    return last_name_;
  }

  State check(Name name) override {
    const std::lock_guard lock(mutex_);
    const auto found = posted_.find(name);
    if (found == posted_.end()) return State::failed;
    Posted& posted = *found->second;
    if (posted.result == nixl::IN_PROGRESS) posted.result = engine_->check(posted.handle);
    if (posted.result == nixl::IN_PROGRESS) return State::running;
    const State state = posted.result == nixl::SUCCESS ? State::done : State::failed;
    engine_->release(posted.handle);
    posted_.erase(found);
    return state;
  }

  void end() override {
    const std::lock_guard lock(mutex_);
    if (engine_ == nullptr) return;
    for (const auto& [name, posted] : posted_) engine_->release(posted->handle);
    for (const auto& [name, memory] : memories_)
      if (!memory.local) forget(memory);
    for (const std::string& peer : peers_) engine_->disconnect(peer);
    for (const auto& [name, memory] : memories_)
      if (memory.local) forget(memory);
    posted_.clear();
    memories_.clear();
    peers_.clear();
    plugin_->destroy(std::exchange(engine_, nullptr));
  }

 private:
  struct Memory {
    nixl::Metadata* metadata;
    MemoryKind kind;
    uint64_t device;
    bool local;
  };
  struct Posted {
    nixl::MetaList local{};
    nixl::MetaList remote{};
    nixl::Request* handle = nullptr;
    nixl::Result result = nixl::IN_PROGRESS;
  };

  void forget(const Memory& memory) {
    if (memory.local) engine_->deregister_memory(memory.metadata);
    else engine_->unload_metadata(memory.metadata);
  }

  // A write to ourselves: that its functions are what interface.h says shows in the bytes that arrive.
  void self_test() {
    const auto fail = [](const std::string& what) { throw std::runtime_error("its self-test failed: " + what); };
    std::string info;
    if (engine_->connection_info(info) != nixl::SUCCESS) fail("no connection info");
    const std::string self = agent_ + "-self";
    if (!load_peer(self, info)) fail("it does not connect to itself");
    std::vector<uint8_t> from(TEST_BYTES);
    std::vector<uint8_t> to(TEST_BYTES);
    for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<uint8_t>(i * 31 + 1);
    std::string ignored;
    std::string published;
    const auto address = [](std::vector<uint8_t>& bytes) { return reinterpret_cast<uint64_t>(bytes.data()); };
    const Name here = add_local(address(from), TEST_BYTES, MemoryKind::host, 0, ignored);
    const Name target = add_local(address(to), TEST_BYTES, MemoryKind::host, 0, published);
    const Name there = target == 0 ? 0 : add_remote(self, address(to), TEST_BYTES, MemoryKind::host, 0, published);
    if (here == 0 || there == 0) fail("it does not register memory");
    const Name posted = post(Op::write, self, {{address(from), address(to), TEST_BYTES, here, there}});
    if (posted == 0) fail("it does not begin a transfer");
    const auto late = std::chrono::steady_clock::now() + TEST_TIME;
    State state = check(posted);
    while (state == State::running && std::chrono::steady_clock::now() < late) {
      std::this_thread::yield();
      state = check(posted);
    }
    if (state != State::done) fail(state == State::failed ? "a transfer failed" : "a transfer does not end");
    if (from != to) fail("a transfer moved wrong bytes");
    for (const Name name : {there, here, target}) remove(name);
    unload_peer(self);
  }

  const std::string agent_;
  const void* const* list_functions_ = nullptr;
  nixl::Plugin* plugin_ = nullptr;
  std::string info_;
  std::mutex mutex_;   // everything from here on: NIXL calls an engine from one thread at a time, too
  nixl::Engine* engine_ = nullptr;
  Name last_name_ = 0;
  std::set<std::string> peers_;
  std::unordered_map<Name, Memory> memories_;
  std::unordered_map<Name, std::unique_ptr<Posted>> posted_;
};

}  // namespace

const void* list_table(size_t& bytes) {
  void* library = dlopen("libnixl.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  const void* table = dlsym(library, "_ZTV12nixlDescListI12nixlMetaDescE");
  bytes = symbol_bytes(table);
  dlclose(library);
  return table;
}

std::unique_ptr<Hosted> host_ucx(const std::string& agent) { return std::make_unique<Child>(agent); }

bool has_gpu() { return access("/dev/nvidiactl", F_OK) == 0; }

}  // namespace tent
