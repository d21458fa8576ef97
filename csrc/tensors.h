#pragma once
// What every binding needs of torch: checks with full messages, threads, the stream, a launch.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launchers.h"
#include "kernels.h"

namespace osf {

// Raises RuntimeError with these words alone, which STD_TORCH_CHECK puts a file's path before.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  throw std::runtime_error(out.str());
}
#define OSF_CHECK(condition, ...) \
  if (!(condition)) ::osf::fail(__VA_ARGS__)

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

inline Shape shape(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

inline std::string text(const Shape& sizes) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << ']';
  return out.str();
}

inline std::string text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return torch::headeronly::toString(dtype);
  }
}

inline std::string device(const Tensor& t) {
  return t.is_cpu() ? "cpu" : "cuda:" + std::to_string(t.get_device_index());
}

inline DType dtype_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default: break;
  }
  fail(op, ": expected float32, float64, float16 or bfloat16, got ", text(t.scalar_type()));
}

inline ScalarType accumulation(ScalarType storage) {
  return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Checks that t has this shape, lies beside `first` and, without another dtype, has its dtype.
inline void check_like(const char* op, const char* name, const Tensor& t, const Shape& expected,
                       const Tensor& first, std::optional<ScalarType> other_dtype = {}) {
  OSF_CHECK(t.sizes() == IntHeaderOnlyArrayRef(expected), op, ": ", name, " must be ",
            text(expected), ", got ", text(shape(t)));
  const bool together = t.is_cpu() == first.is_cpu() &&
                        (t.is_cpu() || t.get_device_index() == first.get_device_index());
  OSF_CHECK(together, op, ": ", name, " must be on ", device(first), ", got ", device(t));
  const ScalarType dtype = other_dtype.value_or(first.scalar_type());
  OSF_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", text(dtype), ", got ",
            text(t.scalar_type()));
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Contiguous memory on the device of t, without the boxes of torch::stable::new_empty
inline Tensor empty(const Shape& sizes, ScalarType dtype, const Tensor& t) {
  Shape strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(1, sizes[i]))
    strides[i] = stride;
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      t.get_device_index(), &handle));
  return Tensor(handle);
}
inline Tensor empty(const Shape& sizes, const Tensor& t) {
  return empty(sizes, t.scalar_type(), t);
}

inline Threads threads() {
  return {torch::stable::get_num_threads(),
          [](int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
            STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, body, context));
          }};
}

// Square matrices as the kernels read them: packed by rows or by columns, or one for all; what is
// laid out otherwise is copied into q.
inline Matrices matrices(Tensor& q) {
  const int64_t n = q.dim(), D = q.size(n - 1);
  const auto sizes = q.sizes(), strides = q.strides();
  bool shared = true, packed = true;
  int64_t expected = D * D;
  for (int64_t i = n - 3; i >= 0; expected *= sizes[i--]) {
    shared &= sizes[i] == 1 || strides[i] == 0;
    packed &= sizes[i] == 1 || strides[i] == expected;
  }
  const bool rows = D == 1 || (strides[n - 1] == 1 && strides[n - 2] == D);
  const bool columns = strides[n - 2] == 1 && strides[n - 1] == D;
  if (!(rows || columns) || !(shared || packed)) {
    while (shared && q.dim() > 2) q = torch::stable::select(q, 0, 0);
    q = torch::stable::contiguous(q);
    return {q.const_data_ptr(), shared ? 0 : D * D, false};
  }
  return {q.const_data_ptr(), shared ? 0 : D * D, !rows};
}

// The stream that torch uses on a device, by a function of libtorch_cuda; it is looked up so that
// a build with CUDA also loads beside a torch without it.
inline void* current_stream(int32_t device_index) {
  using Get = AOTITorchError(int32_t, void**);
  static Get* const get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Get*>(symbol);
  }();
  OSF_CHECK(get != nullptr, "oneshot_fast: this torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device_index, &stream));
  return stream;
}

// Calls cpu(threads), or cuda(stream), which returns a cudaError_t, where t lives.
template <class Cpu, class Cuda>
void launch(const char* op, const Tensor& t, Cpu cpu, [[maybe_unused]] Cuda cuda) {
  if (t.is_cpu()) return cpu(threads());
#ifdef OSF_CUDA_ARCHITECTURES
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  const int error = cuda(current_stream(t.get_device_index()));
  OSF_CHECK(error == 0, op, ": CUDA error ", error, " (", cuda::error_text(error), ")");
#else
  fail(op, ": built without CUDA, got a tensor on ", device(t));
#endif
}

// Memory of a launch on the device of t, aligned as the kernels need it by torch's allocator.
inline Tensor workspace(const Tensor& t, int64_t bytes) {
  return empty({bytes}, ScalarType::Byte, t);
}

inline PatchGrid patch_grid(const char* op, const Shape& x, int64_t p, const Shape& leading) {
  OSF_CHECK(x.size() == 4, op, ": expected [B, C, H, W], got ", text(x));
  OSF_CHECK(p > 0 && x[2] % p == 0 && x[3] % p == 0, op, ": p = ", p, " must divide H and W of ",
            text(x));
  const size_t n = leading.size();
  OSF_CHECK(n == 0 || ((n == 1 || n == 3) && leading[0] == x[0]), op,
            ": one matrix for all, per image (", x[0], ") or per tile (", x[0], ", Gh, Gw), got ",
            text(leading));
  const PatchGrid grid{x[0], x[1], x[2], x[3], p, n == 3 ? leading[1] : 1, n == 3 ? leading[2] : 1};
  OSF_CHECK(grid.Gh > 0 && grid.Gw > 0 && x[2] / p % grid.Gh == 0 && x[3] / p % grid.Gw == 0, op,
            ": the grid of ", x[2] / p, " x ", x[3] / p, " patches is not divisible into ", grid.Gh,
            " x ", grid.Gw, " tiles");
  return grid;
}

// Number of matrices in [..., D, D].
inline int64_t check_square(const char* op, const Tensor& a) {
  const Shape sizes = shape(a);
  const size_t n = sizes.size();
  OSF_CHECK(n >= 2 && sizes[n - 1] == sizes[n - 2], op, ": expected [..., D, D], got ",
            text(sizes));
  int64_t count = 1;
  for (size_t i = 0; i + 2 < n; ++i) count *= sizes[i];
  return count;
}

// Checks [B, C, H, W] and returns C H W.
inline int64_t check_images(const char* op, const char* name, const Tensor& t) {
  const Shape sizes = shape(t);
  OSF_CHECK(sizes.size() == 4, op, ": ", name, " must be [B, C, H, W], got ", text(sizes));
  return sizes[1] * sizes[2] * sizes[3];
}

}  // namespace osf
