// The only file that knows torch: schemas, checks, allocation, launch. Its stable ABI lets one
// build load in every later torch. The Python module `_C` itself only introspects.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <string>
#include <vector>

#include "kernels.h"

namespace osf {
namespace {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

Shape shape(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

std::string text(const Shape& sizes) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << ']';
  return out.str();
}

DType dtype_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default: break;
  }
  STD_TORCH_CHECK(false, op, ": expected Float, Double, Half or BFloat16, got ",
                  toString(t.scalar_type()));
}

ScalarType accumulation(ScalarType storage) {
  return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_like(const char* op, const char* name, const Tensor& t, const Shape& expected,
                ScalarType dtype) {
  const Shape actual = shape(t);
  STD_TORCH_CHECK(actual == expected, op, ": ", name, " must be ", text(expected), ", got ",
                  text(actual));
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", toString(dtype), ", got ",
                  toString(t.scalar_type()));
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Threads threads() {
  return {torch::stable::get_num_threads(),
          [](int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
            STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, body, context));
          }};
}

PatchGrid patch_grid(const char* op, const Shape& x, int64_t p, const Shape& leading) {
  STD_TORCH_CHECK(x.size() == 4, op, ": expected [B, C, H, W], got ", text(x));
  STD_TORCH_CHECK(p > 0 && x[2] % p == 0 && x[3] % p == 0, op, ": p = ", p,
                  " must divide H and W of ", text(x));
  const size_t n = leading.size();
  STD_TORCH_CHECK(n == 0 || ((n == 1 || n == 3) && leading[0] == x[0]), op,
                  ": one matrix for all, per image (", x[0], ") or per tile (", x[0],
                  ", Gh, Gw), got ", text(leading));
  const PatchGrid grid{x[0], x[1], x[2], x[3], p, n == 3 ? leading[1] : 1, n == 3 ? leading[2] : 1};
  STD_TORCH_CHECK(grid.Gh > 0 && grid.Gw > 0 && x[2] / p % grid.Gh == 0 && x[3] / p % grid.Gw == 0,
                  op, ": the grid of ", x[2] / p, " x ", x[3] / p,
                  " patches is not divisible into ", grid.Gh, " x ", grid.Gw, " tiles");
  return grid;
}

bool is_transposed(const Tensor& q) {
  const int64_t n = q.dim();
  const auto sizes = q.sizes(), strides = q.strides();
  if (strides[n - 2] != 1 || strides[n - 1] != sizes[n - 1]) return false;
  int64_t expected = sizes[n - 1] * sizes[n - 1];
  for (int64_t i = n - 3; i >= 0; expected *= sizes[i--])
    if (strides[i] != expected) return false;
  return true;
}

Tensor patch_rotate(Tensor x, Tensor q, int64_t p) {
  const char* op = "patch_rotate";
  STD_TORCH_CHECK(q.dim() >= 2, op, ": q must be [..., D, D], got ", text(shape(q)));
  Shape expected = shape(q);
  expected.resize(expected.size() - 2);
  const PatchGrid grid = patch_grid(op, shape(x), p, expected);
  const int64_t D = grid.dim(), stride = expected.empty() ? 0 : D * D;
  expected.insert(expected.end(), {D, D});
  check_like(op, "q", q, expected, x.scalar_type());
  const bool transposed = is_transposed(q);
  x = dense(x);
  q = transposed ? q : dense(q);
  Tensor out = torch::stable::empty_like(x);
  if (out.numel() == 0) return out;
  cpu_kernels().patch_rotate(threads(), dtype_of(op, x), grid, x.const_data_ptr(),
                             {q.const_data_ptr(), stride, transposed}, out.mutable_data_ptr());
  return out;
}

Tensor patch_outer(Tensor a, Tensor b, int64_t p, Shape leading) {
  const char* op = "patch_outer";
  const PatchGrid grid = patch_grid(op, shape(a), p, leading);
  check_like(op, "b", b, shape(a), a.scalar_type());
  const bool shared = leading.empty();
  leading.insert(leading.end(), {grid.dim(), grid.dim()});
  a = dense(a);
  b = dense(b);
  Tensor out = torch::stable::new_empty(a, leading);
  if (out.numel() == 0) return out;
  cpu_kernels().patch_outer(threads(), dtype_of(op, a), grid, a.const_data_ptr(),
                            b.const_data_ptr(), shared, out.mutable_data_ptr());
  return out;
}

// Number of matrices in [..., D, D].
int64_t check_square(const char* op, const Tensor& a) {
  const Shape sizes = shape(a);
  const size_t n = sizes.size();
  STD_TORCH_CHECK(n >= 2 && sizes[n - 1] == sizes[n - 2], op, ": expected [..., D, D], got ",
                  text(sizes));
  int64_t count = 1;
  for (size_t i = 0; i + 2 < n; ++i) count *= sizes[i];
  return count;
}

Tensor skew_exp(Tensor a) {
  const int64_t B = check_square("skew_exp", a), D = a.size(-1);
  a = dense(a);
  Tensor out = torch::stable::empty_like(a);
  if (out.numel() == 0) return out;
  cpu_kernels().skew_exp(threads(), dtype_of("skew_exp", a), B, D, a.const_data_ptr(),
                         out.mutable_data_ptr());
  return out;
}

Tensor d_skew_exp(Tensor grad, Tensor a, Tensor q) {
  const char* op = "d_skew_exp";
  const int64_t B = check_square(op, a), D = a.size(-1);
  check_like(op, "grad", grad, shape(a), a.scalar_type());
  check_like(op, "q", q, shape(a), a.scalar_type());
  grad = dense(grad);
  a = dense(a);
  q = dense(q);
  Tensor out = torch::stable::empty_like(a);
  if (out.numel() == 0) return out;
  cpu_kernels().d_skew_exp(threads(), dtype_of(op, a), B, D, grad.const_data_ptr(),
                           a.const_data_ptr(), q.const_data_ptr(), out.mutable_data_ptr());
  return out;
}

// Checks [B, C, H, W] and returns C H W.
int64_t check_images(const char* op, const char* name, const Tensor& t) {
  const Shape sizes = shape(t);
  STD_TORCH_CHECK(sizes.size() == 4, op, ": ", name, " must be [B, C, H, W], got ", text(sizes));
  return sizes[1] * sizes[2] * sizes[3];
}

Tensor latent_mse(Tensor eps_hat, Tensor x, Tensor target, double sigma) {
  const char* op = "latent_mse";
  const int64_t n = check_images(op, "eps_hat", eps_hat), B = eps_hat.size(0);
  const ScalarType dtype = eps_hat.scalar_type();
  check_like(op, "x", x, shape(eps_hat), dtype);
  check_like(op, "target", target, shape(eps_hat), dtype);
  eps_hat = dense(eps_hat);
  x = dense(x);
  target = dense(target);
  Tensor loss = torch::stable::new_empty(x, {B}, accumulation(dtype));
  cpu_kernels().latent_mse(threads(), dtype_of(op, x), B, n, eps_hat.const_data_ptr(),
                           x.const_data_ptr(), target.const_data_ptr(), sigma,
                           loss.mutable_data_ptr());
  return loss;
}

Tensor d_latent_mse(Tensor grad, Tensor eps_hat, Tensor x, Tensor target, double sigma,
                    double scale) {
  const char* op = "d_latent_mse";
  const int64_t n = check_images(op, "eps_hat", eps_hat), B = eps_hat.size(0);
  const ScalarType dtype = eps_hat.scalar_type();
  check_like(op, "grad", grad, {B}, accumulation(dtype));
  check_like(op, "x", x, shape(eps_hat), dtype);
  check_like(op, "target", target, shape(eps_hat), dtype);
  grad = dense(grad);
  eps_hat = dense(eps_hat);
  x = dense(x);
  target = dense(target);
  Tensor out = torch::stable::empty_like(x);
  cpu_kernels().d_latent_mse(threads(), dtype_of(op, x), B, n, grad.const_data_ptr(),
                             eps_hat.const_data_ptr(), x.const_data_ptr(), target.const_data_ptr(),
                             sigma, scale, out.mutable_data_ptr());
  return out;
}

Tensor pixel_l1(Tensor y, Tensor target) {
  const char* op = "pixel_l1";
  const int64_t n = check_images(op, "y", y), B = y.size(0);
  check_like(op, "target", target, shape(y), y.scalar_type());
  y = dense(y);
  target = dense(target);
  Tensor loss = torch::stable::new_empty(y, {B}, accumulation(y.scalar_type()));
  cpu_kernels().pixel_l1(threads(), dtype_of(op, y), B, n, y.const_data_ptr(),
                         target.const_data_ptr(), loss.mutable_data_ptr());
  return loss;
}

Tensor d_pixel_l1(Tensor grad, Tensor y, Tensor target, bool wrt_target) {
  const char* op = "d_pixel_l1";
  const int64_t n = check_images(op, "y", y), B = y.size(0);
  check_like(op, "grad", grad, {B}, accumulation(y.scalar_type()));
  check_like(op, "target", target, shape(y), y.scalar_type());
  grad = dense(grad);
  y = dense(y);
  target = dense(target);
  Tensor out = torch::stable::empty_like(y);
  cpu_kernels().d_pixel_l1(threads(), dtype_of(op, y), B, n, grad.const_data_ptr(),
                           y.const_data_ptr(), target.const_data_ptr(), wrt_target,
                           out.mutable_data_ptr());
  return out;
}

}  // namespace
}  // namespace osf

STABLE_TORCH_LIBRARY(oneshot_fast, m) {
  m.def("patch_rotate(Tensor x, Tensor q, int p) -> Tensor");
  m.def("patch_outer(Tensor a, Tensor b, int p, int[] leading) -> Tensor");
  m.def("skew_exp(Tensor a) -> Tensor");
  m.def("d_skew_exp(Tensor grad, Tensor a, Tensor q) -> Tensor");
  m.def("latent_mse(Tensor eps_hat, Tensor x, Tensor target, float sigma) -> Tensor");
  m.def(
      "d_latent_mse(Tensor grad, Tensor eps_hat, Tensor x, Tensor target, float sigma, "
      "float scale) -> Tensor");
  m.def("pixel_l1(Tensor y, Tensor target) -> Tensor");
  m.def("d_pixel_l1(Tensor grad, Tensor y, Tensor target, bool wrt_target) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(oneshot_fast, CPU, m) {
  m.impl("patch_rotate", TORCH_BOX(&osf::patch_rotate));
  m.impl("patch_outer", TORCH_BOX(&osf::patch_outer));
  m.impl("skew_exp", TORCH_BOX(&osf::skew_exp));
  m.impl("d_skew_exp", TORCH_BOX(&osf::d_skew_exp));
  m.impl("latent_mse", TORCH_BOX(&osf::latent_mse));
  m.impl("d_latent_mse", TORCH_BOX(&osf::d_latent_mse));
  m.impl("pixel_l1", TORCH_BOX(&osf::pixel_l1));
  m.impl("d_pixel_l1", TORCH_BOX(&osf::d_pixel_l1));
}

PYBIND11_MODULE(_C, m) {
  m.attr("torch_version") = OSF_TORCH_VERSION;
  m.attr("compiler") = OSF_COMPILER;
  m.def("isa", [] { return osf::cpu_kernels().isa; });
}
