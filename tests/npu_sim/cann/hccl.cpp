// A stand-in for HCCL (libhccl.so), with communicators over TCP. An operation runs on the
// thread of its stream; faults.cpp decides which point-to-point operations go wrong.
#include "npusim.h"

#include <acl/acl.h>
#include <hccl/hccl.h>

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace {
using Clock = std::chrono::steady_clock;
using npusim::env_long;
using npusim::env_str;

constexpr uint32_t kMagic = 0x4e505553;
constexpr int kBasePorts = 16;  // that CANN documents for HCCL_IF_BASE_PORT
enum Kind : uint32_t { kPointToPoint = 1, kCollective = 2 };

std::atomic<long> g_communicators{0}, g_p2p{0}, g_p2p_pending{0};

// Precedes each payload, so that both ends notice when they do not mean the same operation.
struct Header {
  uint32_t magic, sequence;
  uint64_t bytes;
  uint32_t type, kind;
};

// What HcclRootInfo holds: where the root listens.
struct RootInfo {
  uint32_t magic;
  uint16_t port;
  uint32_t address;  // network order
};

// There is a socket per pair and direction: out[p] carries our data to p, and back come p's
// acknowledgements.
struct Communicator {
  uint32_t rank, ranks;
  std::string name;
  int device;
  size_t buffers;
  long timeout_seconds;
  std::vector<int> out, in;
  std::vector<uint32_t> out_sequence, in_sequence;
  std::timed_mutex mutex;  // one operation at a time
  std::atomic<int> async_error{HCCL_SUCCESS};
  std::atomic<bool> destroyed{false};
  int wake = eventfd(0, EFD_CLOEXEC);  // readable once destroyed

  ~Communicator() {
    for (auto *sockets : {&out, &in})
      for (int fd : *sockets)
        if (fd >= 0) close(fd);
    close(wake);
  }
};
using CommunicatorPtr = std::shared_ptr<Communicator>;
CommunicatorPtr get(HcclComm handle) { return *(CommunicatorPtr *)handle; }

// ------------------------------------------------------------------------------------ sockets
// As in CANN, HCCL_IF_IP is this host's address, or else that of the interface that
// HCCL_SOCKET_IFNAME begins the name of. Without them CANN looks for one, and this is the loopback.
bool own_address(in_addr *out) {
  if (const char *ip = env_str("HCCL_IF_IP", nullptr)) return inet_pton(AF_INET, ip, out) == 1;
  out->s_addr = htonl(INADDR_LOOPBACK);
  const char *wanted = env_str("HCCL_SOCKET_IFNAME", nullptr);
  if (!wanted) return true;
  bool exact = *wanted == '=', found = false;
  wanted += exact;
  ifaddrs *all = nullptr;
  if (getifaddrs(&all)) return false;
  for (auto *i = all; i && !found; i = i->ifa_next) {
    if (!i->ifa_addr || i->ifa_addr->sa_family != AF_INET) continue;
    found = exact ? !strcmp(i->ifa_name, wanted) : !strncmp(i->ifa_name, wanted, strlen(wanted));
    if (found) *out = ((sockaddr_in *)i->ifa_addr)->sin_addr;
  }
  freeifaddrs(all);
  return found;
}

// Listens at the first free port of as many; of one, which is 0, at any.
int listen_here(uint16_t *port, uint32_t *address, int first = 0, int count = 1) {
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in local{};
  local.sin_family = AF_INET;
  int one = 1;  // also after earlier connections to the port
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  bool listens = false, known = own_address(&local.sin_addr);
  for (int i = 0; known && !listens && i < count; i++) {
    local.sin_port = htons((uint16_t)(first + i));
    listens = !bind(fd, (sockaddr *)&local, sizeof local) && !listen(fd, 64);
  }
  if (!listens) {
    close(fd);
    return -1;
  }
  socklen_t size = sizeof local;
  getsockname(fd, (sockaddr *)&local, &size);
  *port = ntohs(local.sin_port);
  *address = local.sin_addr.s_addr;
  return fd;
}

bool wait_until(int fd, short events, Clock::time_point deadline) {
  for (;;) {
    auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now());
    if (left.count() <= 0) return false;
    pollfd p{fd, events, 0};
    int ready = poll(&p, 1, (int)std::min<long>(left.count(), 1000));
    if (ready > 0) return true;
    if (ready < 0 && errno != EINTR) return false;
  }
}

bool exchange(int fd, void *buffer, size_t size, bool write, Clock::time_point deadline) {
  char *p = (char *)buffer;
  while (size) {
    ssize_t moved = write ? send(fd, p, size, MSG_NOSIGNAL | MSG_DONTWAIT)
                          : recv(fd, p, size, MSG_DONTWAIT);
    if (moved > 0) {
      p += moved;
      size -= (size_t)moved;
    } else if (moved == 0 || (errno != EAGAIN && errno != EINTR)) {
      return false;
    } else if (!wait_until(fd, write ? POLLOUT : POLLIN, deadline)) {
      return false;
    }
  }
  return true;
}

void no_delay(int fd) {
  int one = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

int dial(uint32_t address, uint16_t port, Clock::time_point deadline) {
  sockaddr_in remote{};
  remote.sin_family = AF_INET;
  remote.sin_addr.s_addr = address;
  remote.sin_port = htons(port);
  while (Clock::now() < deadline) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(fd, (sockaddr *)&remote, sizeof remote) == 0) {
      no_delay(fd);
      return fd;
    }
    close(fd);
    usleep(20000);
  }
  return -1;
}

int accept_until(int listener, Clock::time_point deadline) {
  if (!wait_until(listener, POLLIN, deadline)) return -1;
  int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
  if (fd >= 0) no_delay(fd);
  return fd;
}

// ------------------------------------------------------------------------------------ transfers
size_t type_size(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8: case HCCL_DATA_TYPE_UINT8: case HCCL_DATA_TYPE_HIF8:
    case HCCL_DATA_TYPE_FP8E4M3: case HCCL_DATA_TYPE_FP8E5M2: case HCCL_DATA_TYPE_FP8E8M0:
      return 1;
    case HCCL_DATA_TYPE_INT16: case HCCL_DATA_TYPE_UINT16: case HCCL_DATA_TYPE_FP16:
    case HCCL_DATA_TYPE_BFP16:
      return 2;
    case HCCL_DATA_TYPE_INT64: case HCCL_DATA_TYPE_UINT64: case HCCL_DATA_TYPE_FP64:
      return 8;
    case HCCL_DATA_TYPE_INT128:
      return 16;
    default:
      return 4;
  }
}

constexpr int64_t kNever = -1, kBeforeHeader = -2;

struct Transfer {
  bool send;
  uint32_t peer;
  char *buffer;
  uint64_t bytes;
  HcclDataType type;

  // Faults: where in the payload it stops, what then, which byte changes on the way, and so on.
  int64_t stop_at = kNever, flip_at = kNever;
  bool die = false;
  long delay_ms = 0;
  int fails_with = HCCL_SUCCESS;

  // Progress. What is stalled goes on no more; what is alone has no peer any more.
  enum { kHeader, kPayload, kAcknowledgement, kDone } state = kHeader;
  size_t moved = 0;  // of the present state's bytes
  bool stalled = false, alone = false;
  Header header{};
  char acknowledgement = 'A';

  bool writes() const { return send ? state < kAcknowledgement : state == kAcknowledgement; }
  char *data() {
    return state == kHeader ? (char *)&header : state == kPayload ? buffer : &acknowledgement;
  }
  size_t size() const {
    return state == kHeader ? sizeof header : state == kPayload ? bytes : 1;
  }
};

int fail(Communicator &c, HcclResult error, const std::string &why) {
  npusim::set_error("HCCL %s (rank %u of %u, '%s')", why.c_str(), c.rank, c.ranks, c.name.c_str());
  if (!c.destroyed)
    fprintf(stderr, "npusim: HCCL %s (rank %u of %u)\n", why.c_str(), c.rank, c.ranks);
  c.async_error = error;
  return error == HCCL_E_TIMEOUT ? ACL_ERROR_RT_STREAM_SYNC_TIMEOUT : ACL_ERROR_RT_AICPU_EXCEPTION;
}

// Whether an operation must end before it is through, and with which error.
bool is_cut_short(Communicator &c, int *error) {
  if (npusim::aborted())
    *error = ACL_ERROR_RT_STREAM_ABORT;
  else if (c.destroyed)
    *error = fail(c, HCCL_E_INTERNAL, "communicator destroyed under an operation");
  else
    return false;
  return true;
}

// A dead peer is noticed at once here; on hardware, the operation waits on.
bool dead_peer_fails() {
  static bool fails = !strcmp(env_str("NPU_SIM_PEER_GONE", "fail"), "fail");
  return fails;
}
constexpr char kPeerGone[] = "the peer closed the connection";

std::string mismatch(const Communicator &c, const Transfer &t, Kind kind) {
  const Header &h = t.header;
  if (h.magic == kMagic && h.bytes == t.bytes && h.type == (uint32_t)t.type && h.kind == kind &&
      h.sequence == c.in_sequence[t.peer])
    return "";
  return "peer " + std::to_string(t.peer) + " sends " + std::to_string(h.bytes) +
         " bytes of type " + std::to_string(h.type) + ", kind " + std::to_string(h.kind) +
         "; expected " + std::to_string(t.bytes) + " bytes of type " + std::to_string(t.type) +
         ", kind " + std::to_string(kind);
}

// Moves one transfer on until its socket would block. Returns why it failed, or nothing.
std::string advance(Communicator &c, Transfer &t, int fd, Kind kind, HcclResult *error) {
  *error = HCCL_E_REMOTE;
  for (;;) {
    size_t until = t.size();
    bool stops = t.stop_at == kBeforeHeader;
    if (t.state == Transfer::kPayload && t.stop_at >= 0) {
      until = std::min<size_t>(until, t.stop_at);
      stops = t.moved == until;
    }
    if (stops) {
      if (t.die) {
        fprintf(stderr, "npusim: this process dies on demand in a transfer\n");
        kill(getpid(), SIGKILL);
      }
      t.stalled = true;
      return "";
    }
    if (t.moved == t.size()) {
      if (t.state == Transfer::kHeader && !t.send) {
        std::string difference = mismatch(c, t, kind);
        c.in_sequence[t.peer]++;
        if (!difference.empty()) {
          *error = HCCL_E_PARA;
          return difference;
        }
      }
      if (t.state == Transfer::kPayload && !t.send && t.flip_at >= 0) t.buffer[t.flip_at] ^= 1;
      t.moved = 0;
      t.state = (decltype(t.state))(t.state + 1);
      if (t.state == Transfer::kDone) return "";
      continue;
    }
    char *p = t.data() + t.moved;
    char changed;
    if (t.send && t.state == Transfer::kPayload && t.flip_at >= (int64_t)t.moved) {
      if ((size_t)t.flip_at == t.moved) {  // what is sent changes, not the sender's memory
        changed = *p ^ 1;
        p = &changed;
        until = t.moved + 1;
      } else {
        until = std::min<size_t>(until, t.flip_at);
      }
    }
    size_t left = until - t.moved;
    ssize_t moved = t.writes() ? send(fd, p, left, MSG_NOSIGNAL | MSG_DONTWAIT)
                               : recv(fd, p, left, MSG_DONTWAIT);
    if (moved < 0 && (errno == EAGAIN || errno == EINTR)) return "";
    if (moved < 0 && errno == EFAULT) npusim::page_fault(p);
    if (moved <= 0) {
      if (dead_peer_fails()) return kPeerGone;
      t.alone = true;
      return "";
    }
    t.moved += (size_t)moved;
  }
}

// Drives any number of transfers at once. As on hardware, a send ends when it was received.
int run(Communicator &c, std::vector<Transfer> &transfers, Kind kind) {
  int error;
  std::unique_lock<std::timed_mutex> lock(c.mutex, std::defer_lock);
  while (!lock.try_lock_for(std::chrono::milliseconds(5)))
    if (is_cut_short(c, &error)) return error;
  auto deadline = Clock::now() + std::chrono::seconds(c.timeout_seconds);
  const std::vector<pollfd> interrupts{{c.wake, POLLIN, 0}, {npusim::abort_fd(), POLLIN, 0}};
  for (auto &t : transfers) {
    if (is_cut_short(c, &error)) return error;
    if (t.peer >= c.ranks || t.peer == c.rank) return fail(c, HCCL_E_PARA, "there is no such peer");
    if (t.send) t.header = {kMagic, c.out_sequence[t.peer]++, t.bytes, (uint32_t)t.type, kind};
    if (t.fails_with) return fail(c, (HcclResult)t.fails_with, "operation fails on demand");
    auto polled = interrupts;
    if (t.delay_ms) poll(polled.data(), polled.size(), (int)t.delay_ms);
  }
  for (;;) {
    auto polled = interrupts;
    std::vector<Transfer *> waiting(interrupts.size(), nullptr);
    std::set<int> taken;
    bool done = true;
    for (auto &t : transfers) {
      if (t.state == Transfer::kDone) continue;
      done = false;
      int fd = t.send ? c.out[t.peer] : c.in[t.peer];
      if (t.alone || !taken.insert(fd).second) continue;  // in order, per socket
      short events = t.stalled ? POLLRDHUP : t.writes() ? POLLOUT : POLLIN;
      polled.push_back({fd, events, 0});
      waiting.push_back(&t);
    }
    if (done) return 0;
    auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now());
    int timeout = (int)std::clamp<long>(left.count() + 1, 0, 60000);
    if (poll(polled.data(), polled.size(), timeout) < 0 && errno != EINTR)
      return fail(c, HCCL_E_SYSCALL, "poll failed");
    if (is_cut_short(c, &error)) return error;
    if (Clock::now() > deadline) return fail(c, HCCL_E_TIMEOUT, "operation timed out");
    for (size_t i = interrupts.size(); i < polled.size(); i++) {
      if (!polled[i].revents) continue;
      Transfer &t = *waiting[i];
      HcclResult result = HCCL_E_REMOTE;
      std::string why;
      if (!t.stalled)
        why = advance(c, t, polled[i].fd, kind, &result);
      else if (dead_peer_fails())
        why = kPeerGone;
      else
        t.alone = true;
      if (!why.empty()) return fail(c, result, why);
    }
  }
}

int run_collective(Communicator &c, std::vector<Transfer> transfers) {
  return run(c, transfers, kCollective);
}

// ------------------------------------------------------------------------------------ reductions
float from_bfloat16(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}
uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
template <class T> T combine(HcclReduceOp op, T a, T b) {
  switch (op) {
    case HCCL_REDUCE_PROD: return a * b;
    case HCCL_REDUCE_MAX: return a > b ? a : b;
    case HCCL_REDUCE_MIN: return a < b ? a : b;
    default: return a + b;
  }
}
template <class T> void combine_all(HcclReduceOp op, void *into, const void *from, uint64_t n) {
  for (uint64_t i = 0; i < n; i++)
    ((T *)into)[i] = combine<T>(op, ((T *)into)[i], ((const T *)from)[i]);
}
void reduce_into(void *into, const void *from, uint64_t n, HcclDataType type, HcclReduceOp op) {
  switch (type) {
    case HCCL_DATA_TYPE_FP32: return combine_all<float>(op, into, from, n);
    case HCCL_DATA_TYPE_FP64: return combine_all<double>(op, into, from, n);
    case HCCL_DATA_TYPE_INT8: return combine_all<int8_t>(op, into, from, n);
    case HCCL_DATA_TYPE_UINT8: return combine_all<uint8_t>(op, into, from, n);
    case HCCL_DATA_TYPE_INT16: return combine_all<int16_t>(op, into, from, n);
    case HCCL_DATA_TYPE_INT32: return combine_all<int32_t>(op, into, from, n);
    case HCCL_DATA_TYPE_INT64: return combine_all<int64_t>(op, into, from, n);
    case HCCL_DATA_TYPE_FP16: return combine_all<_Float16>(op, into, from, n);
    case HCCL_DATA_TYPE_BFP16: {
      auto *a = (uint16_t *)into;
      auto *b = (const uint16_t *)from;
      for (uint64_t i = 0; i < n; i++)
        a[i] = to_bfloat16(combine<float>(op, from_bfloat16(a[i]), from_bfloat16(b[i])));
      return;
    }
    default: npusim::missing("an HCCL reduction of this data type");
  }
}

// ------------------------------------------------------------------------------------ start
std::mutex &roots_mutex() {
  static auto *it = new std::mutex;
  return *it;
}
std::map<uint16_t, int> &roots() {  // the listeners of HcclGetRootInfo
  static auto *it = new std::map<uint16_t, int>;
  return *it;
}

struct Endpoint {
  uint32_t rank, address;
  uint16_t port;
};

// All ranks learn where all others listen, from the root: whoever made the root info.
bool gather_endpoints(const RootInfo &root, const Endpoint &own, std::vector<Endpoint> &all,
                      Clock::time_point deadline) {
  int listener = -1;
  {
    std::lock_guard<std::mutex> lock(roots_mutex());
    auto it = roots().find(root.port);
    if (it != roots().end()) {
      listener = it->second;
      roots().erase(it);
    }
  }
  size_t size = all.size() * sizeof(Endpoint);
  if (listener < 0) {
    int fd = dial(root.address, root.port, deadline);
    Endpoint copy = own;
    bool good = fd >= 0 && exchange(fd, &copy, sizeof copy, true, deadline) &&
                exchange(fd, all.data(), size, false, deadline);
    if (fd >= 0) close(fd);
    return good;
  }
  bool good = true;
  all[own.rank] = own;
  std::vector<int> others;
  while (good && others.size() + 1 < all.size()) {
    int fd = accept_until(listener, deadline);
    Endpoint other{};
    good = fd >= 0 && exchange(fd, &other, sizeof other, false, deadline) &&
           other.rank < all.size();
    if (good) all[other.rank] = other;
    if (fd >= 0) others.push_back(fd);
  }
  for (int fd : others) {
    good = good && exchange(fd, all.data(), size, true, deadline);
    close(fd);
  }
  close(listener);
  return good;
}

bool connect_all(Communicator &c, const RootInfo &root, Clock::time_point deadline) {
  Endpoint own{c.rank, 0, 0};
  int listener = listen_here(&own.port, &own.address);
  if (listener < 0) return false;
  std::vector<Endpoint> all(c.ranks);
  bool good = gather_endpoints(root, own, all, deadline);
  for (uint32_t peer = 0; good && peer < c.ranks; peer++) {
    if (peer == c.rank) continue;
    c.out[peer] = dial(all[peer].address, all[peer].port, deadline);
    uint32_t hello = c.rank;
    good = c.out[peer] >= 0 && exchange(c.out[peer], &hello, sizeof hello, true, deadline);
  }
  for (uint32_t i = 0; good && i + 1 < c.ranks; i++) {
    int fd = accept_until(listener, deadline);
    uint32_t peer = ~0u;
    good = fd >= 0 && exchange(fd, &peer, sizeof peer, false, deadline) && peer < c.ranks;
    if (good)
      c.in[peer] = fd;
    else if (fd >= 0)
      close(fd);
  }
  close(listener);
  return good;
}

HcclResult start(uint32_t ranks, const HcclRootInfo *root_info, uint32_t rank,
                 const HcclCommConfig *config, HcclComm *out) {
  auto deadline = Clock::now() + std::chrono::seconds(env_long("HCCL_CONNECT_TIMEOUT", 120));
  RootInfo root;
  memcpy(&root, root_info, sizeof root);
  if (root.magic != kMagic || rank >= ranks) return HCCL_E_PARA;
  for (auto &fault : npusim::due({"init"})) {
    if (fault.what == "error") return (HcclResult)fault.value.value_or(HCCL_E_INTERNAL);
    std::this_thread::sleep_until(deadline);  // hang: as if the others never came
    npusim::set_error("communicator hangs on demand");
    return HCCL_E_TIMEOUT;
  }
  auto c = std::make_shared<Communicator>();
  c->rank = rank;
  c->ranks = ranks;
  c->name = config && *config->hcclCommName ? config->hcclCommName
                                            : "npusim_" + std::to_string(root.port);
  c->device = npusim::current_device();
  c->out.assign(ranks, -1);
  c->in.assign(ranks, -1);
  c->out_sequence.assign(ranks, 0);
  c->in_sequence.assign(ranks, 0);
  long megabytes = env_long("HCCL_BUFFSIZE", 200);
  if (config && config->hcclBufferSize != HCCL_COMM_BUFFSIZE_CONFIG_NOT_SET)
    megabytes = config->hcclBufferSize;
  c->buffers = (size_t)megabytes << 21;  // one to send from, one to receive into
  c->timeout_seconds = env_long("HCCL_EXEC_TIMEOUT", 1836);
  if (config && config->hcclExecTimeOut != HCCL_COMM_EXECTIMEOUT_CONFIG_NOT_SET)
    c->timeout_seconds = config->hcclExecTimeOut;
  npusim::trace("HCCL start of '%s', rank %u of %u, buffers of 2 x %ld MB", c->name.c_str(), rank,
                ranks, megabytes);
  if (!connect_all(*c, root, deadline)) {
    npusim::set_error("HCCL could not connect %u ranks within HCCL_CONNECT_TIMEOUT", ranks);
    return HCCL_E_TIMEOUT;
  }
  if (!npusim::take_memory(c->device, c->buffers)) return HCCL_E_OOM;
  // torch_npu now adds it to a list without a lock, and ranks that are threads would do so at once.
  std::this_thread::sleep_for(std::chrono::milliseconds(10 * rank));
  g_communicators++;
  *out = new CommunicatorPtr(c);
  return HCCL_SUCCESS;
}

bool on_device(const void *p, size_t size, const char *name) {
  if (npusim::is_device_range(p, size)) return true;
  npusim::set_error("%s: %zu bytes from %p are not device memory", name, size, p);
  return false;
}

HcclResult queue(aclrtStream stream, std::function<int()> work) {
  return npusim::submit(stream, std::move(work)) ? HCCL_E_RUNTIME : HCCL_SUCCESS;
}
}  // namespace

namespace npusim {
HcclCounts hccl_counts() { return {g_communicators, g_p2p, g_p2p_pending}; }
}  // namespace npusim

API HcclResult HcclGetRootInfo(HcclRootInfo *out) {
  RootInfo root{kMagic, 0, 0};
  long first = env_long("HCCL_IF_BASE_PORT", 0);
  int listener = listen_here(&root.port, &root.address, (int)first, first ? kBasePorts : 1);
  if (listener < 0) {
    npusim::set_error("HCCL has no port to listen at");
    return HCCL_E_TCP_CONNECT;
  }
  memset(out, 0, sizeof *out);
  memcpy(out, &root, sizeof root);
  std::lock_guard<std::mutex> lock(roots_mutex());
  roots()[root.port] = listener;
  return HCCL_SUCCESS;
}
API HcclResult HcclCommInitRootInfo(uint32_t ranks, const HcclRootInfo *root, uint32_t rank,
                                    HcclComm *out) {
  return start(ranks, root, rank, nullptr, out);
}
API HcclResult HcclCommInitRootInfoConfig(uint32_t ranks, const HcclRootInfo *root, uint32_t rank,
                                          const HcclCommConfig *config, HcclComm *out) {
  return start(ranks, root, rank, config, out);
}
// What torch_npu calls where RANK_TABLE_FILE is a file.
API HcclResult HcclCommInitClusterInfoConfig(const char *, uint32_t, HcclCommConfig *, HcclComm *) {
  npusim::missing("HcclCommInitClusterInfoConfig");
}
API HcclResult HcclCreateSubCommConfig(HcclComm *, uint32_t, uint32_t *, uint64_t, uint32_t,
                                       HcclCommConfig *, HcclComm *) {
  npusim::missing("HcclCreateSubCommConfig");
}
API HcclResult HcclCommDestroy(HcclComm handle) {
  auto *c = (CommunicatorPtr *)handle;
  (*c)->destroyed = true;
  uint64_t one = 1;
  if (write((*c)->wake, &one, sizeof one) != sizeof one) return HCCL_E_SYSCALL;
  npusim::give_memory((*c)->device, (*c)->buffers);
  g_communicators--;
  delete c;
  return HCCL_SUCCESS;
}
API uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_RESERVED; }
API HcclResult HcclGetCommName(HcclComm c, char *name) {
  snprintf(name, COMM_NAME_MAX_LENGTH, "%s", get(c)->name.c_str());
  return HCCL_SUCCESS;
}
API HcclResult HcclGetRankSize(HcclComm c, uint32_t *ranks) {
  *ranks = get(c)->ranks;
  return HCCL_SUCCESS;
}
API HcclResult HcclGetRankId(HcclComm c, uint32_t *rank) {
  *rank = get(c)->rank;
  return HCCL_SUCCESS;
}
API HcclResult HcclGetCommAsyncError(HcclComm c, HcclResult *error) {
  *error = (HcclResult)get(c)->async_error.load();
  return HCCL_SUCCESS;
}
API const char *HcclGetErrorString(HcclResult error) {
  static thread_local std::string text;
  text = "HCCL error " + std::to_string((int)error) + " of the simulator";
  return text.c_str();
}
API HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) { return HCCL_SUCCESS; }
API HcclResult HcclCommResume(HcclComm) { return HCCL_SUCCESS; }

// ------------------------------------------------------------------------------------ p2p
// Operations between HcclGroupStart and HcclGroupEnd run as one, per communicator and stream.
struct Group {
  CommunicatorPtr communicator;
  aclrtStream stream;
  std::vector<Transfer> transfers;
};
static thread_local int t_depth = 0;
static thread_local std::vector<Group> t_groups;

static HcclResult queue_group(Group group) {
  long n = (long)group.transfers.size();
  g_p2p_pending += n;
  // Goes with the queued work, whether that ran or not.
  std::shared_ptr<void> pending(nullptr, [n](void *) { g_p2p_pending -= n; });
  return queue(group.stream, [group, pending]() mutable {
    return run(*group.communicator, group.transfers, kPointToPoint);
  });
}

// Returns an error code if the operation is to fail at once.
static HcclResult apply_faults(Transfer &t) {
  for (auto &fault : npusim::due({"p2p", t.send ? "send" : "recv"})) {
    auto value = fault.value;
    if (fault.what == "error") return (HcclResult)value.value_or(HCCL_E_INTERNAL);
    if (fault.what == "async_error") t.fails_with = (int)value.value_or(HCCL_E_REMOTE);
    if (fault.what == "delay") t.delay_ms = *value;
    if (fault.what == "stall") t.stop_at = value.value_or(kBeforeHeader);
    if (fault.what == "die") {
      t.die = true;
      t.stop_at = value.value_or((long)t.bytes / 2);
    }
    if (fault.what == "flip" && t.bytes) {
      int64_t offset = value.value_or(0) % (int64_t)t.bytes;  // a negative one counts from the end
      t.flip_at = offset < 0 ? offset + (int64_t)t.bytes : offset;
    }
  }
  return HCCL_SUCCESS;
}

static HcclResult point_to_point(std::vector<Transfer> transfers, HcclComm handle,
                                 aclrtStream stream, const char *name) {
  auto c = get(handle);
  for (auto &t : transfers) {
    if (!on_device(t.buffer, t.bytes, name)) return HCCL_E_PARA;
    npusim::trace("%s: %s %lu bytes, peer %u", name, t.send ? "send" : "receive", t.bytes, t.peer);
    g_p2p++;
    if (auto error = apply_faults(t)) {
      npusim::set_error("%s fails on demand", name);
      return error;
    }
  }
  if (!t_depth) return queue_group({c, stream, transfers});
  for (auto &group : t_groups)
    if (group.communicator == c && group.stream == stream) {
      group.transfers.insert(group.transfers.end(), transfers.begin(), transfers.end());
      return HCCL_SUCCESS;
    }
  t_groups.push_back({c, stream, transfers});
  return HCCL_SUCCESS;
}
API HcclResult HcclGroupStart() {
  t_depth++;
  return HCCL_SUCCESS;
}
API HcclResult HcclGroupEnd() {
  if (t_depth == 0 || --t_depth) return HCCL_SUCCESS;
  auto groups = std::move(t_groups);
  t_groups.clear();
  for (auto &group : groups)
    if (auto error = queue_group(group)) return error;
  return HCCL_SUCCESS;
}
API HcclResult HcclSend(void *buffer, uint64_t count, HcclDataType type, uint32_t peer, HcclComm c,
                        aclrtStream stream) {
  Transfer t{true, peer, (char *)buffer, count * type_size(type), type};
  return point_to_point({t}, c, stream, "HcclSend");
}
API HcclResult HcclRecv(void *buffer, uint64_t count, HcclDataType type, uint32_t peer, HcclComm c,
                        aclrtStream stream) {
  Transfer t{false, peer, (char *)buffer, count * type_size(type), type};
  return point_to_point({t}, c, stream, "HcclRecv");
}
API HcclResult HcclBatchSendRecv(HcclSendRecvItem *items, uint32_t n, HcclComm c,
                                 aclrtStream stream) {
  std::vector<Transfer> transfers;
  for (auto *i = items; i < items + n; i++)
    transfers.push_back({i->sendRecvType == HCCL_SEND, i->remoteRank, (char *)i->buf,
                         i->count * type_size(i->dataType), i->dataType});
  return point_to_point(transfers, c, stream, "HcclBatchSendRecv");
}

// ------------------------------------------------------------------------------------ collectives
// Each rank contributes `in` and gets the contribution of rank r at out + offsets[r].
static int gather(Communicator &c, const char *in, uint64_t bytes, char *out,
                  const std::vector<uint64_t> &offsets, HcclDataType type) {
  std::vector<Transfer> transfers;
  for (uint32_t peer = 0; peer < c.ranks; peer++) {
    if (peer == c.rank) continue;
    transfers.push_back({true, peer, (char *)in, bytes, type});
    transfers.push_back({false, peer, out + offsets[peer], bytes, type});
  }
  memmove(out + offsets[c.rank], in, bytes);
  return run_collective(c, transfers);
}
static std::vector<uint64_t> multiples(uint64_t step, uint32_t n) {
  std::vector<uint64_t> result(n);
  for (uint32_t i = 0; i < n; i++) result[i] = i * step;
  return result;
}
// All ranks reduce all contributions in the same order, so that all get the same bits.
static int reduce(Communicator &c, const void *in, void *out, uint64_t count, HcclDataType type,
                  HcclReduceOp op) {
  uint64_t bytes = count * type_size(type);
  std::vector<char> all(bytes * c.ranks);
  auto offsets = multiples(bytes, c.ranks);
  if (int error = gather(c, (const char *)in, bytes, all.data(), offsets, type)) return error;
  for (uint32_t i = 1; i < c.ranks; i++)
    reduce_into(all.data(), all.data() + offsets[i], count, type, op);
  memcpy(out, all.data(), bytes);
  return 0;
}

// Counts as sends and receives, which is what it consists of: faults can be aimed at it.
API HcclResult HcclBroadcast(void *buffer, uint64_t count, HcclDataType type, uint32_t root,
                             HcclComm handle, aclrtStream stream) {
  if (!count) return HCCL_SUCCESS;  // as in HCCL's published source
  uint64_t bytes = count * type_size(type);
  auto c = get(handle);
  std::vector<Transfer> transfers;
  if (c->rank != root)
    transfers.push_back({false, root, (char *)buffer, bytes, type});
  else
    for (uint32_t peer = 0; peer < c->ranks; peer++)
      if (peer != root) transfers.push_back({true, peer, (char *)buffer, bytes, type});
  return point_to_point(transfers, handle, stream, "HcclBroadcast");
}
API HcclResult HcclAllReduce(void *in, void *out, uint64_t count, HcclDataType type,
                             HcclReduceOp op, HcclComm handle, aclrtStream stream) {
  uint64_t bytes = count * type_size(type);
  if (!on_device(in, bytes, "HcclAllReduce") || !on_device(out, bytes, "HcclAllReduce"))
    return HCCL_E_PARA;
  return queue(stream, [=, c = get(handle)] { return reduce(*c, in, out, count, type, op); });
}
API HcclResult HcclReduce(void *in, void *out, uint64_t count, HcclDataType type, HcclReduceOp op,
                          uint32_t root, HcclComm handle, aclrtStream stream) {
  return queue(stream, [=, c = get(handle)] {
    std::vector<char> result(count * type_size(type));
    int error = reduce(*c, in, result.data(), count, type, op);
    if (!error && c->rank == root) memcpy(out, result.data(), result.size());
    return error;
  });
}
API HcclResult HcclAllGather(void *in, void *out, uint64_t count, HcclDataType type,
                             HcclComm handle, aclrtStream stream) {
  auto c = get(handle);
  uint64_t bytes = count * type_size(type);
  if (!on_device(in, bytes, "HcclAllGather") || !on_device(out, bytes * c->ranks, "HcclAllGather"))
    return HCCL_E_PARA;
  return queue(stream, [=] {
    return gather(*c, (char *)in, bytes, (char *)out, multiples(bytes, c->ranks), type);
  });
}
API HcclResult HcclReduceScatter(void *in, void *out, uint64_t count, HcclDataType type,
                                 HcclReduceOp op, HcclComm handle, aclrtStream stream) {
  return queue(stream, [=, c = get(handle)] {
    uint64_t bytes = count * type_size(type);
    std::vector<char> all(bytes * c->ranks);
    int error = reduce(*c, in, all.data(), count * c->ranks, type, op);
    if (!error) memcpy(out, all.data() + bytes * c->rank, bytes);
    return error;
  });
}
API HcclResult HcclScatter(void *in, void *out, uint64_t count, HcclDataType type, uint32_t root,
                           HcclComm handle, aclrtStream stream) {
  return queue(stream, [=, c = get(handle)] {
    uint64_t bytes = count * type_size(type);
    std::vector<Transfer> transfers;
    if (c->rank != root) {
      transfers.push_back({false, root, (char *)out, bytes, type});
    } else {
      for (uint32_t peer = 0; peer < c->ranks; peer++)
        if (peer != root) transfers.push_back({true, peer, (char *)in + peer * bytes, bytes, type});
      memmove(out, (char *)in + root * bytes, bytes);
    }
    return run_collective(*c, transfers);
  });
}
API HcclResult HcclAlltoAllV(const void *in, const void *in_counts, const void *in_offsets,
                             HcclDataType type, const void *out, const void *out_counts,
                             const void *out_offsets, HcclDataType, HcclComm handle,
                             aclrtStream stream) {
  auto c = get(handle);
  auto bytes = [type](const void *counts, uint32_t rank) {
    return ((const uint64_t *)counts)[rank] * type_size(type);
  };
  std::vector<Transfer> transfers;
  for (uint32_t peer = 0; peer < c->ranks; peer++) {
    if (peer == c->rank) continue;
    transfers.push_back(
        {true, peer, (char *)in + bytes(in_offsets, peer), bytes(in_counts, peer), type});
    transfers.push_back(
        {false, peer, (char *)out + bytes(out_offsets, peer), bytes(out_counts, peer), type});
  }
  char *from = (char *)in + bytes(in_offsets, c->rank);
  char *to = (char *)out + bytes(out_offsets, c->rank);
  uint64_t own = bytes(in_counts, c->rank);
  return queue(stream, [=] {
    memmove(to, from, own);
    return run_collective(*c, transfers);
  });
}
API HcclResult HcclAlltoAll(const void *in, uint64_t in_count, HcclDataType type, const void *out,
                            uint64_t out_count, HcclDataType out_type, HcclComm handle,
                            aclrtStream stream) {
  uint32_t ranks = get(handle)->ranks;
  std::vector<uint64_t> in_counts(ranks, in_count), out_counts(ranks, out_count);
  auto in_offsets = multiples(in_count, ranks), out_offsets = multiples(out_count, ranks);
  return HcclAlltoAllV(in, in_counts.data(), in_offsets.data(), type, out, out_counts.data(),
                       out_offsets.data(), out_type, handle, stream);
}
API HcclResult HcclBarrier(HcclComm handle, aclrtStream stream) {
  return queue(stream, [c = get(handle)] {
    char in = 1, out;
    return reduce(*c, &in, &out, 1, HCCL_DATA_TYPE_INT8, HCCL_REDUCE_MAX);
  });
}
