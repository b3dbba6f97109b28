// Runs most aten operators on the CPU, in place of torch_npu's kernels: copies in, CPU kernel,
// copies out. torch.ops.load_library loads it after torch_npu.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/CPUFallback.h>

#include <cstdlib>
#include <set>
#include <string>
#include <vector>

namespace {
constexpr auto kNpu = c10::DispatchKey::PrivateUse1;
constexpr auto kNpuAutograd = c10::DispatchKey::AutogradPrivateUse1;

void run_on_cpu(const c10::OperatorHandle &op, torch::jit::Stack *stack) {
  static bool trace = getenv("NPU_SIM_TRACE_FALLBACK") != nullptr;
  if (trace) fprintf(stderr, "npusim: on the CPU: %s\n", toString(op.operator_name()).c_str());
  at::native::cpu_fallback(op, stack, /*error_on_views=*/false, c10::DispatchKey::CPU);
}

// These stay with torch_npu: allocation, copies, views, storage, and what operators.cpp implements.
const std::set<std::string> kKept = {
    "_copy_from", "_copy_from_and_resize", "_foreach_copy_", "_has_compatible_shallow_copy_type",
    "_lazy_clone", "_local_scalar_dense", "_pin_memory", "_reshape_alias", "_resize_output_",
    "_to_copy", "add", "add_", "addmm", "bmm", "clone", "contiguous", "copy_", "embedding",
    "equal", "fill_", "full", "is_pinned", "is_set_to", "item", "lift_fresh", "linear", "matmul",
    "mm", "mul", "mul_", "ones", "ones_like", "pin_memory", "record_stream", "resize_",
    "resize_as_", "set_", "storage_size", "to", "zero_", "zeros", "zeros_like"};

bool starts_with(const std::string &text, const char *start) { return text.rfind(start, 0) == 0; }

bool returns_view(const c10::FunctionSchema &schema) {
  for (auto &value : schema.returns())
    if (value.alias_info() && !value.alias_info()->isWrite()) return true;
  return false;
}

bool is_replaced(const c10::OperatorHandle &op) {
  std::string name = op.operator_name().name.substr(strlen("aten::"));
  return !kKept.count(name) && !starts_with(name, "empty") && !starts_with(name, "new_") &&
         op.hasKernelForDispatchKey(kNpu) &&
         op.hasComputedKernelForDispatchKey(c10::DispatchKey::CPU) && !returns_view(op.schema());
}

std::vector<c10::RegistrationHandleRAII> replace_kernels() {
  std::vector<c10::RegistrationHandleRAII> handles;
  auto &dispatcher = c10::Dispatcher::singleton();
  auto replace = [&](const c10::OperatorName &name, c10::DispatchKey key) {
    auto kernel = c10::KernelFunction::makeFromBoxedFunction<&run_on_cpu>();
    handles.push_back(
        dispatcher.registerImpl(name, key, std::move(kernel), std::nullopt, nullptr, "npusim"));
  };
  for (auto &name : dispatcher.getAllOpNames()) {
    auto op = dispatcher.findOp(name);
    if (!starts_with(name.name, "aten::") || !op || !op->hasSchema()) continue;
    if (is_replaced(*op)) replace(name, kNpu);
    // torch_npu has its own above autograd, where this one stands in as well.
    if (name.name == "aten::scaled_dot_product_attention" &&
        op->hasKernelForDispatchKey(kNpuAutograd))
      replace(name, kNpuAutograd);
  }
  return handles;
}
// Never destroyed: unregistering at exit would be too late for the dispatcher.
auto *handles = new auto(replace_kernels());
}  // namespace
