// Schemas, checks, allocation, launch and registration of every op. Torch's stable ABI lets one
// build load in every later torch, Python's in every later Python. The module `_C` only
// introspects.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace osf {
namespace {

// x rotated by q, or by q^T
Tensor rotate(const char* op, Tensor x, Tensor q, int64_t p, bool transpose) {
  OSF_CHECK(q.dim() >= 2, op, ": q must be [..., D, D], got ", text(shape(q)));
  Shape expected = shape(q);
  expected.resize(expected.size() - 2);
  const PatchGrid grid = patch_grid(op, shape(x), p, expected);
  expected.insert(expected.end(), {grid.dim(), grid.dim()});
  check_like(op, "q", q, expected, x);
  x = dense(x);
  Tensor out = empty(shape(x), x);
  if (out.numel() == 0) return out;
  const DType dtype = dtype_of(op, x);
  Matrices matrices = osf::matrices(q);
  matrices.transposed ^= transpose;
  launch(
      op, x,
      [&](const Threads& threads) {
        cpu_kernels().patch_rotate(threads, dtype, grid, x.const_data_ptr(), matrices,
                                   out.mutable_data_ptr());
      },
      [&](void* stream) {
        return cuda::patch_rotate(dtype, grid, x.const_data_ptr(), matrices, out.mutable_data_ptr(),
                                  stream);
      });
  return out;
}

Tensor patch_rotate(Tensor x, Tensor q, int64_t p) {
  return rotate("patch_rotate", x, q, p, false);
}

Tensor patch_outer(Tensor a, Tensor b, int64_t p, Shape leading) {
  const char* op = "patch_outer";
  const PatchGrid grid = patch_grid(op, shape(a), p, leading);
  check_like(op, "b", b, shape(a), a);
  const bool shared = leading.empty();
  leading.insert(leading.end(), {grid.dim(), grid.dim()});
  a = dense(a);
  b = dense(b);
  Tensor out = empty(leading, a);
  if (out.numel() == 0) return out;
  const DType dtype = dtype_of(op, a);
  launch(
      op, a,
      [&](const Threads& threads) {
        cpu_kernels().patch_outer(threads, dtype, grid, a.const_data_ptr(), b.const_data_ptr(),
                                  shared, out.mutable_data_ptr());
      },
      [&](void* stream) {
        const Tensor work = workspace(a, cuda::patch_outer_workspace_bytes(dtype, grid, shared));
        return cuda::patch_outer(dtype, grid, a.const_data_ptr(), b.const_data_ptr(), shared,
                                 work.mutable_data_ptr(), out.mutable_data_ptr(), stream);
      });
  return out;
}

// Both gradients of patch_rotate in one call
std::tuple<Tensor, Tensor> d_patch_rotate(Tensor grad, Tensor x, Tensor q, int64_t p) {
  Shape leading = shape(q);
  leading.resize(leading.size() - 2);
  return {rotate("d_patch_rotate", grad, q, p, true), patch_outer(grad, x, p, leading)};
}

Tensor skew_exp(Tensor a) {
  const char* op = "skew_exp";
  const int64_t B = check_square(op, a), D = a.size(-1);
  a = dense(a);
  Tensor out = empty(shape(a), a);
  if (out.numel() == 0) return out;
  const DType dtype = dtype_of(op, a);
  launch(
      op, a,
      [&](const Threads& threads) {
        cpu_kernels().skew_exp(threads, dtype, B, D, a.const_data_ptr(), out.mutable_data_ptr());
      },
      [&](void* stream) {
        const Tensor work = workspace(a, cuda::skew_exp_workspace_bytes(dtype, B, D));
        return cuda::skew_exp(dtype, B, D, a.const_data_ptr(), work.mutable_data_ptr(),
                              out.mutable_data_ptr(), stream);
      });
  return out;
}

Tensor d_skew_exp(Tensor grad, Tensor a, Tensor q) {
  const char* op = "d_skew_exp";
  const int64_t B = check_square(op, a), D = a.size(-1);
  check_like(op, "grad", grad, shape(a), a);
  check_like(op, "q", q, shape(a), a);
  grad = dense(grad);
  a = dense(a);
  q = dense(q);
  Tensor out = empty(shape(a), a);
  if (out.numel() == 0) return out;
  const DType dtype = dtype_of(op, a);
  launch(
      op, a,
      [&](const Threads& threads) {
        cpu_kernels().d_skew_exp(threads, dtype, B, D, grad.const_data_ptr(), a.const_data_ptr(),
                                 q.const_data_ptr(), out.mutable_data_ptr());
      },
      [&](void* stream) {
        const Tensor work = workspace(a, cuda::d_skew_exp_workspace_bytes(dtype, B, D));
        return cuda::d_skew_exp(dtype, B, D, grad.const_data_ptr(), a.const_data_ptr(),
                                q.const_data_ptr(), work.mutable_data_ptr(), out.mutable_data_ptr(),
                                stream);
      });
  return out;
}

std::tuple<Tensor, Tensor> cayley(Tensor a) {
  const char* op = "cayley";
  const int64_t B = check_square(op, a), D = a.size(-1);
  const DType dtype = dtype_of(op, a);
  a = dense(a);
  Tensor out = empty(shape(a), a);
  Tensor resolvent = empty(shape(a), accumulation(a.scalar_type()), a);
  if (out.numel() > 0)
    cpu_kernels().cayley(threads(), dtype, B, D, a.const_data_ptr(), out.mutable_data_ptr(),
                         resolvent.mutable_data_ptr());
  return {out, resolvent};
}

Tensor d_cayley(Tensor grad, Tensor resolvent) {
  const char* op = "d_cayley";
  const int64_t B = check_square(op, grad), D = grad.size(-1);
  const DType dtype = dtype_of(op, grad);
  check_like(op, "resolvent", resolvent, shape(grad), grad, accumulation(grad.scalar_type()));
  grad = dense(grad);
  resolvent = dense(resolvent);
  Tensor out = empty(shape(grad), grad);
  if (out.numel() > 0)
    cpu_kernels().d_cayley(threads(), dtype, B, D, grad.const_data_ptr(),
                           resolvent.const_data_ptr(), out.mutable_data_ptr());
  return out;
}

void rotation_step(Tensor q, Tensor g, Tensor m, Tensor v, Tensor steps, double lr, double beta1,
                   double beta2, double eps, double max_angle) {
  const char* op = "rotation_step";
  const int64_t B = check_square(op, g), D = g.size(-1);
  const DType dtype = dtype_of(op, g);
  const ScalarType state = accumulation(g.scalar_type());
  Shape leading = shape(g);
  leading.resize(leading.size() - 2);
  const bool scalar = shape(v) == leading;
  check_like(op, "q", q, shape(g), g, state);
  check_like(op, "m", m, shape(g), g, state);
  check_like(op, "v", v, scalar ? leading : shape(g), g, state);
  check_like(op, "steps", steps, leading, g, state);
  g = dense(g);
  Tensor inout[] = {q, m, v, steps};
  const Tensor work[] = {dense(q), dense(m), dense(v), dense(steps)};
  if (g.numel() == 0) return;
  const RotationOptions options{lr, beta1, beta2, eps, max_angle, scalar};
  void* p[4];
  for (int i = 0; i < 4; ++i) p[i] = work[i].mutable_data_ptr();
  launch(
      op, g,
      [&](const Threads& threads) {
        cpu_kernels().rotation_step(threads, dtype, B, D, options, g.const_data_ptr(), p[0], p[1],
                                    p[2], p[3]);
      },
      [&](void* stream) {
        OSF_CHECK(D <= (dtype == DType::f64 ? 32 : 64), op, ": no kernel for D = ", D,
                  " on a GPU; oneshot_fast.ops.rotation_step composes it of others");
        return cuda::rotation_step(dtype, B, D, options, g.const_data_ptr(), p[0], p[1], p[2], p[3],
                                   stream);
      });
  for (int i = 0; i < 4; ++i)
    if (!inout[i].is_contiguous()) torch::stable::copy_(inout[i], work[i]);
}

Tensor latent_mse(Tensor eps_hat, Tensor x, Tensor target, double sigma) {
  const char* op = "latent_mse";
  const int64_t n = check_images(op, "eps_hat", eps_hat), B = eps_hat.size(0);
  check_like(op, "x", x, shape(eps_hat), eps_hat);
  check_like(op, "target", target, shape(eps_hat), eps_hat);
  eps_hat = dense(eps_hat);
  x = dense(x);
  target = dense(target);
  Tensor loss = empty({B}, accumulation(x.scalar_type()), x);
  const DType dtype = dtype_of(op, x);
  launch(
      op, x,
      [&](const Threads& threads) {
        cpu_kernels().latent_mse(threads, dtype, B, n, eps_hat.const_data_ptr(), x.const_data_ptr(),
                                 target.const_data_ptr(), sigma, loss.mutable_data_ptr());
      },
      [&](void* stream) {
        const Tensor work = workspace(x, cuda::loss_workspace_bytes(B, n));
        return cuda::latent_mse(dtype, B, n, eps_hat.const_data_ptr(), x.const_data_ptr(),
                                target.const_data_ptr(), sigma, work.mutable_data_ptr(),
                                loss.mutable_data_ptr(), stream);
      });
  return loss;
}

Tensor d_latent_mse(Tensor grad, Tensor eps_hat, Tensor x, Tensor target, double sigma,
                    double scale) {
  const char* op = "d_latent_mse";
  const int64_t n = check_images(op, "eps_hat", eps_hat), B = eps_hat.size(0);
  check_like(op, "grad", grad, {B}, eps_hat, accumulation(eps_hat.scalar_type()));
  check_like(op, "x", x, shape(eps_hat), eps_hat);
  check_like(op, "target", target, shape(eps_hat), eps_hat);
  grad = dense(grad);
  eps_hat = dense(eps_hat);
  x = dense(x);
  target = dense(target);
  Tensor out = empty(shape(x), x);
  const DType dtype = dtype_of(op, x);
  launch(
      op, x,
      [&](const Threads& threads) {
        cpu_kernels().d_latent_mse(threads, dtype, B, n, grad.const_data_ptr(),
                                   eps_hat.const_data_ptr(), x.const_data_ptr(),
                                   target.const_data_ptr(), sigma, scale, out.mutable_data_ptr());
      },
      [&](void* stream) {
        return cuda::d_latent_mse(dtype, B, n, grad.const_data_ptr(), eps_hat.const_data_ptr(),
                                  x.const_data_ptr(), target.const_data_ptr(), sigma, scale,
                                  out.mutable_data_ptr(), stream);
      });
  return out;
}

Tensor pixel_l1(Tensor y, Tensor target) {
  const char* op = "pixel_l1";
  const int64_t n = check_images(op, "y", y), B = y.size(0);
  check_like(op, "target", target, shape(y), y);
  y = dense(y);
  target = dense(target);
  Tensor loss = empty({B}, accumulation(y.scalar_type()), y);
  const DType dtype = dtype_of(op, y);
  launch(
      op, y,
      [&](const Threads& threads) {
        cpu_kernels().pixel_l1(threads, dtype, B, n, y.const_data_ptr(), target.const_data_ptr(),
                               loss.mutable_data_ptr());
      },
      [&](void* stream) {
        const Tensor work = workspace(y, cuda::loss_workspace_bytes(B, n));
        return cuda::pixel_l1(dtype, B, n, y.const_data_ptr(), target.const_data_ptr(),
                              work.mutable_data_ptr(), loss.mutable_data_ptr(), stream);
      });
  return loss;
}

Tensor d_pixel_l1(Tensor grad, Tensor y, Tensor target, bool wrt_target) {
  const char* op = "d_pixel_l1";
  const int64_t n = check_images(op, "y", y), B = y.size(0);
  check_like(op, "grad", grad, {B}, y, accumulation(y.scalar_type()));
  check_like(op, "target", target, shape(y), y);
  grad = dense(grad);
  y = dense(y);
  target = dense(target);
  Tensor out = empty(shape(y), y);
  const DType dtype = dtype_of(op, y);
  launch(
      op, y,
      [&](const Threads& threads) {
        cpu_kernels().d_pixel_l1(threads, dtype, B, n, grad.const_data_ptr(), y.const_data_ptr(),
                                 target.const_data_ptr(), wrt_target, out.mutable_data_ptr());
      },
      [&](void* stream) {
        return cuda::d_pixel_l1(dtype, B, n, grad.const_data_ptr(), y.const_data_ptr(),
                                target.const_data_ptr(), wrt_target, out.mutable_data_ptr(),
                                stream);
      });
  return out;
}

using torch::stable::detail::StableLibrary;

void define(StableLibrary& m) {
  m.def("patch_rotate(Tensor x, Tensor q, int p) -> Tensor");
  m.def("d_patch_rotate(Tensor grad, Tensor x, Tensor q, int p) -> (Tensor, Tensor)");
  m.def("patch_outer(Tensor a, Tensor b, int p, int[] leading) -> Tensor");
  m.def("skew_exp(Tensor a) -> Tensor");
  m.def("d_skew_exp(Tensor grad, Tensor a, Tensor q) -> Tensor");
  m.def("cayley(Tensor a) -> (Tensor, Tensor)");
  m.def("d_cayley(Tensor grad, Tensor resolvent) -> Tensor");
  m.def(
      "rotation_step(Tensor(a!) q, Tensor g, Tensor(b!) m, Tensor(c!) v, Tensor(d!) steps, "
      "float lr, float beta1, float beta2, float eps, float max_angle) -> ()");
  m.def("latent_mse(Tensor eps_hat, Tensor x, Tensor target, float sigma) -> Tensor");
  m.def(
      "d_latent_mse(Tensor grad, Tensor eps_hat, Tensor x, Tensor target, float sigma, "
      "float scale) -> Tensor");
  m.def("pixel_l1(Tensor y, Tensor target) -> Tensor");
  m.def("d_pixel_l1(Tensor grad, Tensor y, Tensor target, bool wrt_target) -> Tensor");
}

void implement(StableLibrary& m) {
  m.impl("patch_rotate", TORCH_BOX(&patch_rotate));
  m.impl("d_patch_rotate", TORCH_BOX(&d_patch_rotate));
  m.impl("patch_outer", TORCH_BOX(&patch_outer));
  m.impl("skew_exp", TORCH_BOX(&skew_exp));
  m.impl("d_skew_exp", TORCH_BOX(&d_skew_exp));
  m.impl("rotation_step", TORCH_BOX(&rotation_step));
  m.impl("latent_mse", TORCH_BOX(&latent_mse));
  m.impl("d_latent_mse", TORCH_BOX(&d_latent_mse));
  m.impl("pixel_l1", TORCH_BOX(&pixel_l1));
  m.impl("d_pixel_l1", TORCH_BOX(&d_pixel_l1));
}

}  // namespace
}  // namespace osf

STABLE_TORCH_LIBRARY(oneshot_fast, m) { osf::define(m); }
STABLE_TORCH_LIBRARY_IMPL(oneshot_fast, CPU, m) {
  osf::implement(m);
  m.impl("cayley", TORCH_BOX(&osf::cayley));  // elsewhere made of torch's ops
  m.impl("d_cayley", TORCH_BOX(&osf::d_cayley));
}

// The same a second time, for a process in which Python chooses between these and Triton.
#ifdef OSF_CUDA_ARCHITECTURES
STABLE_TORCH_LIBRARY_IMPL(oneshot_fast, CUDA, m) { osf::implement(m); }
STABLE_TORCH_LIBRARY(oneshot_fast_cuda, m) { osf::define(m); }
STABLE_TORCH_LIBRARY_IMPL(oneshot_fast_cuda, CUDA, m) { osf::implement(m); }
#else
#define OSF_CUDA_ARCHITECTURES ""
#endif

static PyObject* isa(PyObject*, PyObject*) try {
  return PyUnicode_FromString(osf::cpu_kernels().isa);
} catch (const std::exception& error) {
  PyErr_SetString(PyExc_RuntimeError, error.what());
  return nullptr;
}

PyMODINIT_FUNC PyInit__C() {
  static PyMethodDef methods[] = {{"isa", isa, METH_NOARGS, nullptr}, {}};
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  PyObject* const m = PyModule_Create(&definition);
  if (m == nullptr) return nullptr;
  PyModule_AddStringConstant(m, "torch_version", OSF_TORCH_VERSION);
  PyModule_AddStringConstant(m, "compiler", OSF_COMPILER);
  PyModule_AddStringConstant(m, "cuda_architectures", OSF_CUDA_ARCHITECTURES);
  return m;
}
