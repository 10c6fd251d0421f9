#include "engine/engine.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <stdexcept>

#include "engine/dispatcher.h"
#include "metrics/server.h"

namespace tent {
namespace {

constexpr double TICK = 2e-3;              // between two looks at busy links
constexpr double LONGEST_LOOK = 5e-3;      // of a late look at a link, so much counts as silence
constexpr uint64_t SMALL_TRANSFER = 64 << 10;   // bytes: whoever polls one reads its answers
constexpr int HOSTED_LOOK_MS = 1;          // between two looks at what a hosted engine has under way
constexpr double HOUSEKEEPING = 10.0;      // between two looks at sessions nobody uses
constexpr double GOODBYE = 0.5;            // how long a closing engine waits for its notifications
constexpr size_t READ_BUDGET = 4 << 20;    // bytes of one connection before the others get a turn
constexpr uint64_t WAKEUP = 0;             // epoll names; connections count from FIRST_CONNECTION
constexpr uint64_t TIMER = 1;
constexpr uint64_t FIRST_LISTENER = 2;
constexpr uint64_t FIRST_CONNECTION = 1024;

void watch_fd(int epoll, int fd, uint64_t name) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = name;
  epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}

}  // namespace

void complain(const std::string& what) { std::fprintf(stderr, "TENT: %s\n", what.c_str()); }

void Session::end(uint64_t transfer) {
  open.erase(transfer);
  ended.insert(transfer);
  while (!ended.empty() && *ended.begin() == low) {
    ended.erase(ended.begin());
    ++low;
  }
}

double Engine::now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Engine::Engine(Config config, std::string agent, Drive drive, std::unique_ptr<Hosted> hosted)
    : config_(std::move(config)),
      policy_{config_.mode == Mode::spray, static_cast<double>(config_.slice_min),
              static_cast<double>(config_.slice_max), config_.slice_ms * 1e-3, config_.queue_ms * 1e-3},
      spin_(std::thread::hardware_concurrency() > 1 ? config_.spin_us * 1e-6 : 0),
      agent_(std::move(agent)),
      transports_(make_transports(config_)),
      epoll_(epoll_create1(EPOLL_CLOEXEC)),
      wakeup_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      timer_(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)),
      hosted_(std::move(hosted)),
      next_connection_(FIRST_CONNECTION),
      files_(config_.file_io, complain) {
  if (agent_.empty() || agent_.size() > 255)
    throw std::invalid_argument("the agent's name must have 1 to 255 bytes, got " + std::to_string(agent_.size()));
  if (!epoll_ || !wakeup_ || !timer_) throw std::runtime_error("no file descriptors left");
  info_.engine = random_bytes(16);
  info_.key = random_bytes(32);
  info_.host = host_identity();
  if (hosted_ != nullptr) info_.hosted = hosted_->connection_info();
  key_ = shared_key(config_.secret, info_.key);
  for (const auto& transport : transports_)
    for (Listener& listener : transport->listen(config_, info_.engine)) {
      info_.endpoints.push_back(listener.endpoint);
      listeners_.push_back({std::move(listener), transport.get()});
    }
  if (std::any_of(transports_.begin(), transports_.end(), [](const auto& t) { return t->by_reference(); }))
    direct_ = std::make_unique<DirectTable>(info_.engine);
  if (listeners_.empty()) throw std::invalid_argument("option links: this machine has no interface that is up");
  watch_fd(epoll_.get(), wakeup_.get(), WAKEUP);
  watch_fd(epoll_.get(), timer_.get(), TIMER);
  for (size_t i = 0; i < listeners_.size(); ++i)
    watch_fd(epoll_.get(), listeners_[i].listener.fd.get(), FIRST_LISTENER + i);
  if (drive == Drive::threaded) thread_ = std::thread([this] { run(); });
  if (config_.metrics) metrics_ = std::make_unique<MetricsServer>(*this, config_.run_dir);
}

Engine::~Engine() {
  metrics_.reset();
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake();
  if (thread_.joinable()) thread_.join();
  else run();
  if (direct_ != nullptr) {
    direct_->retract_all();
    direct_->drain();
  }
  if (undertaker_.joinable()) undertaker_.join();
  if (hosted_ != nullptr) hosted_->end();
  const std::lock_guard lock(mutex_);
  hosting_ = Hosting::ended;
  poll_hosted(now());
}

void Engine::wake() {
  constexpr uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(wakeup_.get(), &one, sizeof one);
}

void Engine::arm(double at) {
  if (armed_ != 0 && armed_ <= at) return;
  armed_ = tick_due_ = at;
  itimerspec spec{};
  spec.it_value.tv_sec = static_cast<time_t>(at);
  spec.it_value.tv_nsec = static_cast<long>((at - std::floor(at)) * 1e9);
  timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &spec, nullptr);
}

bool Engine::idle() const {
  for (const auto& [name, peer] : peers_)
    for (const auto& [id, control] : peer->control)
      if ((control.flags & FLAG_NOTIFY) != 0 && control.connection != 0) return false;
  return true;
}

void Engine::ready(Connection& connection, uint32_t events) {
  if (connection.link != nullptr && connection.link->state == LinkState::dialling)
    return dial_finished(connection, now());
  if ((events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0 && !connection.closed) {
    Dispatcher dispatcher(*this, connection);
    std::string error;
    uint64_t bytes = 0;
    const Io state = connection.in.read(connection.fd.get(), dispatcher, READ_BUDGET, bytes, error);
    if (connection.link != nullptr) connection.link->counters.bytes_in += bytes;
    if (state == Io::closed) close(connection, error.empty() ? "the peer closed the connection" : error);
  }
  if (!connection.closed) flush(connection);
  if (connection.peer != nullptr) pump(*connection.peer, now());
}

bool Engine::step(int timeout_ms) {
  std::array<epoll_event, 64> events;
  // Not beside a caller who looks himself: two that spin are one too many where cores are few.
  const bool awake = spin_ > 0 && timeout_ms < 0 && now() < awake_until_ && now() > helped_ + spin_;
  if (awake) timeout_ms = 0;
  if (hosted_under_way_ > 0) timeout_ms = timeout_ms < 0 ? HOSTED_LOOK_MS : std::min(timeout_ms, HOSTED_LOOK_MS);
  const int count = epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), timeout_ms);
  const auto of_a_peer = [](const epoll_event& event) { return event.data.u64 >= FIRST_LISTENER; };
  if (std::any_of(events.begin(), events.begin() + std::max(count, 0), of_a_peer)) awake_until_ = now() + spin_;
  else if (awake && count <= 0 && hosted_under_way_ == 0) return true;
  const std::lock_guard lock(mutex_);
  bool timer_fired = false;
  for (int i = 0; i < count; ++i) {
    const uint64_t name = events[static_cast<size_t>(i)].data.u64;
    uint64_t ignored = 0;
    if (name == WAKEUP) {
      [[maybe_unused]] const ssize_t got = ::read(wakeup_.get(), &ignored, sizeof ignored);
    } else if (name == TIMER) {
      [[maybe_unused]] const ssize_t got = ::read(timer_.get(), &ignored, sizeof ignored);
      timer_fired = true;
    } else if (name < FIRST_CONNECTION) {
      accept_all(name - FIRST_LISTENER);
    } else if (const auto found = connections_.find(name); found != connections_.end()) {
      ready(*found->second, events[static_cast<size_t>(i)].events);
    }
  }
  drain_submissions();
  poll_hosted(now());
  if (timer_fired) {
    armed_ = 0;
    tick(now());
  }
  for (const uint64_t id : closed_) connections_.erase(id);
  closed_.clear();
  if (!stopping_) return true;
  if (leave_at_ == 0) leave_at_ = now() + GOODBYE;
  if (idle() || now() > leave_at_) return false;
  arm(now() + TICK);
  return true;
}

void Engine::run() {
  while (step(-1)) {
  }
  const std::lock_guard lock(mutex_);
  for (const auto& [name, peer] : peers_) fail_all(*peer, Status::canceled);
  for (const auto& [id, connection] : connections_)
    if (!connection->closed) close(*connection, "this agent is closing");
  connections_.clear();
}

void Engine::drain_submissions() {
  std::vector<Transfer*> fresh;
  {
    const std::lock_guard lock(submit_mutex_);
    fresh.swap(submitted_);
  }
  const double at = now();
  for (Transfer* transfer : fresh) {
    start(*transfer, at);
    pump(*transfer->peer, at);
  }
}

void Engine::tick(double at) {
  // How much longer than planned we were away: whatever did not happen meanwhile proves nothing.
  const double slept = tick_due_ == 0 ? 0 : std::max(0.0, at - tick_due_ - TICK);
  tick_due_ = 0;
  bool busy = false;
  double next = at + HOUSEKEEPING;
  std::vector<std::shared_ptr<Peer>> peers;   // a check may remove one
  for (const auto& [name, peer] : peers_) peers.push_back(peer);
  for (const auto& peer : peers) {
    check_links(*peer, at, slept);
    check_transfers(*peer, at);
    pump(*peer, at);
    busy = busy || peer->busy();
    for (const auto& link : peer->links) {
      busy = busy || link->state == LinkState::dialling || link->state == LinkState::proving;
      if (peer->wanted && link->state == LinkState::down && !link->barred) next = std::min(next, link->retry_at);
    }
  }
  for (const auto& [id, connection] : connections_)
    if (connection->peer == nullptr && connection->session == nullptr && !connection->closed &&
        at - connection->since > HANDSHAKE_SECONDS)
      close(*connection, "no handshake");
  if (unproven_ > 0) busy = true;
  forget_sessions(at);
  arm(busy ? at + TICK : std::max(next, at + TICK));
}

std::string Engine::connection_info() const { return encode(info_); }

Region* Engine::add_region(void* begin, size_t size, MemoryKind kind, uint64_t device) {
  auto region = std::make_unique<Region>();
  region->begin = static_cast<uint8_t*>(begin);
  region->size = size;
  region->kind = kind;
  region->device = device;
  if (hosted_ != nullptr)
    region->hosted = hosted_->add_local(reinterpret_cast<uint64_t>(begin), size, kind, device, region->hosted_info);
  const std::lock_guard lock(mutex_);
  if (kind == MemoryKind::device) {
    if (region->hosted == 0) return nullptr;
    device_regions_.push_back(std::move(region));
    return device_regions_.back().get();
  }
  region->token = random_u64();
  auto slot = static_cast<uint32_t>(regions_.size());
  if (free_slots_.empty()) {
    regions_.emplace_back();
  } else {
    slot = free_slots_.back();
    free_slots_.pop_back();
  }
  region->slot = slot;
  if (direct_ != nullptr) direct_->publish(slot, region->token, begin, size);
  regions_[slot] = std::move(region);
  return regions_[slot].get();
}

void Engine::remove_region(Region* region) {
  if (region->hosted != 0) hosted_->remove(region->hosted);
  std::unique_lock lock(mutex_);
  if (region->kind == MemoryKind::device) {
    std::erase_if(device_regions_, [&](const auto& other) { return other.get() == region; });
    return;
  }
  for (const auto& [id, connection] : connections_) {
    connection->out.release_memory(region->begin, region->size);
    // Only what peers write here: a transfer of our own keeps its buffers by `release`.
    if (connection->session != nullptr && connection->in.touches(region->begin, region->size)) {
      connection->in.discard();
      connection->refusal = Refusal::region;
    }
  }
  const uint32_t slot = region->slot;
  regions_[slot].reset();
  if (direct_ != nullptr) {
    direct_->retract(slot);
    lock.unlock();
    direct_->drain();
    lock.lock();
  }
  free_slots_.push_back(slot);
}

RegionInfo Engine::describe_region(const Region& region) {
  return {region.token, reinterpret_cast<uint64_t>(region.begin), region.size, region.slot,
          static_cast<uint8_t>(region.kind), region.device, region.hosted_info};
}

Hosted::Name Engine::load_region(const std::string& agent, const RegionInfo& info) {
  if (hosted_ == nullptr || info.hosted.empty()) return 0;
  std::string name;
  {
    const std::lock_guard lock(mutex_);
    if (const auto found = peers_.find(agent); found != peers_.end()) name = found->second->hosted_name;
  }
  if (name.empty()) return 0;
  return hosted_->add_remote(name, info.address, info.length, static_cast<MemoryKind>(info.kind), info.device, info.hosted);
}

void Engine::unload_region(Hosted::Name region) {
  if (region != 0) hosted_->remove(region);
}

void Engine::load_peer(const std::string& agent, std::string_view blob) {
  ConnectionInfo info = decode_connection(blob);
  if (agent == agent_) return;
  const std::lock_guard lock(mutex_);
  if (const auto known = peers_.find(agent); known != peers_.end()) {
    if (known->second->info.engine == info.engine) return;
    remove_peer(*known->second);
    peers_.erase(known);
  }
  auto peer = std::make_shared<Peer>(policy_);
  peer->agent = agent;
  peer->key = shared_key(config_.secret, info.key);
  peer->generation = next_generation_++;
  peer->info = std::move(info);
  const bool same_host = peer->info.host == info_.host;
  for (const auto& transport : transports_) {
    const auto only = [&](const std::vector<Endpoint>& all) {
      std::vector<Endpoint> chosen;
      for (const Endpoint& endpoint : all)
        if (endpoint.transport == transport->name()) chosen.push_back(endpoint);
      return chosen;
    };
    for (const Path& path : transport->paths(only(info_.endpoints), only(peer->info.endpoints), same_host))
      peer->links.push_back(
          std::make_unique<Link>(path, transport.get(), first_rate(path), config_.stall_ms * 1e-3, std::min(LONGEST_LOOK, config_.stall_ms * 0.8e-3)));
  }
  if (peer->links.empty())
    throw std::invalid_argument("no address of agent '" + agent + "' can be reached from the links used here");
  if (hosted_ != nullptr && hosting_ == Hosting::runs && !peer->info.hosted.empty()) {
    // A name of its own for each life of an agent: the hosted engine never forgets one.
    std::string name = agent + '-' + std::to_string(peer->generation);
    if (hosted_->load_peer(name, peer->info.hosted)) {
      Path path{{"ucx", "ucx", "", 0, 0, 0}, {"ucx", "ucx", "", 0, 0, 0}, 0};
      peer->links.push_back(std::make_unique<Link>(path, nullptr, first_rate(path), 0, 0));
      peer->hosted = peer->links.back().get();
      peer->hosted->state = LinkState::up;
      peer->hosted_name = std::move(name);
    }
  }
  peers_[agent] = std::move(peer);
}

bool Engine::connect(const std::string& agent) {
  if (agent == agent_) return true;
  const std::lock_guard lock(mutex_);
  const auto found = peers_.find(agent);
  if (found == peers_.end()) return false;
  want(*found->second);
  return true;
}

void Engine::want(Peer& peer) {
  const double at = now();
  if (!peer.wanted) {
    peer.wanted = true;
    for (const auto& link : peer.links)
      if (link->transport != nullptr) dial(peer, *link, at);
  }
  arm(at + TICK);
}

void Engine::disconnect(const std::string& agent) {
  const std::lock_guard lock(mutex_);
  const auto found = peers_.find(agent);
  if (found == peers_.end()) return;
  remove_peer(*found->second);
  peers_.erase(found);
}

void Engine::remove_peer(Peer& peer) {
  peer.removed = true;
  fail_all(peer, Status::disconnected);
  if (peer.hosted != nullptr && peer.hosted_flights == 0) hosted_->unload_peer(peer.hosted_name);
}

std::unique_ptr<Transfer> Engine::prepare(Op op, const std::string& agent) {
  auto transfer = std::make_unique<Transfer>();
  transfer->op = op;
  if (agent == agent_) return transfer;
  const std::lock_guard lock(mutex_);
  const auto found = peers_.find(agent);
  if (found == peers_.end()) return nullptr;
  transfer->peer = found->second;
  return transfer;
}

void Engine::post(Transfer& transfer, std::optional<std::string> notification) {
  if (transfer.peer == nullptr) {
    transfer.status = Status::running;
    auto finished = [this, notification = std::move(notification)] {
      if (notification) deliver(agent_, *notification);
    };
    if (transfer.files.empty()) copier_.copy(transfer, std::move(finished));
    else files_.start(transfer, std::move(finished));
    return;
  }
  transfer.notification = std::move(notification);
  transfer.status = Status::running;
  // An idle engine starts it on this thread, which saves a switch; a busy one does so on its own.
  if (const std::unique_lock lock(mutex_, std::try_to_lock); lock.owns_lock()) {
    const double at = now();
    start(transfer, at);
    pump(*transfer.peer, at);
    return;
  }
  {
    const std::lock_guard lock(submit_mutex_);
    submitted_.push_back(&transfer);
  }
  wake();
}

void Engine::release(Transfer& transfer) {
  if (transfer.peer == nullptr) return transfer.files.empty() ? copier_.cancel(transfer) : files_.cancel(transfer);
  if (transfer.status != Status::running) return;
  std::unique_lock lock(mutex_);
  {
    const std::lock_guard submitted(submit_mutex_);
    if (std::erase(submitted_, &transfer) > 0) return;
  }
  if (transfer.status != Status::running) return;
  if (!transfer.verdict) finish(*transfer.peer, transfer, Status::canceled);
  arm(now());   // what it held back goes out, and the target hears of it
  // What the hosted engine has begun cannot be taken back: it ends by itself, or with that engine.
  while (transfer.status == Status::running) {
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::microseconds(200));
    lock.lock();
    poll_hosted(now());
  }
}

void Engine::hurry(const Transfer& transfer) {
  const bool small = transfer.peer != nullptr && transfer.plan.total() <= SMALL_TRANSFER;
  if (transfer.status != Status::running || (!small && hosted_under_way_ == 0)) return;
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) return;
  const double at = now();
  poll_hosted(at);
  helped_ = at;
  if (!small || transfer.peer->removed) return;
  for (const auto& link : transfer.peer->links)
    if (link->state == LinkState::up && link->connection != nullptr &&
        (!link->in_flight.empty() || !transfer.peer->control.empty()))
      ready(*link->connection, EPOLLIN);
}

bool Engine::notify(const std::string& agent, std::string message) {
  if (agent == agent_) {
    deliver(agent_, std::move(message));
    return true;
  }
  const std::lock_guard lock(mutex_);
  const auto found = peers_.find(agent);
  if (found == peers_.end()) return false;
  Peer& peer = *found->second;
  want(peer);
  Control control;
  control.flags = FLAG_TOTAL | FLAG_NOTIFY | FLAG_ORDERED;
  put(control.payload, peer.next_order++);
  control.payload += message;
  queue_control(peer, peer.next_write++, std::move(control));
  pump(peer, now());
  return true;
}

Notifications Engine::take_notifications() {
  const std::lock_guard lock(notification_mutex_);
  return std::exchange(notifications_, {});
}

void Engine::deliver(const std::string& agent, std::string message) {
  const std::lock_guard lock(notification_mutex_);
  notifications_.emplace_back(agent, std::move(message));
}

}  // namespace tent
