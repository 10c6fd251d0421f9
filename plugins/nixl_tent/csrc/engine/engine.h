// The data plane of one agent: one progress thread moves all bytes; any thread may call the public functions.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "config/config.h"
#include "engine/direct.h"
#include "engine/local_copy.h"
#include "engine/state.h"
#include "files/file.h"
#include "files/io.h"
#include "wire/metadata.h"

namespace tent {

using Notifications = std::vector<std::pair<std::string, std::string>>;   // (agent, message)

// Who moves the bytes: a thread of the engine, or whoever calls `step` (for tests that want one thread).
enum class Drive { threaded, stepped };

class Engine {
 public:
  // Opens listeners and starts the thread. Throws std::invalid_argument where the configuration cannot be met.
  Engine(Config config, std::string agent, Drive drive = Drive::threaded, std::unique_ptr<Hosted> hosted = nullptr);
  // Waits a moment for notifications that are not acknowledged yet; running transfers are given up.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const std::string& agent() const { return agent_; }
  std::string connection_info() const;

  // Peers may read and write [begin, begin + size) until `remove_region` returns. Memory of a device only through the
  // hosted engine: null where that does not take it.
  Region* add_region(void* begin, size_t size, MemoryKind kind = MemoryKind::host, uint64_t device = 0);
  void remove_region(Region* region);
  static RegionInfo describe_region(const Region& region);

  // A peer's region in the hosted engine; 0: it is not known there.
  Hosted::Name load_region(const std::string& agent, const RegionInfo& info);
  void unload_region(Hosted::Name region);
  bool hosts() const { return hosted_ != nullptr; }

  // Throws std::invalid_argument for metadata that is not ours. The same agent may be loaded again.
  void load_peer(const std::string& agent, std::string_view blob);
  bool connect(const std::string& agent);
  void disconnect(const std::string& agent);

  // A transfer to a loaded peer, or inside this agent where `agent` is its own name; null: unknown peer.
  std::unique_ptr<Transfer> prepare(Op op, const std::string& agent);
  void post(Transfer& transfer, std::optional<std::string> notification);
  // After this the transfer's memory is not touched any more, finished or not.
  void release(Transfer& transfer);
  // Looks at once for a sign that the transfer is through, unless the engine is busy: whoever polls a small transfer
  // need not wait for another thread to wake up.
  void hurry(const Transfer& transfer);

  bool notify(const std::string& agent, std::string message);
  Notifications take_notifications();

  // Waits up to `timeout_ms` (-1: for ever) for something to do, and does it. False when a closing engine is through.
  // Only the thread that drives the engine may call it.
  bool step(int timeout_ms);

  std::string metrics_json();
  std::string metrics_text();   // Prometheus

 private:
  class Dispatcher;
  friend class MetricsServer;

  // engine.cpp: the thread and the clock
  void run();
  void ready(Connection& connection, uint32_t events);
  void wake();
  void arm(double at);
  void want(Peer& peer);
  void remove_peer(Peer& peer);
  void drain_submissions();
  void tick(double now);
  bool idle() const;
  static double now();

  // links.cpp: dialling, proving, dying
  void dial(Peer& peer, Link& link, double now);
  void dial_finished(Connection& connection, double now);
  void accept_all(size_t listener);
  Connection& add_connection(Fd fd, const Transport* transport);
  void close(Connection& connection, const std::string& why, bool abrupt = false);
  void link_up(Connection& connection, double now);
  void check_links(Peer& peer, double now, double slept);
  void reroute(Peer& peer, Link& link);
  void watch(Connection& connection);
  void flush(Connection& connection);
  void send_frame(Connection& connection, Header header, std::string_view payload = {});
  void refuse(Connection& connection, const std::string& why);
  std::optional<std::string> shake(Connection& connection);
  std::optional<std::string> meet(Connection& connection);
  std::optional<std::string> check_proof(Connection& connection);

  // initiator.cpp: slices out, answers in
  void start(Transfer& transfer, double now);
  static bool copy_directly(Peer& peer, Transfer& transfer);
  static void open_directly(Connection& connection);
  void pump(Peer& peer, double now);
  void hedge(Peer& peer, double now);
  Transfer* pick(Peer& peer, double now);
  static void send_slice(Link& link, Transfer& transfer, uint32_t slice, double now);
  void slice_finished(Connection& connection, double now);
  void slice_refused(Connection& connection);
  static std::optional<InFlight> settle(Link& link, uint64_t transfer, uint32_t slice, double now);
  void all_slices_done(Peer& peer, Transfer& transfer);
  void discard_arriving(Peer& peer, uint64_t id, std::optional<uint32_t> slice);
  void queue_again(Peer& peer, uint64_t transfer, uint32_t slice);
  void finish(Peer& peer, Transfer& transfer, Status status);
  void check_transfers(Peer& peer, double now);
  void queue_control(Peer& peer, uint64_t id, Control control);
  void send_controls(Peer& peer);
  void end_acknowledged(Connection& connection);
  void fail_all(Peer& peer, Status status);
  std::optional<std::string> accept_read(Connection& connection, FrameHandler::Destination& destination);
  std::optional<std::string> pull_read(Connection& connection);

  // hosting.cpp: slices through the hosted engine
  bool begin_hosted(Peer& peer, Transfer& transfer, const Cut& cut, double at);
  void host(Peer& peer, Transfer& transfer, const Cut& cut, double at);
  void send_elsewhere(Peer& peer, Transfer& transfer, const Cut& cut);
  void bar_hosted(Peer& peer, const std::string& why);
  void end_hosting(const std::string& why);
  void ask_for_fence(Peer& peer, double at);
  static Link* stream_link(Peer& peer);
  void fence_asked(Connection& connection);
  static void fence_stands(Connection& connection);
  bool hosted_is_stuck(Peer& peer, double at);
  void poll_hosted(double at);
  void hosted_over(const HostedFlight& flight, bool failed, double at);

  // target.cpp: slices in, answers out
  std::optional<std::string> accept_write(Connection& connection, FrameHandler::Destination& destination);
  void write_finished(Connection& connection);
  std::optional<std::string> pull_write(Connection& connection);
  void serve_read(Connection& connection);
  void end_received(Connection& connection);
  void complete(Session& session, uint64_t transfer);
  static void end_incoming(Session& session, uint64_t transfer);
  void deliver(const std::string& agent, std::string message);
  Refusal locate(const std::vector<Segment>& rows, std::vector<iovec>& out) const;
  void answer(Connection& connection, Kind kind, uint32_t aux = 0);
  void drop_named(Session& session, uint64_t name);
  void forget_sessions(double now);

  const Config config_;
  const SchedulePolicy policy_;
  const double spin_;       // seconds
  const std::string agent_;
  ConnectionInfo info_;
  std::string key_;
  std::unique_ptr<DirectTable> direct_;   // null without the transport that needs it
  std::vector<std::unique_ptr<Transport>> transports_;
  struct Open {
    Listener listener;
    const Transport* transport;
  };
  std::vector<Open> listeners_;

  Fd epoll_, wakeup_, timer_;
  double armed_ = 0;        // when the timer fires, 0: not armed
  double tick_due_ = 0;
  double awake_until_ = 0;  // the thread does not sleep before
  std::atomic<double> helped_{0};   // when a caller last looked

  const std::unique_ptr<Hosted> hosted_;
  std::atomic<uint32_t> hosted_under_way_{0};

  mutable std::mutex mutex_;   // everything from here on
  std::unordered_map<uint64_t, std::unique_ptr<Connection>> connections_;
  std::vector<uint64_t> closed_;
  uint64_t next_connection_ = 1;
  uint32_t unproven_ = 0;
  std::unordered_map<std::string, std::shared_ptr<Peer>> peers_;
  std::unordered_map<std::string, std::unique_ptr<Session>> sessions_;   // by the initiator's engine
  uint64_t next_generation_ = 1;
  std::vector<std::unique_ptr<Region>> regions_;
  std::vector<uint32_t> free_slots_;
  uint64_t finished_ = 0, failed_ = 0, rejected_ = 0;
  std::vector<std::unique_ptr<Region>> device_regions_;
  std::list<HostedFlight> hosted_flights_;
  Hosting hosting_ = Hosting::runs;
  double hosted_polled_ = 0;
  std::vector<uint64_t> fence_askers_;   // connections
  bool stopping_ = false;
  double leave_at_ = 0;     // a closing engine waits no longer

  std::mutex submit_mutex_;
  std::vector<Transfer*> submitted_;

  std::mutex notification_mutex_;
  Notifications notifications_;

  LocalCopier copier_;
  FileIo files_;
  std::unique_ptr<class MetricsServer> metrics_;
  std::thread undertaker_;   // of the hosted engine
  std::thread thread_;
};

}  // namespace tent
