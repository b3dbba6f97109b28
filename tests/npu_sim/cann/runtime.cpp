// A stand-in for CANN's run time (libascendcl.so and friends), for tests only.
// Device memory is host memory in a registry, and every stream is a thread.
#include "npusim.h"
#include "transdata.h"

#include <acl/acl.h>
#include <acl/acl_op_compiler.h>

#include <stdarg.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

// State that static destructors of torch_npu still use at exit is never destroyed.
#define IMMORTAL(type, name) \
  type &name() {             \
    static auto *it = new type; \
    return *it;              \
  }

namespace npusim {
long env_long(const char *name, long otherwise) {
  const char *value = getenv(name);
  return value && *value ? strtol(value, nullptr, 10) : otherwise;
}
const char *env_str(const char *name, const char *otherwise) {
  const char *value = getenv(name);
  return value && *value ? value : otherwise;
}
}  // namespace npusim

namespace {
using Clock = std::chrono::steady_clock;
using npusim::env_long;
using npusim::env_str;

constexpr int kMaxDevices = 64;

// ------------------------------------------------------------------------------------ devices
int device_count() {
  long existing = std::min<long>(env_long("NPU_SIM_DEVICES", 2), kMaxDevices);
  const char *visible = getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (!visible || !*visible) return (int)existing;
  int count = 0;  // as CANN: up to the first that does not exist
  for (char *end; *visible; visible = end + (*end == ',')) {
    long device = strtol(visible, &end, 10);
    if (end == visible || device < 0 || device >= existing) break;
    count++;
  }
  return count;
}
thread_local int t_device = -1;

// Where the environment asks for it, a failed task stops its whole device, as CANN documents for
// the mode that torch_npu sets on its streams.
std::atomic<int> g_stopped[kMaxDevices];
bool stop_on_failure() {
  static bool stop = !strcmp(env_str("NPU_SIM_ON_FAILURE", "stream"), "device");
  return stop;
}

// ------------------------------------------------------------------------------------ memory
struct Block {
  size_t size;
  int device;
  bool host;  // pinned host memory
};
IMMORTAL(std::mutex, memory_mutex)
using Blocks = std::map<uintptr_t, Block>;
IMMORTAL(Blocks, blocks)
// Addresses for virtual memory, with their sizes. What of them is mapped is among the blocks.
using Reserved = std::map<uintptr_t, size_t>;
IMMORTAL(Reserved, reserved)
size_t g_used[kMaxDevices], g_most[kMaxDevices];
size_t g_host_used;

size_t memory_per_device() {
  static size_t size = (size_t)env_long("NPU_SIM_HBM_MB", 65536) << 20;
  return size;
}

const Block *find_block(const void *address) {  // with memory_mutex held
  auto it = blocks().upper_bound((uintptr_t)address);
  if (it == blocks().begin()) return nullptr;
  --it;
  return (uintptr_t)address < it->first + it->second.size ? &it->second : nullptr;
}

void check_mapped(const void *address) {  // with memory_mutex held
  auto it = reserved().upper_bound((uintptr_t)address);
  if (it == reserved().begin() || find_block(address)) return;
  --it;
  if ((uintptr_t)address < it->first + it->second) npusim::page_fault(address);
}

bool take_locked(int device, size_t size) {
  if (g_used[device] + size > memory_per_device()) {
    npusim::set_error("device %d has no %zu bytes left", device, size);
    return false;
  }
  g_used[device] += size;
  g_most[device] = std::max(g_most[device], g_used[device]);
  return true;
}

bool allocation_fails(size_t size) {
  if (npusim::due({"alloc"}, size).empty()) return false;
  npusim::set_error("an allocation of %zu bytes fails on demand", size);
  return true;
}

// Fresh device memory is not zero. Touching all of a big block would cost real memory.
void poison(void *memory, size_t size) {
  static bool wanted = env_long("NPU_SIM_POISON", 1) != 0;
  if (wanted) memset(memory, 0xCB, std::min<size_t>(size, 64u << 20));
}

aclError allocate(void **out, size_t size, bool host) {
  if (!out || size == 0) return ACL_ERROR_INVALID_PARAM;
  *out = nullptr;
  size_t granule = host ? 4096 : 2u << 20, rounded = (size + granule - 1) / granule * granule;
  int device = npusim::current_device();
  if (!host && allocation_fails(size)) return ACL_ERROR_RT_MEMORY_ALLOCATION;
  std::lock_guard<std::mutex> lock(memory_mutex());
  if (!host && !take_locked(device, rounded)) return ACL_ERROR_RT_MEMORY_ALLOCATION;
  void *p = mmap(nullptr, rounded, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    if (!host) g_used[device] -= rounded;
    return ACL_ERROR_RT_MEMORY_ALLOCATION;
  }
  if (host) g_host_used += rounded;
  if (!host) poison(p, rounded);
  blocks()[(uintptr_t)p] = Block{rounded, device, host};
  *out = p;
  return ACL_SUCCESS;
}

aclError release(void *address, bool host) {
  std::lock_guard<std::mutex> lock(memory_mutex());
  auto it = blocks().find((uintptr_t)address);
  if (it == blocks().end() || it->second.host != host) {
    npusim::set_error("free of an unknown pointer %p", address);
    return ACL_ERROR_INVALID_PARAM;
  }
  (host ? g_host_used : g_used[it->second.device]) -= it->second.size;
  munmap(address, it->second.size);
  blocks().erase(it);
  return ACL_SUCCESS;
}

// ------------------------------------------------------------------------------------ streams
std::atomic<long> g_stream_threads{0};

struct Task {
  std::function<int()> work;
  bool marker;  // an event or a host function: runs whatever failed before, so that nobody hangs
  std::function<void()> discard = nullptr;
};

struct Stream {
  int id, device;
  bool stop_on_failure = false;
  std::mutex mutex;
  std::condition_variable queued, idle_again;
  std::deque<Task> tasks;
  bool busy = false, destroyed = false, started = false;
  std::atomic<int> error{0};
  std::atomic<bool> aborting{false};
  int abort_fd = -1;
  long aborts = 0;

  void push(std::function<int()> work) { push(Task{std::move(work), false}); }
  void push(Task task) {
    std::lock_guard<std::mutex> lock(mutex);
    tasks.push_back(std::move(task));
    if (!started) {  // not sooner: torch_npu makes more than 30 streams per device and uses two
      started = true;
      abort_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
      g_stream_threads++;
      std::thread([this] { run(); }).detach();
    }
    queued.notify_one();
  }
  void run();
  void abort();
  void fail(int failure) {
    int none = 0;
    error.compare_exchange_strong(none, failure);
    none = 0;
    if (::stop_on_failure() && stop_on_failure &&
        g_stopped[device].compare_exchange_strong(none, failure))
      fprintf(stderr, "npusim: device %d stops after a failed task\n", device);
  }
  int status() { return error ? error.load() : g_stopped[device].load(); }
  bool idle() {
    std::lock_guard<std::mutex> lock(mutex);
    return tasks.empty() && !busy;
  }
  // Returns how the work ended, once it has.
  int wait(int timeout_ms) {
    std::unique_lock<std::mutex> lock(mutex);
    long aborts_before = aborts;
    auto done = [&] { return (tasks.empty() && !busy) || aborts != aborts_before; };
    if (timeout_ms < 0)
      idle_again.wait(lock, done);
    else if (!idle_again.wait_for(lock, std::chrono::milliseconds(timeout_ms), done))
      return ACL_ERROR_RT_STREAM_SYNC_TIMEOUT;
    return aborts != aborts_before ? ACL_ERROR_RT_STREAM_ABORT : status();
  }
};
thread_local Stream *t_stream = nullptr;  // whose thread this is

void Stream::run() {
  t_device = device;
  t_stream = this;
  std::unique_lock<std::mutex> lock(mutex);
  for (;;) {
    queued.wait(lock, [&] { return !tasks.empty() || destroyed; });
    if (tasks.empty()) break;
    Task task = std::move(tasks.front());
    tasks.pop_front();
    busy = true;
    lock.unlock();
    if (task.marker || !g_stopped[device]) {
      int failure = task.work();
      if (failure && !aborting) fail(failure);
    }
    task = {};
    lock.lock();
    busy = false;
    if (tasks.empty()) idle_again.notify_all();
  }
  close(abort_fd);
  g_stream_threads--;
}

// Ends what runs and drops what waits; the stream is as good as new then. No failure comes of it.
void Stream::abort() {
  std::unique_lock<std::mutex> lock(mutex);
  aborts++;
  for (auto &task : tasks)
    if (task.discard) task.discard();
  tasks.clear();
  if (busy) {
    aborting = true;
    eventfd_write(abort_fd, 1);
    idle_again.wait(lock, [&] { return !busy; });
    eventfd_t ignored;
    eventfd_read(abort_fd, &ignored);
    aborting = false;
  }
  error = 0;
  idle_again.notify_all();
}

IMMORTAL(std::mutex, streams_mutex)
IMMORTAL(std::set<Stream *>, streams)
Stream *new_stream(int device) {
  static std::atomic<int> ids{0};
  auto *stream = new Stream;
  stream->id = ids++;
  stream->device = device;
  std::lock_guard<std::mutex> lock(streams_mutex());
  streams().insert(stream);
  return stream;
}
Stream *as_stream(aclrtStream handle) {
  if (handle) return (Stream *)handle;
  static Stream *defaults[kMaxDevices];
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  auto &stream = defaults[npusim::current_device()];
  if (!stream) stream = new_stream(npusim::current_device());
  return stream;
}

// ------------------------------------------------------------------------------------ graphs
// A captured graph is the work of one stream, to be done again in the same order.
struct Graph {
  Stream *stream;  // nullptr when it has been captured
  std::vector<std::function<int()>> work;
};
IMMORTAL(std::mutex, graphs_mutex)
IMMORTAL(std::set<Graph *>, captures)
Graph *capture_of(Stream *stream) {  // with graphs_mutex held
  for (auto *graph : captures())
    if (graph->stream == stream) return graph;
  return nullptr;
}
bool is_captured(Stream *stream) {
  std::lock_guard<std::mutex> lock(graphs_mutex());
  return capture_of(stream);
}

// ------------------------------------------------------------------------------------ events
struct EventState {
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t recorded = 0, done = 0, aborted = 0;
  Clock::time_point at{};
};
using Event = std::shared_ptr<EventState>;
Event &as_event(aclrtEvent handle) { return *(Event *)handle; }

uint64_t last_recorded(const Event &event) {
  std::lock_guard<std::mutex> lock(event->mutex);
  return event->recorded;
}
// On the thread of a stream, also returns when that is aborted. As in CANN, it does not when the
// record that it waits for is dropped with the stream that was to reach it.
void wait_on_stream(const Event &event, uint64_t record) {
  std::unique_lock<std::mutex> lock(event->mutex);
  while (event->done < record && !npusim::aborted())
    event->changed.wait_for(lock, std::chrono::milliseconds(5));
}
int wait_on_host(const Event &event, uint64_t record) {
  std::unique_lock<std::mutex> lock(event->mutex);
  event->changed.wait(lock, [&] { return event->done >= record || event->aborted >= record; });
  return event->done >= record ? ACL_SUCCESS : ACL_ERROR_RT_STREAM_ABORT;
}

// ------------------------------------------------------------------------------------ copies
aclError check_copy(void *to, size_t room, const void *from, size_t size, aclrtMemcpyKind kind) {
  if (size == 0) return ACL_SUCCESS;
  if (!to || !from || size > room) {
    npusim::set_error("copy of %zu bytes from %p to %p, where %zu fit", size, from, to, room);
    return ACL_ERROR_INVALID_PARAM;
  }
  bool to_device = npusim::is_device_range(to, size);
  bool from_device = npusim::is_device_range(from, size);
  bool right = true;
  switch (kind) {
    case ACL_MEMCPY_HOST_TO_HOST: right = !to_device && !from_device; break;
    case ACL_MEMCPY_HOST_TO_DEVICE: right = to_device && !from_device; break;
    case ACL_MEMCPY_DEVICE_TO_HOST: right = !to_device && from_device; break;
    case ACL_MEMCPY_DEVICE_TO_DEVICE: right = to_device && from_device; break;
    default: break;
  }
  if (right) return ACL_SUCCESS;
  npusim::set_error("copy of kind %d, to the device: %d, from the device: %d", (int)kind, to_device,
                    from_device);
  return ACL_ERROR_INVALID_PARAM;
}

IMMORTAL(std::mutex, error_mutex)
IMMORTAL(std::string, last_error)
}  // namespace

namespace npusim {
int submit(void *stream, std::function<int()> work) {
  auto *s = as_stream(stream);
  if (int stopped = g_stopped[s->device]) {
    set_error("device %d takes no more work after a failed task", s->device);
    return stopped;
  }
  {
    std::lock_guard<std::mutex> lock(graphs_mutex());
    if (auto *graph = capture_of(s)) {
      graph->work.push_back(std::move(work));
      return ACL_SUCCESS;
    }
  }
  s->push(std::move(work));
  return ACL_SUCCESS;
}

bool aborted() { return t_stream && t_stream->aborting; }
int abort_fd() { return t_stream->abort_fd; }

void set_error(const char *format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  trace("error: %s", text);
  std::lock_guard<std::mutex> lock(error_mutex());
  last_error() = std::string("npusim: ") + text;
}

void missing(const char *name) {
  fprintf(stderr, "npusim: %s is not simulated\n", name);
  fflush(stderr);
  abort();
}

void page_fault(const void *address) {
  fprintf(stderr, "npusim: %p is not mapped, and was touched\n", address);
  fflush(stderr);
  abort();
}

bool is_device_range(const void *start, size_t size) {
  if (size == 0) return true;
  std::lock_guard<std::mutex> lock(memory_mutex());
  const char *end = (const char *)start + size - 1;
  check_mapped(start);
  check_mapped(end);
  auto *first = find_block(start), *last = find_block(end);
  return first && last && !first->host && !last->host;
}

bool take_memory(int device, size_t size) {
  std::lock_guard<std::mutex> lock(memory_mutex());
  return take_locked(device, size);
}
void give_memory(int device, size_t size) {
  std::lock_guard<std::mutex> lock(memory_mutex());
  g_used[device] -= size;
}

int current_device() { return std::max(t_device, 0); }

void trace(const char *format, ...) {
  static bool verbose = env_long("NPU_SIM_VERBOSE", 0) != 0;
  if (!verbose) return;
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  fprintf(stderr, "npusim %d: %s\n", getpid(), text);
}
}  // namespace npusim

// What is in use now, as JSON; valid until the thread's next call.
API const char *npusim_counts() {
  static thread_local std::string json;
  json = "{\"device_memory\": [";
  {
    std::lock_guard<std::mutex> lock(memory_mutex());
    for (int i = 0; i < device_count(); i++) json += (i ? ", " : "") + std::to_string(g_used[i]);
    json += "], \"most_device_memory\": [";
    for (int i = 0; i < device_count(); i++) json += (i ? ", " : "") + std::to_string(g_most[i]);
    json += "], \"host_memory\": " + std::to_string(g_host_used);
  }
  {
    std::lock_guard<std::mutex> lock(streams_mutex());
    json += ", \"streams\": " + std::to_string(streams().size());
  }
  auto hccl = npusim::hccl_counts();
  json += ", \"stream_threads\": " + std::to_string(g_stream_threads) +
          ", \"communicators\": " + std::to_string(hccl.communicators) +
          ", \"p2p\": " + std::to_string(hccl.p2p) +
          ", \"p2p_pending\": " + std::to_string(hccl.p2p_pending) + "}";
  return json.c_str();
}

// From now on, "most_device_memory" is counted anew.
API void npusim_forget_most() {
  std::lock_guard<std::mutex> lock(memory_mutex());
  std::copy(std::begin(g_used), std::end(g_used), std::begin(g_most));
}

// ------------------------------------------------------------------------------------ device API
API aclError aclInit(const char *) {
  static std::atomic<bool> once{false};
  return once.exchange(true) ? ACL_ERROR_REPEAT_INITIALIZE : ACL_SUCCESS;
}
API aclError aclFinalize() { return ACL_SUCCESS; }
API const char *aclrtGetSocName() { return env_str("NPU_SIM_SOC", "Ascend910B1"); }
API const char *aclGetRecentErrMsg() {
  static thread_local std::string copy;
  std::lock_guard<std::mutex> lock(error_mutex());
  copy = std::move(last_error());
  last_error().clear();
  return copy.empty() ? nullptr : copy.c_str();
}
API aclError aclrtGetDeviceCount(uint32_t *count) {
  *count = device_count();
  return ACL_SUCCESS;
}
API aclError aclrtSetDevice(int32_t device) {
  if (device < 0 || device >= device_count()) {
    npusim::set_error("there are %d devices and no device %d", device_count(), device);
    return ACL_ERROR_RT_INVALID_DEVICEID;
  }
  t_device = device;
  return ACL_SUCCESS;
}
API aclError aclrtResetDevice(int32_t) { return ACL_SUCCESS; }
API aclError aclrtGetDevice(int32_t *device) {
  if (t_device < 0) return ACL_ERROR_RT_CONTEXT_NULL;
  *device = t_device;
  return ACL_SUCCESS;
}
// A device has one context, and its handle is its number, moved off the null pointer.
constexpr uintptr_t kContextBase = 0x1000;
API aclError aclrtGetCurrentContext(aclrtContext *context) {
  if (t_device < 0) return ACL_ERROR_RT_CONTEXT_NULL;
  *context = (aclrtContext)(kContextBase + t_device);
  return ACL_SUCCESS;
}
API aclError aclrtSetCurrentContext(aclrtContext context) {
  t_device = (int)((uintptr_t)context - kContextBase);
  return ACL_SUCCESS;
}
API aclError aclrtGetPrimaryCtxState(int32_t, uint32_t *flags, int32_t *active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return ACL_SUCCESS;
}
API aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t, int32_t) {
  *can = 1;
  return ACL_SUCCESS;
}
API aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return ACL_SUCCESS; }
API aclError aclrtDeviceGetBareTgid(int32_t *pid) {
  *pid = getpid();
  return ACL_SUCCESS;
}
constexpr int64_t kCubeCores = 24, kVectorCores = 48;  // of an Ascend 910B
API aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo, int64_t *value) {
  *value = kCubeCores;
  return ACL_SUCCESS;
}
API aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr what, int64_t *value) {
  *value = what == ACL_DEV_ATTR_VECTOR_CORE_NUM        ? kVectorCores
           : what == ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE ? (int64_t)memory_per_device()
                                                        : kCubeCores;
  return ACL_SUCCESS;
}
// torch_npu takes other paths with newer versions.
const char *cann_version() { return env_str("NPU_SIM_CANN_VERSION", "8.5.0"); }
API aclError aclsysGetCANNVersion(aclCANNPackageName package, aclCANNPackageVersion *version) {
  memset(version, 0, sizeof *version);
  snprintf(version->version, sizeof version->version, "%s",
           package == ACL_PKG_NAME_DRIVER ? "25.5.0" : cann_version());
  return ACL_SUCCESS;
}
API aclError aclsysGetVersionStr(char *, char *out) {
  strcpy(out, cann_version());
  return ACL_SUCCESS;
}

// ------------------------------------------------------------------------------------ memory API
API aclError aclrtMalloc(void **out, size_t size, aclrtMemMallocPolicy) {
  return allocate(out, size, false);
}
API aclError aclrtMallocAlign32(void **out, size_t size, aclrtMemMallocPolicy) {
  return allocate(out, size, false);
}
API aclError aclrtFree(void *address) { return release(address, false); }
API aclError aclrtMallocHost(void **out, size_t size) { return allocate(out, size, true); }
API aclError aclrtFreeHost(void *address) { return release(address, true); }
API aclError aclrtGetMemInfo(aclrtMemAttr, size_t *free_bytes, size_t *total) {
  std::lock_guard<std::mutex> lock(memory_mutex());
  *total = memory_per_device();
  *free_bytes = memory_per_device() - g_used[npusim::current_device()];
  return ACL_SUCCESS;
}
API aclError aclrtPointerGetAttributes(const void *address, aclrtPtrAttributes *attributes) {
  memset(attributes, 0, sizeof *attributes);
  std::lock_guard<std::mutex> lock(memory_mutex());
  auto *block = find_block(address);
  attributes->location.type = !block        ? ACL_MEM_LOCATION_TYPE_UNREGISTERED
                              : block->host ? ACL_MEM_LOCATION_TYPE_HOST
                                            : ACL_MEM_LOCATION_TYPE_DEVICE;
  attributes->location.id = block ? block->device : 0;
  return ACL_SUCCESS;
}
API aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t size,
                         aclrtMemcpyKind kind) {
  if (auto error = check_copy(to, room, from, size, kind)) return error;
  memcpy(to, from, size);
  return ACL_SUCCESS;
}
API aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size,
                              aclrtMemcpyKind kind, aclrtStream stream) {
  if (auto error = check_copy(to, room, from, size, kind)) return error;
  return npusim::submit(stream, [=] {
    memcpy(to, from, size);
    return 0;
  });
}
API aclError aclrtMemset(void *address, size_t room, int32_t value, size_t size) {
  if (size > room) return ACL_ERROR_INVALID_PARAM;
  memset(address, value, size);
  return ACL_SUCCESS;
}
API aclError aclrtMemsetAsync(void *address, size_t room, int32_t value, size_t size,
                              aclrtStream stream) {
  if (size > room) return ACL_ERROR_INVALID_PARAM;
  return npusim::submit(stream, [=] {
    memset(address, value, size);
    return 0;
  });
}

// Virtual memory, for PYTORCH_NPU_ALLOC_CONF=expandable_segments:True and for sleep: addresses without
// access are reserved, and mapping gives access. Touching them otherwise ends the process. What was
// unmapped is lost.
struct Physical {
  size_t size;
  int device;
};
API aclError aclrtReserveMemAddress(void **out, size_t size, size_t, void *, uint64_t) {
  void *p = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return ACL_ERROR_RT_MEMORY_ALLOCATION;
  std::lock_guard<std::mutex> lock(memory_mutex());
  reserved()[(uintptr_t)p] = size;
  *out = p;
  return ACL_SUCCESS;
}
API aclError aclrtReleaseMemAddress(void *address) {
  std::lock_guard<std::mutex> lock(memory_mutex());
  auto it = reserved().find((uintptr_t)address);
  if (it == reserved().end()) return ACL_ERROR_INVALID_PARAM;
  munmap(address, it->second);
  reserved().erase(it);
  return ACL_SUCCESS;
}
API aclError aclrtMallocPhysical(aclrtDrvMemHandle *handle, size_t size,
                                 const aclrtPhysicalMemProp *, uint64_t) {
  int device = npusim::current_device();
  if (allocation_fails(size) || !npusim::take_memory(device, size))
    return ACL_ERROR_RT_MEMORY_ALLOCATION;
  *handle = new Physical{size, device};
  return ACL_SUCCESS;
}
API aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
  auto *physical = (Physical *)handle;
  npusim::give_memory(physical->device, physical->size);
  delete physical;
  return ACL_SUCCESS;
}
API aclError aclrtMapMem(void *address, size_t size, size_t, aclrtDrvMemHandle handle, uint64_t) {
  if (mprotect(address, size, PROT_READ | PROT_WRITE)) return ACL_ERROR_RT_MEMORY_ALLOCATION;
  std::lock_guard<std::mutex> lock(memory_mutex());
  blocks()[(uintptr_t)address] = Block{size, ((Physical *)handle)->device, false};
  return ACL_SUCCESS;
}
API aclError aclrtUnmapMem(void *address) {
  std::lock_guard<std::mutex> lock(memory_mutex());
  auto it = blocks().find((uintptr_t)address);
  if (it == blocks().end()) return ACL_ERROR_INVALID_PARAM;
  madvise(address, it->second.size, MADV_DONTNEED);
  mprotect(address, it->second.size, PROT_NONE);
  blocks().erase(it);
  return ACL_SUCCESS;
}

// What vLLM Ascend's own library has for sleep: an allocator for torch_npu whose memory can be unmapped
// and mapped again while tensors have it. npusim_vllm tells vLLM Ascend of it.
using Handles = std::map<void *, aclrtDrvMemHandle>;
static IMMORTAL(Handles, sleep_handles)
static void (*g_sleep_allocated)(int device, size_t size, void *address);
static void (*g_sleep_freed)(void *address);
API void npusim_sleep_init(decltype(g_sleep_allocated) allocated, decltype(g_sleep_freed) freed) {
  g_sleep_allocated = allocated;
  g_sleep_freed = freed;
}
API aclError npusim_sleep_map(void *address, size_t size) {
  aclrtDrvMemHandle handle;
  if (auto error = aclrtMallocPhysical(&handle, size, nullptr, 0)) return error;
  if (auto error = aclrtMapMem(address, size, 0, handle, 0)) return error;
  poison(address, size);
  std::lock_guard<std::mutex> lock(memory_mutex());
  sleep_handles()[address] = handle;
  return ACL_SUCCESS;
}
API aclError npusim_sleep_unmap(void *address) {
  if (auto error = aclrtUnmapMem(address)) return error;
  std::unique_lock<std::mutex> lock(memory_mutex());
  auto handle = sleep_handles().extract(address).mapped();
  lock.unlock();
  return aclrtFreePhysical(handle);
}
API void *my_malloc(ssize_t size, int device, aclrtStream) {
  size_t granule = 2u << 20, rounded = ((size_t)size + granule - 1) / granule * granule;
  void *address;
  if (aclrtReserveMemAddress(&address, rounded, 0, nullptr, 0)) return nullptr;
  if (npusim_sleep_map(address, rounded)) return nullptr;
  g_sleep_allocated(device, rounded, address);
  return address;
}
API void my_free(void *address, size_t, int, aclrtStream) {
  g_sleep_freed(address);
  npusim_sleep_unmap(address);  // an error where it sleeps
  aclrtReleaseMemAddress(address);
}

// ------------------------------------------------------------------------------------ stream API
API aclError aclrtCreateStream(aclrtStream *out) {
  *out = new_stream(npusim::current_device());
  return ACL_SUCCESS;
}
API aclError aclrtCreateStreamWithConfig(aclrtStream *out, uint32_t, uint32_t) {
  return aclrtCreateStream(out);
}
API aclError aclrtSetStreamFailureMode(aclrtStream stream, uint64_t mode) {
  as_stream(stream)->stop_on_failure = mode == ACL_STOP_ON_FAILURE;
  return ACL_SUCCESS;
}
// torch_npu asks for names of what is captured, and for nothing else.
API aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr, aclrtStreamAttrValue *) {
  return ACL_SUCCESS;
}
API aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout_ms) {
  return as_stream(stream)->wait(timeout_ms);
}
API aclError aclrtSynchronizeStream(aclrtStream stream) {
  return aclrtSynchronizeStreamWithTimeout(stream, -1);
}
API aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout_ms) {
  std::vector<Stream *> of_device;
  {
    std::lock_guard<std::mutex> lock(streams_mutex());
    for (auto *stream : streams())
      if (stream->device == npusim::current_device()) of_device.push_back(stream);
  }
  for (auto *stream : of_device)
    if (int error = stream->wait(timeout_ms)) return error;
  return ACL_SUCCESS;
}
API aclError aclrtSynchronizeDevice() { return aclrtSynchronizeDeviceWithTimeout(-1); }
API aclError aclrtStreamAbort(aclrtStream stream) {
  if (!stream) return ACL_ERROR_INVALID_PARAM;
  as_stream(stream)->abort();
  return ACL_SUCCESS;
}
API aclError aclrtDestroyStream(aclrtStream stream) {
  auto *s = (Stream *)stream;
  {
    std::lock_guard<std::mutex> lock(streams_mutex());
    streams().erase(s);
  }
  std::lock_guard<std::mutex> lock(s->mutex);
  s->destroyed = true;  // and leaked, as its thread may still be in it
  s->queued.notify_all();
  return ACL_SUCCESS;
}
API aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }
API aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status) {
  *status =
      as_stream(stream)->idle() ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
  return ACL_SUCCESS;
}
API aclError aclrtStreamGetId(aclrtStream stream, int32_t *id) {
  *id = as_stream(stream)->id;
  return ACL_SUCCESS;
}
API aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void *arguments) {
  auto call = [=] {
    function(arguments);
    return 0;
  };
  as_stream(stream)->push({call, /*marker=*/true});
  return ACL_SUCCESS;
}
API aclError aclrtLaunchCallback(aclrtCallback function, void *arguments, aclrtCallbackBlockType,
                                 aclrtStream stream) {
  return aclrtLaunchHostFunc(stream, function, arguments);
}
API aclError aclrtSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
API aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
API aclError aclrtProcessReport(int32_t timeout_ms) {
  usleep(std::max(timeout_ms, 1) * 1000);
  return ACL_SUCCESS;
}

// ------------------------------------------------------------------------------------ event API
API aclError aclrtCreateEventExWithFlag(aclrtEvent *out, uint32_t) {
  *out = new Event(std::make_shared<EventState>());
  return ACL_SUCCESS;
}
API aclError aclrtCreateEventWithFlag(aclrtEvent *out, uint32_t flags) {
  return aclrtCreateEventExWithFlag(out, flags);
}
API aclError aclrtDestroyEvent(aclrtEvent handle) {
  delete (Event *)handle;
  return ACL_SUCCESS;
}
API aclError aclrtResetEvent(aclrtEvent, aclrtStream) { return ACL_SUCCESS; }
API aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream) {
  if (is_captured(as_stream(stream))) return ACL_SUCCESS;  // its work is in order anyway
  Event event = as_event(handle);
  uint64_t record;
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    record = ++event->recorded;
  }
  auto reach = [event, record] {
    std::lock_guard<std::mutex> lock(event->mutex);
    event->done = std::max(event->done, record);
    event->at = Clock::now();
    event->changed.notify_all();
    return 0;
  };
  auto drop = [event, record] {
    std::lock_guard<std::mutex> lock(event->mutex);
    event->aborted = std::max(event->aborted, record);
    event->changed.notify_all();
  };
  as_stream(stream)->push({reach, /*marker=*/true, drop});
  return ACL_SUCCESS;
}
API aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent handle) {
  if (is_captured(as_stream(stream))) return ACL_SUCCESS;
  Event event = as_event(handle);
  auto wait = [event, record = last_recorded(event)] {
    wait_on_stream(event, record);
    return 0;
  };
  as_stream(stream)->push({wait, /*marker=*/true});
  return ACL_SUCCESS;
}
API aclError aclrtSynchronizeEvent(aclrtEvent handle) {
  Event event = as_event(handle);
  return wait_on_host(event, last_recorded(event));
}
API aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus *status) {
  Event event = as_event(handle);
  std::lock_guard<std::mutex> lock(event->mutex);
  *status = event->recorded && event->done >= event->recorded
                ? ACL_EVENT_RECORDED_STATUS_COMPLETE
                : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  return ACL_SUCCESS;
}
API aclError aclrtQueryEventWaitStatus(aclrtEvent handle, aclrtEventWaitStatus *status) {
  Event event = as_event(handle);
  std::lock_guard<std::mutex> lock(event->mutex);
  *status = event->done >= event->recorded ? ACL_EVENT_WAIT_STATUS_COMPLETE
                                           : ACL_EVENT_WAIT_STATUS_NOT_READY;
  return ACL_SUCCESS;
}
API aclError aclrtEventElapsedTime(float *ms, aclrtEvent from, aclrtEvent to) {
  *ms = std::chrono::duration<float, std::milli>(as_event(to)->at - as_event(from)->at).count();
  return ACL_SUCCESS;
}
API aclError aclrtEventGetTimestamp(aclrtEvent handle, uint64_t *us) {
  auto since = as_event(handle)->at.time_since_epoch();
  *us = std::chrono::duration_cast<std::chrono::microseconds>(since).count();
  return ACL_SUCCESS;
}

// ------------------------------------------------------------------------------------ graph API
API aclError aclmdlRICaptureBegin(aclrtStream stream, aclmdlRICaptureMode) {
  std::lock_guard<std::mutex> lock(graphs_mutex());
  captures().insert(new Graph{as_stream(stream), {}});
  return ACL_SUCCESS;
}
API aclError aclmdlRICaptureGetInfo(aclrtStream stream, aclmdlRICaptureStatus *status,
                                    aclmdlRI *graph) {
  std::lock_guard<std::mutex> lock(graphs_mutex());
  auto *found = capture_of(as_stream(stream));
  *status = found ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_NONE;
  if (graph) *graph = found;
  return ACL_SUCCESS;
}
API aclError aclmdlRICaptureEnd(aclrtStream stream, aclmdlRI *graph) {
  std::lock_guard<std::mutex> lock(graphs_mutex());
  auto *found = capture_of(as_stream(stream));
  if (!found) return ACL_ERROR_INVALID_PARAM;
  captures().erase(found);
  found->stream = nullptr;
  *graph = found;
  return ACL_SUCCESS;
}
API aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode *) { return ACL_SUCCESS; }
API aclError aclmdlRIExecuteAsync(aclmdlRI graph, aclrtStream stream) {
  for (auto &work : ((Graph *)graph)->work)
    if (int error = npusim::submit(stream, work)) return error;
  return ACL_SUCCESS;
}
API aclError aclmdlRIDestroy(aclmdlRI graph) {
  delete (Graph *)graph;
  return ACL_SUCCESS;
}

// ------------------------------------------------------------------------------------ aclop
// The older way to call operators; torch_npu still converts formats with it before CANN 9.1.
struct aclTensorDesc {
  aclDataType type;
  aclFormat format, storage_format;
  std::vector<int64_t> sizes;
};
struct aclDataBuffer {
  void *data;
  size_t size;
};
API aclTensorDesc *aclCreateTensorDesc(aclDataType type, int dims, const int64_t *sizes,
                                       aclFormat format) {
  return new aclTensorDesc{type, format, format, {sizes, sizes + dims}};
}
API void aclDestroyTensorDesc(const aclTensorDesc *d) { delete d; }
API aclDataType aclGetTensorDescType(const aclTensorDesc *d) { return d->type; }
API aclFormat aclGetTensorDescFormat(const aclTensorDesc *d) { return d->format; }
API size_t aclGetTensorDescNumDims(const aclTensorDesc *d) { return d->sizes.size(); }
API aclError aclGetTensorDescDimV2(const aclTensorDesc *d, size_t dim, int64_t *size) {
  if (dim >= d->sizes.size()) return ACL_ERROR_INVALID_PARAM;
  *size = d->sizes[dim];
  return ACL_SUCCESS;
}
API void aclSetTensorDescName(aclTensorDesc *, const char *) {}
API aclError aclSetTensorFormat(aclTensorDesc *d, aclFormat format) {
  d->storage_format = format;
  return ACL_SUCCESS;
}
API aclError aclSetTensorShape(aclTensorDesc *, int, const int64_t *) { return ACL_SUCCESS; }
API aclError aclSetTensorPlaceMent(aclTensorDesc *, aclMemType) { return ACL_SUCCESS; }
API aclDataBuffer *aclCreateDataBuffer(void *data, size_t size) {
  return new aclDataBuffer{data, size};
}
API aclError aclDestroyDataBuffer(const aclDataBuffer *buffer) {
  delete buffer;
  return ACL_SUCCESS;
}
API aclopAttr *aclopCreateAttr() { return (aclopAttr *)new int(0); }
API void aclopDestroyAttr(const aclopAttr *attribute) { delete (const int *)attribute; }
#define IGNORED_ATTRIBUTE(name, ...) \
  API aclError name(aclopAttr *, const char *, __VA_ARGS__) { return ACL_SUCCESS; }
IGNORED_ATTRIBUTE(aclopSetAttrBool, uint8_t)
IGNORED_ATTRIBUTE(aclopSetAttrInt, int64_t)
IGNORED_ATTRIBUTE(aclopSetAttrFloat, float)
IGNORED_ATTRIBUTE(aclopSetAttrString, const char *)
IGNORED_ATTRIBUTE(aclopSetAttrDataType, aclDataType)
IGNORED_ATTRIBUTE(aclopSetAttrListBool, int, const uint8_t *)
IGNORED_ATTRIBUTE(aclopSetAttrListInt, int, const int64_t *)
IGNORED_ATTRIBUTE(aclopSetAttrListFloat, int, const float *)
IGNORED_ATTRIBUTE(aclopSetAttrListListInt, int, const int *, const int64_t *const[])
API aclError aclSetCompileopt(aclCompileOpt, const char *) { return ACL_SUCCESS; }
API size_t aclGetCompileoptSize(aclCompileOpt) { return sizeof "disable"; }
API aclError aclGetCompileopt(aclCompileOpt, char *value, size_t room) {
  snprintf(value, room, "disable");
  return ACL_SUCCESS;
}

static size_t element_size(aclDataType type) {
  switch (type) {
    case ACL_INT8: case ACL_UINT8: case ACL_BOOL: case ACL_FLOAT8_E4M3FN: case ACL_FLOAT8_E5M2:
      return 1;
    case ACL_FLOAT16: case ACL_BF16: case ACL_INT16: case ACL_UINT16:
      return 2;
    case ACL_INT64: case ACL_UINT64: case ACL_DOUBLE: case ACL_COMPLEX64:
      return 8;
    default:
      return 4;
  }
}
API aclError aclopCompileAndExecuteV2(const char *type, int inputs, aclTensorDesc *in_desc[],
                                      aclDataBuffer *in[], int outputs, aclTensorDesc *out_desc[],
                                      aclDataBuffer *out[], aclopAttr *, aclopEngineType,
                                      aclopCompileType, const char *, aclrtStream stream) {
  npusim::trace("aclop %s", type);
  std::string name = type;
  bool known = name == "TransData" || name == "Identity" || name == "Reshape";
  if (!known || inputs < 1 || outputs < 1) npusim::missing(("aclop " + name).c_str());
  const char *from = (const char *)in[0]->data;
  char *to = (char *)out[0]->data;
  bool from_nz = in_desc[0]->storage_format == ACL_FORMAT_FRACTAL_NZ;
  bool to_nz = out_desc[0]->storage_format == ACL_FORMAT_FRACTAL_NZ;
  if (from_nz != to_nz) {  // CANN inserts a TransData around an Identity
    auto sizes = to_nz ? in_desc[0]->sizes : out_desc[0]->sizes;
    size_t size = element_size(in_desc[0]->type);
    return npusim::submit(stream, [=] {
      transdata(from, to, sizes, size, to_nz);
      return 0;
    });
  }
  size_t size = std::min(in[0]->size, out[0]->size);
  return npusim::submit(stream, [=] {
    memcpy(to, from, size);
    return 0;
  });
}
API aclError aclopCompileAndExecute(const char *type, int inputs,
                                    const aclTensorDesc *const in_desc[],
                                    const aclDataBuffer *const in[], int outputs,
                                    const aclTensorDesc *const out_desc[],
                                    aclDataBuffer *const out[], const aclopAttr *attributes,
                                    aclopEngineType engine, aclopCompileType compile,
                                    const char *path, aclrtStream stream) {
  return aclopCompileAndExecuteV2(type, inputs, (aclTensorDesc **)in_desc, (aclDataBuffer **)in,
                                  outputs, (aclTensorDesc **)out_desc, (aclDataBuffer **)out,
                                  (aclopAttr *)attributes, engine, compile, path, stream);
}

// ------------------------------------------------------------------------------------ the rest
static std::atomic<int64_t> g_system_parameters[64];
API aclError aclrtSetSysParamOpt(aclSysParamOpt which, int64_t value) {
  g_system_parameters[(unsigned)which % 64] = value;
  return ACL_SUCCESS;
}
API aclError aclrtGetSysParamOpt(aclSysParamOpt which, int64_t *value) {
  *value = g_system_parameters[(unsigned)which % 64];
  return ACL_SUCCESS;
}
API aclError aclrtCtxSetSysParamOpt(aclSysParamOpt which, int64_t value) {
  return aclrtSetSysParamOpt(which, value);
}

#define NOTHING_TO_DO(name, ...) \
  API int name(__VA_ARGS__) { return 0; }
NOTHING_TO_DO(aclmdlInitDump)
NOTHING_TO_DO(aclmdlFinalizeDump)
NOTHING_TO_DO(aclmdlSetDump, const char *)
NOTHING_TO_DO(aclrtSetOpWaitTimeout, uint32_t)
NOTHING_TO_DO(aclrtSetOpExecuteTimeOut, uint32_t)
NOTHING_TO_DO(aclrtSetDeviceSatMode, aclrtFloatOverflowMode)
NOTHING_TO_DO(MsprofRegisterCallback, uint32_t, void *)
NOTHING_TO_DO(MsprofReportApi, uint32_t, const void *)
NOTHING_TO_DO(MsprofReportCompactInfo, uint32_t, const void *, uint32_t)
NOTHING_TO_DO(MsprofReportAdditionalInfo, uint32_t, const void *, uint32_t)
API uint64_t MsprofGetHashId(const char *text, size_t size) {
  return std::hash<std::string>()(std::string(text, size));
}
API uint64_t MsprofSysCycleTime() { return Clock::now().time_since_epoch().count(); }
API void aclAppLog(aclLogLevel, const char *, const char *, uint32_t, const char *, ...) {}

// libtorch_npu.so does not load without these names.
#define NOT_SIMULATED(name) \
  extern "C" __attribute__((visibility("default"))) int name##_() __asm__(#name); \
  int name##_() { npusim::missing(#name); }
NOT_SIMULATED(aclrtMemExportToShareableHandle)
NOT_SIMULATED(aclrtMemImportFromShareableHandle)
NOT_SIMULATED(aclrtMemSetPidToShareableHandle)
NOT_SIMULATED(aclrtBinaryGetFunction)
NOT_SIMULATED(aclrtBinaryLoadFromData)
NOT_SIMULATED(aclrtGetFunctionAddr)
NOT_SIMULATED(rtDevBinaryRegister)
NOT_SIMULATED(rtFunctionRegister)
NOT_SIMULATED(rtGetC2cCtrlAddr)
NOT_SIMULATED(rtKernelLaunch)
