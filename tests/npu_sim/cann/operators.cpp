// A stand-in for libopapi.so: the aclnn operators, computed with ATen's CPU kernels right on the
// device memory, which is ordinary memory here.
//
// As in CANN, each operator is two functions: aclnnXGetWorkspaceSize captures the arguments in an
// executor, and aclnnX queues that executor on a stream. For each operator that torch_npu knows and
// this file does not, the build adds functions that end the process and name the operator.
#include "npusim.h"
#include "transdata.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <acl/acl_base.h>
#include <acl/acl_rt.h>
#include <c10/core/InferenceMode.h>

struct aclTensor {
  at::Tensor tensor;  // a CPU tensor on the device memory; of FRACTAL_NZ the storage
  std::vector<int64_t> sizes;
  aclFormat format;
  void *data;
};
struct aclScalar {
  at::Scalar value;
};
struct aclIntArray {
  std::vector<int64_t> values;
};
struct aclFloatArray {
  std::vector<float> values;
};
struct aclBoolArray {
  std::vector<char> values;
};
struct aclTensorList {
  std::vector<const aclTensor *> tensors;
};
struct aclScalarList {
  std::vector<const aclScalar *> scalars;
};
struct aclOpExecutor {
  std::function<void()> run;
  const char *name;
};

static at::ScalarType scalar_type(aclDataType type) {
  switch (type) {
    case ACL_FLOAT: return at::kFloat;
    case ACL_FLOAT16: return at::kHalf;
    case ACL_BF16: return at::kBFloat16;
    case ACL_DOUBLE: return at::kDouble;
    case ACL_INT8: return at::kChar;
    case ACL_UINT8: return at::kByte;
    case ACL_INT16: return at::kShort;
    case ACL_INT32: return at::kInt;
    case ACL_INT64: return at::kLong;
    case ACL_BOOL: return at::kBool;
    case ACL_UINT16: return at::kUInt16;
    case ACL_UINT32: return at::kUInt32;
    case ACL_UINT64: return at::kUInt64;
    case ACL_COMPLEX64: return at::kComplexFloat;
    case ACL_COMPLEX128: return at::kComplexDouble;
    case ACL_FLOAT8_E4M3FN: return at::kFloat8_e4m3fn;
    case ACL_FLOAT8_E5M2: return at::kFloat8_e5m2;
    default: npusim::missing(("acl data type " + std::to_string((int)type)).c_str());
  }
}

constexpr int kOperatorFailed = 561103;  // CANN's ACLNN_ERR_INNER_NULLPTR; any non-zero would do
static int guarded(const char *name, const std::function<void()> &work) {
  try {
    work();
    return 0;
  } catch (const std::exception &e) {
    npusim::set_error("%s: %s", name, e.what());
    fprintf(stderr, "npusim: %s: %s\n", name, e.what());
    return kOperatorFailed;
  }
}

// ------------------------------------------------------------------------------------ descriptors
API aclTensor *aclCreateTensor(const int64_t *sizes, uint64_t dims, aclDataType data_type,
                               const int64_t *strides, int64_t offset, aclFormat format,
                               const int64_t *storage, uint64_t storage_dims, void *data) {
  auto type = scalar_type(data_type);
  auto options = at::TensorOptions().dtype(type).device(at::kCPU);
  auto *out = new aclTensor;
  out->sizes.assign(sizes, sizes + dims);
  out->format = format;
  out->data = data;
  if (format == ACL_FORMAT_FRACTAL_NZ)
    out->tensor = at::from_blob(data, at::IntArrayRef(storage, storage_dims), options);
  else
    out->tensor = at::from_blob((char *)data + offset * (int64_t)c10::elementSize(type),
                                at::IntArrayRef(sizes, dims), at::IntArrayRef(strides, dims),
                                options);
  return out;
}
API aclScalar *aclCreateScalar(void *p, aclDataType type) {
  switch (type) {
    case ACL_FLOAT: return new aclScalar{*(float *)p};
    case ACL_DOUBLE: return new aclScalar{*(double *)p};
    case ACL_FLOAT16: return new aclScalar{(float)*(at::Half *)p};
    case ACL_BF16: return new aclScalar{(float)*(at::BFloat16 *)p};
    case ACL_BOOL: return new aclScalar{*(bool *)p};
    case ACL_INT8: return new aclScalar{*(int8_t *)p};
    case ACL_UINT8: return new aclScalar{*(uint8_t *)p};
    case ACL_INT16: return new aclScalar{*(int16_t *)p};
    case ACL_INT32: return new aclScalar{*(int32_t *)p};
    case ACL_COMPLEX64: return new aclScalar{*(c10::complex<float> *)p};
    case ACL_COMPLEX128: return new aclScalar{*(c10::complex<double> *)p};
    case ACL_INT64: return new aclScalar{*(int64_t *)p};
    default: npusim::missing(("a scalar of acl data type " + std::to_string((int)type)).c_str());
  }
}
#define ARRAY(name, element, how)                                      \
  API acl##name *aclCreate##name(element *values, uint64_t n) {        \
    return new acl##name{{values, values + n}};                        \
  }                                                                    \
  API int aclDestroy##name(const acl##name *p) {                       \
    how;                                                               \
    delete p;                                                          \
    return 0;                                                          \
  }
ARRAY(IntArray, const int64_t, )
ARRAY(FloatArray, const float, )
ARRAY(BoolArray, const bool, )
ARRAY(TensorList, const aclTensor *const, for (auto *t : p->tensors) delete t)
ARRAY(ScalarList, const aclScalar *const, for (auto *s : p->scalars) delete s)
API int aclDestroyTensor(const aclTensor *p) {
  delete p;
  return 0;
}
API int aclDestroyScalar(const aclScalar *p) {
  delete p;
  return 0;
}

// ------------------------------------------------------------------------------------ arguments
// What an operator below takes, with the C type it comes as. The descriptors are destroyed before
// the operator runs, so what they hold is taken out first; tensors still share the device memory.
using T = at::Tensor;
using S = at::Scalar;
using IA = std::vector<int64_t>;
using TL = std::vector<at::Tensor>;
struct DT {
  at::ScalarType type;
};

static T nd(const aclTensor *a) {  // inputs in FRACTAL_NZ are read through a copy in ND
  if (!a) return {};
  if (a->format != ACL_FORMAT_FRACTAL_NZ) return a->tensor;
  auto out = at::empty(a->sizes, a->tensor.options());
  transdata((const char *)a->data, (char *)out.data_ptr(), a->sizes, out.element_size(), false);
  return out;
}
template <class V> struct Argument {
  using C = V;
  static V take(C c) { return c; }
};
template <> struct Argument<T> {
  using C = const aclTensor *;
  static T take(C c) { return nd(c); }
};
template <> struct Argument<S> {
  using C = const aclScalar *;
  static S take(C c) { return c ? c->value : S(0); }
};
template <> struct Argument<IA> {
  using C = const aclIntArray *;
  static IA take(C c) { return c ? c->values : IA(); }
};
template <> struct Argument<DT> {
  using C = aclDataType;
  static DT take(C c) { return {scalar_type(c)}; }
};
template <> struct Argument<TL> {
  using C = const aclTensorList *;
  static TL take(C c) {
    TL tensors;
    if (c)
      for (auto *tensor : c->tensors) tensors.push_back(nd(tensor));
    return tensors;
  }
};

template <auto F, const char *name> struct Operator;
template <class... A, void (*F)(A...), const char *name> struct Operator<F, name> {
  static int prepare(typename Argument<A>::C... c, uint64_t *workspace, aclOpExecutor **executor) {
    return guarded(name, [&] {
      *workspace = 0;
      auto held = std::make_shared<std::tuple<A...>>(Argument<A>::take(c)...);
      *executor = new aclOpExecutor{[held] { std::apply(F, *held); }, name};
    });
  }
};
API int npusim_launch(void *, uint64_t, aclOpExecutor *executor, aclrtStream stream) {
  std::shared_ptr<aclOpExecutor> e(executor);
  return npusim::submit(stream, [e] {
    return guarded(e->name, [&] {
      c10::InferenceMode guard;  // the tensors may come from a thread in inference mode
      e->run();
    });
  });
}
#define LAUNCHED(name)                                         \
  API int name(void *, uint64_t, aclOpExecutor *, aclrtStream) \
      __attribute__((alias("npusim_launch")))
// An ifunc, whose resolver names the function that the symbol stands for, because the type of
// aclnnXGetWorkspaceSize differs for each operator.
#define ACLNN(name, ...)                                                                \
  static void name##_run(__VA_ARGS__);                                                  \
  static constexpr char name##_name[] = #name;                                          \
  extern "C" {                                                                          \
  static int (*name##_resolve())() {                                                    \
    return (int (*)())(void *)&Operator<name##_run, name##_name>::prepare;              \
  }                                                                                     \
  }                                                                                     \
  API int name##GetWorkspaceSize() __attribute__((ifunc(#name "_resolve")));            \
  LAUNCHED(name);                                                                       \
  static void name##_run(__VA_ARGS__)

// ------------------------------------------------------------------------------------ operators
// What weight transfer needs.
ACLNN(aclnnInplaceCopy, T dst, T src) { dst.copy_(src); }
ACLNN(aclnnCast, T in, DT, T out) { out.copy_(in); }
ACLNN(aclnnInplaceZero, T x) { x.zero_(); }
ACLNN(aclnnInplaceOne, T x) { x.fill_(1); }
ACLNN(aclnnInplaceFillScalar, T x, S v) { x.fill_(v); }
ACLNN(aclnnInplaceFillTensor, T x, T v) { x.fill_(v); }

ACLNN(aclnnConstantPadNd, T x, IA pad, S v, T out) { out.copy_(at::constant_pad_nd(x, pad, v)); }

// What tests and a small model need besides.
static void put(T &out, const T &value) { out.copy_(value); }
#define UNARY(name, expr) ACLNN(name, T x, T out) { put(out, expr); }
#define BINARY(name, expr) ACLNN(name, T x, T y, T out) { put(out, expr); }
#define BINARY_S(name, expr) ACLNN(name, T x, S y, T out) { put(out, expr); }
ACLNN(aclnnAdd, T x, T y, S a, T out) { put(out, at::add(x, y, a)); }
ACLNN(aclnnAdds, T x, S y, S a, T out) { put(out, at::add(x, y, a)); }
ACLNN(aclnnInplaceAdd, T x, T y, S a) { x.add_(y, a); }
ACLNN(aclnnInplaceAdds, T x, S y, S a) { x.add_(y, a); }
ACLNN(aclnnSub, T x, T y, S a, T out) { put(out, at::sub(x, y, a)); }
ACLNN(aclnnSubs, T x, S y, S a, T out) { put(out, at::sub(x, y, a)); }
BINARY(aclnnMul, at::mul(x, y))
BINARY_S(aclnnMuls, at::mul(x, y))
ACLNN(aclnnInplaceMul, T x, T y) { x.mul_(y); }
ACLNN(aclnnInplaceMuls, T x, S y) { x.mul_(y); }
BINARY(aclnnDiv, at::div(x, y))
BINARY_S(aclnnDivs, at::div(x, y))
BINARY_S(aclnnPowTensorScalar, at::pow(x, y))
BINARY(aclnnEqTensor, at::eq(x, y))
BINARY_S(aclnnEqScalar, at::eq(x, y))
BINARY(aclnnNeTensor, at::ne(x, y))
BINARY_S(aclnnNeScalar, at::ne(x, y))
BINARY_S(aclnnGtScalar, at::gt(x, y))
BINARY_S(aclnnLtScalar, at::lt(x, y))
BINARY_S(aclnnGeScalar, at::ge(x, y))
BINARY_S(aclnnLeScalar, at::le(x, y))
BINARY(aclnnMaximum, at::maximum(x, y))
UNARY(aclnnAbs, at::abs(x))
UNARY(aclnnNeg, at::neg(x))
UNARY(aclnnReciprocal, at::reciprocal(x))
UNARY(aclnnIsFinite, at::isfinite(x))
UNARY(aclnnRelu, at::relu(x))
UNARY(aclnnSilu, at::silu(x))
UNARY(aclnnGelu, at::gelu(x))
UNARY(aclnnRsqrt, at::rsqrt(x))
UNARY(aclnnSqrt, at::sqrt(x))
UNARY(aclnnExp, at::exp(x))
UNARY(aclnnCos, at::cos(x))
UNARY(aclnnSin, at::sin(x))
UNARY(aclnnSigmoid, at::sigmoid(x))
UNARY(aclnnTanh, at::tanh(x))
UNARY(aclnnMax, at::max(x))
UNARY(aclnnMin, at::min(x))
UNARY(aclnnLogicalNot, at::logical_not(x))
UNARY(aclnnBitwiseNot, at::bitwise_not(x))
BINARY(aclnnBitwiseAndTensor, at::bitwise_and(x, y))
BINARY(aclnnLogicalAnd, at::logical_and(x, y))
ACLNN(aclnnEqual, T x, T y, T out) { out.fill_(at::equal(x, y)); }
ACLNN(aclnnAll, T x, IA dims, bool keep, T out) {
  put(out, at::all(x, at::OptionalIntArrayRef(dims), keep));
}
ACLNN(aclnnAny, T x, IA dims, bool keep, T out) {
  put(out, at::any(x, at::OptionalIntArrayRef(dims), keep));
}
ACLNN(aclnnReduceSum, T x, IA dims, bool keep, DT dt, T out) {
  put(out, at::sum(x, at::OptionalIntArrayRef(dims), keep, dt.type));
}
ACLNN(aclnnMean, T x, IA dims, bool keep, DT dt, T out) {
  put(out, at::mean(x, at::OptionalIntArrayRef(dims), keep, dt.type));
}
ACLNN(aclnnAmax, T x, IA dims, bool keep, T out) { put(out, at::amax(x, dims, keep)); }
ACLNN(aclnnArgMax, T x, int64_t dim, bool keep, T out) { put(out, at::argmax(x, dim, keep)); }
ACLNN(aclnnSoftmax, T x, int64_t dim, T out) { put(out, at::softmax(x, dim)); }
ACLNN(aclnnLogSoftmax, T x, int64_t dim, T out) { put(out, at::log_softmax(x, dim)); }
ACLNN(aclnnMatmul, T x, T y, T out, int8_t) { put(out, at::matmul(x, y)); }
ACLNN(aclnnMatmulWeightNz, T x, T y, T out, int8_t) { put(out, at::matmul(x, y)); }
ACLNN(aclnnMm, T x, T y, T out, int8_t) { put(out, at::mm(x, y)); }
ACLNN(aclnnBatchMatMul, T x, T y, T out, int8_t) { put(out, at::matmul(x, y)); }
ACLNN(aclnnAddmm, T b, T x, T y, S beta, S alpha, T out, int8_t) {
  put(out, at::addmm(b, x, y, beta, alpha));
}
ACLNN(aclnnEmbedding, T w, T i, T out) { put(out, at::embedding(w, i)); }
ACLNN(aclnnIndexSelect, T x, int64_t dim, T i, T out) { put(out, at::index_select(x, dim, i)); }
ACLNN(aclnnGather, T x, int64_t dim, T i, T out) { put(out, at::gather(x, dim, i)); }
ACLNN(aclnnCat, TL xs, int64_t dim, T out) { put(out, at::cat(xs, dim)); }
ACLNN(aclnnArange, S a, S b, S c, T out) { put(out, at::arange(a, b, c, out.options())); }
ACLNN(aclnnRmsNorm, T x, T g, double eps, T y, T rstd) {
  auto f = x.to(at::kFloat);
  auto r = at::rsqrt(f.pow(2).mean(-1, true) + eps);
  put(y, f * r * g.to(at::kFloat));
  put(rstd, r);
}
ACLNN(aclnnLayerNorm, T x, IA shape, T w, T b, double eps, T y, T mean, T rstd) {
  auto r = at::native_layer_norm(x, shape, w, b, eps);
  put(y, std::get<0>(r));
  if (mean.defined()) put(mean, std::get<1>(r));
  if (rstd.defined()) put(rstd, std::get<2>(r));
}
ACLNN(aclnnInplaceNormal, T x, float mean, float std, int64_t seed, int64_t off) {
  auto g = at::make_generator<at::CPUGeneratorImpl>((uint64_t)(seed + off));
  x.normal_(mean, std, g);
}
ACLNN(aclnnInplaceUniform, T x, double a, double b, uint64_t seed, uint64_t off) {
  auto g = at::make_generator<at::CPUGeneratorImpl>(seed + off);
  x.uniform_(a, b, g);
}
ACLNN(aclnnTopk, T x, int64_t k, int64_t dim, bool largest, bool sorted, T v, T i) {
  auto r = at::topk(x, k, dim, largest, sorted);
  v.copy_(std::get<0>(r));
  i.copy_(std::get<1>(r));
}

// Before CANN 9.1 torch_npu converts formats with the aclop "Identity" instead.
API int aclnnNpuFormatCastCalculateSizeAndFormat(const aclTensor *src, int to_format, int,
                                                 int64_t **sizes, uint64_t *dims, int *format) {
  auto to_sizes = src->sizes;
  if (to_format == ACL_FORMAT_FRACTAL_NZ)
    to_sizes = nz_shape(src->sizes, src->tensor.element_size());
  *sizes = new int64_t[to_sizes.size()];
  std::copy(to_sizes.begin(), to_sizes.end(), *sizes);
  *dims = to_sizes.size();
  *format = to_format;
  return 0;
}
API int aclnnNpuFormatCastGetWorkspaceSize(const aclTensor *src, const aclTensor *dst,
                                           uint64_t *workspace, aclOpExecutor **executor) {
  *workspace = 0;
  auto convert = [from = (const char *)src->data, to = (char *)dst->data, sizes = src->sizes,
                  size = src->tensor.element_size(), to_nz = dst->format == ACL_FORMAT_FRACTAL_NZ] {
    transdata(from, to, sizes, size, to_nz);
  };
  *executor = new aclOpExecutor{convert, "aclnnNpuFormatCast"};
  return 0;
}
LAUNCHED(aclnnNpuFormatCast);
