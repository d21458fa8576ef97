#include "skew_small.cuh"
#include "skew_tiled.cuh"

namespace osf::cuda {
namespace {

// Whether a matrix and all that its exponential needs fit into the shared memory of any GPU.
bool is_small(DType dtype, int64_t D) { return D <= (dtype == DType::f64 ? 32 : 64); }

struct Problem {
  int64_t B, D;
  const void* grad;  // [B, D, D], null in the forward pass
  const void* a;     // [B, D, D]
  const void* q;     // [B, D, D], null in the forward pass
  void* out;         // [B, D, D]
  void* stream;
};

template <class S, int Side>
cudaError_t small(const Problem& p) {
  using T = Accumulator<S>;
  using Group = Team<T, Side>;
  const auto run = [&](auto kernel, auto shared, auto... matrices) {
    return launch(kernel, ceil_div(p.B, Group::kTeams), Group::kThreads * Group::kTeams, p.stream,
                  shared, p.B, static_cast<int>(p.D), static_cast<const S*>(matrices)...,
                  static_cast<S*>(p.out));
  };
  using Forward = typename SeriesMemory<T, Side, kPowers<Side>>::Shared;
  using Adjoint = typename SeriesMemory<T, Side, kAdjointPowers<T>, 1>::Shared;
  return p.grad ? run(d_skew_exp_small<S, Side, Adjoint>, Adjoint{}, p.grad, p.a, p.q)
                : run(skew_exp_small<S, Side, Forward>, Forward{}, p.a);
}

template <class S>
cudaError_t tiled(const Problem& p, void* workspace) {
  using Exponential = TiledExponential<S>;
  const S* const a = static_cast<const S*>(p.a);
  S* const out = static_cast<S*>(p.out);
  if (!p.grad)
    return Exponential(p.B, p.D, Exponential::kForwardMatrices, workspace, p.stream)
        .forward(a, out);
  return Exponential(p.B, p.D, Exponential::kAdjointMatrices, workspace, p.stream)
      .adjoint(static_cast<const S*>(p.grad), a, static_cast<const S*>(p.q), out);
}

int solve(DType dtype, const Problem& p, void* workspace) {
  if (p.B == 0 || p.D == 0) return cudaSuccess;
  return with_dtype(dtype, [&]<class S>(S) {
    if (!is_small(dtype, p.D)) return tiled<S>(p, workspace);
    if (p.D <= 16) return small<S, 16>(p);
    if constexpr (sizeof(S) < 8)
      if (p.D > 32) return small<S, 64>(p);
    return small<S, 32>(p);
  });
}

int64_t workspace_bytes(DType dtype, int64_t B, int64_t D, bool adjoint) {
  if (is_small(dtype, D)) return 0;
  const auto bytes = [&]<class Exponential>() {
    return Exponential::workspace_bytes(
        B, D, adjoint ? Exponential::kAdjointMatrices : Exponential::kForwardMatrices);
  };
  return dtype == DType::f64 ? bytes.template operator()<TiledExponential<double>>()
                             : bytes.template operator()<TiledExponential<float>>();
}

}  // namespace

int64_t skew_exp_workspace_bytes(DType dtype, int64_t B, int64_t D) {
  return workspace_bytes(dtype, B, D, false);
}

int skew_exp(DType dtype, int64_t B, int64_t D, const void* a, void* workspace, void* out,
             void* stream) {
  return solve(dtype, {B, D, nullptr, a, nullptr, out, stream}, workspace);
}

int64_t d_skew_exp_workspace_bytes(DType dtype, int64_t B, int64_t D) {
  return workspace_bytes(dtype, B, D, true);
}

int d_skew_exp(DType dtype, int64_t B, int64_t D, const void* grad, const void* a, const void* q,
               void* workspace, void* out, void* stream) {
  return solve(dtype, {B, D, grad, a, q, out, stream}, workspace);
}

}  // namespace osf::cuda
