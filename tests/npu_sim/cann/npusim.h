// What the simulator's parts share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace npusim {
#pragma GCC visibility push(default)

// Queues work for the thread of a stream, in order; work that returns non-zero has failed, and with
// it the stream. Returns an error code where the device takes no more work.
int submit(void *stream, std::function<int()> work);

// Whether the stream of this thread is being aborted, and a file that is readable then.
bool aborted();
int abort_fd();

// What aclGetRecentErrMsg returns next.
void set_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

// Ends the process: going on without the function, it would fail later, elsewhere and namelessly.
[[noreturn]] void missing(const char *name);

// Ends the process, as such an access ends a device's context: the memory is reserved, not mapped.
[[noreturn]] void page_fault(const void *address);

bool is_device_range(const void *start, size_t size);

// Accounts for device memory that nobody touches, such as HCCL's buffers.
bool take_memory(int device, size_t size);
void give_memory(int device, size_t size);

int current_device();
void trace(const char *format, ...) __attribute__((format(printf, 1, 2)));

#pragma GCC visibility pop

long env_long(const char *name, long otherwise);
const char *env_str(const char *name, const char *otherwise);

// faults.cpp: see README.md for the language.
struct Fault {
  std::string where, what;
  std::optional<long> value;
  long nth = 0;  // 0: each one
  bool onwards = false;
  long seen = 0;
};
// Counts an event for each fault that waits for one of these names, and returns those due now. Only
// events of at least this size count for faults of "alloc".
std::vector<Fault> due(std::initializer_list<const char *> names, size_t size = 0);

// hccl.cpp, for npusim_counts.
struct HcclCounts {
  long communicators, p2p, p2p_pending;
};
HcclCounts hccl_counts();
}  // namespace npusim
