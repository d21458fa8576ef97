#include "skew_small.cuh"

namespace osf::cuda {
namespace {

// The options as a kernel needs them
template <class T>
struct Adam {
  explicit Adam(const RotationOptions& o)
      : lr(T(o.lr)),
        keep1(T(o.beta1)),
        keep2(T(o.beta2)),
        add1(T(1 - o.beta1)),
        add2(T(1 - o.beta2)),
        log_beta1(T(std::log(o.beta1))),
        log_beta2(T(std::log(o.beta2))),
        eps(T(o.eps)),
        max_angle(T(o.max_angle)) {}
  T lr, keep1, keep2, add1, add2, log_beta1, log_beta2, eps, max_angle;
};

// Part of -X from the part of A; moves the moments on. v is [D, D], or one number read by all the
// team as `moment` before and written by its first thread.
template <bool Scalar, class Team, class T>
__device__ __forceinline__ typename Team::Part adam_step(const Team& team, const Adam<T>& adam,
                                                         const typename Team::Part& A, T number,
                                                         T squares, T moment, T* __restrict__ m,
                                                         T* __restrict__ v) {
  const T size = adam.lr / std::expm1(number * adam.log_beta1);  // negative, for -X
  const T unbias = T(-1) / std::expm1(number * adam.log_beta2);
  if constexpr (Scalar) {
    const int pairs = team.D > 1 ? team.D * (team.D - 1) : 1;
    moment = adam.keep2 * moment + adam.add2 * (squares / T(pairs));
    if (team.thread == 0) *v = moment;
  }
  typename Team::Part step = {};
#pragma unroll
  for (int i = 0; i < Team::RM; ++i)
#pragma unroll
    for (int j = 0; j < Team::RN; ++j) {
      if (team.m + i >= team.D || team.n + j >= team.D) continue;
      const int at = (team.m + i) * team.D + team.n + j;
      const T a = A.value[i][j], first = adam.keep1 * m[at] + adam.add1 * a;
      m[at] = first;
      if constexpr (!Scalar) {
        moment = adam.keep2 * v[at] + adam.add2 * (a * a);
        v[at] = moment;
      }
      step.value[i][j] = size * first / (std::sqrt(moment * unbias) + adam.eps);
    }
  return step;
}

// One step, see kernels.h, each matrix from start to end in shared memory.
// Shared memory: the matrices of the series. A thread owns RM x RN elements.
template <class S, int Side, bool Scalar, class Shared>
__global__ void __launch_bounds__(
    Team<Accumulator<S>, Side>::kThreads* Team<Accumulator<S>, Side>::kTeams, 1)
    rotation_step_small(Shared, int64_t B, int D, Adam<Accumulator<S>> adam,
                        const S* __restrict__ g,               // [B, D, D]
                        Accumulator<S>* __restrict__ q,        // [B, D, D]
                        Accumulator<S>* __restrict__ m,        // [B, D, D]
                        Accumulator<S>* __restrict__ v,        // [B, D, D] or [B]
                        Accumulator<S>* __restrict__ steps) {  // [B]
  using T = Accumulator<S>;
  using Group = Team<T, Side>;
  using Part = typename Group::Part;
  const Group team(D);
  Series<T, Side, kPowers<Side>> series(team, SeriesMemory<T, Side, kPowers<Side>>::of_team());
  T *const left = series.X(1), *const right = series.X(2);
  for (int64_t b = blockIdx.x * int64_t{Group::kTeams} + threadIdx.x / Group::kThreads; b < B;
       b += gridDim.x * int64_t{Group::kTeams}) {
    const int64_t at = b * D * D;
    const T number = steps[b] + T(1), moment = Scalar ? v[b] : T(0);
    team.write_symmetric(team.load(g + at), T(-1), series.Q, series.S);
    const Part A = team.read(series.S);
    const T squares = team.sum_squares(A, series.sums);
    team.sync();  // all have read number and moment
    if (!(squares - squares == T(0))) continue;
    if (team.thread == 0) steps[b] = number;
    const Part X =
        adam_step<Scalar>(team, adam, A, number, squares, moment, m + at, v + (Scalar ? b : at));
    // the powers of X / ||X||_F neither overflow nor underflow
    const T norm = std::sqrt(team.sum_squares(X, series.sums));
    const T unit = norm > T(0) ? T(1) / norm : T(0);
    team.write(team.make([&](int i, int j) { return unit * X.value[i][j]; }), series.S);
    team.sync();
    series.expand([&] {
      // S^4 has every rotation angle^4 twice; `angle` is the 8-norm of the angles
      const T fourth = T(0.5) * team.sum_squares(team.read(right), series.sums);
      const T angle = std::sqrt(std::sqrt(std::sqrt(fourth)));
      return norm * angle > adam.max_angle ? adam.max_angle / angle : norm;
    });
    const Part turn = series.exponential();
    team.sync();
    team.write(turn, left);
    team.write(team.load(q + at), right);
    team.sync();
    const Part turned = team.product(left, right);
    team.sync();
    team.write(turned, left);
    team.sync();
    const Part gram = team.template product<true>(left, left);
    team.write(team.make([&](int i, int j) {
      return T(0.5) * (T(team.diagonal(i, j)) - gram.value[i][j]);
    }),
               right);
    team.sync();
    team.store(team.product(left, right, turned), q + at);
    team.sync();
  }
}

struct Problem {
  int64_t B, D;
  const RotationOptions& options;
  const void* g;
  void *q, *m, *v, *steps, *stream;
};

template <class S, int Side, bool Scalar>
cudaError_t step(const Problem& p) {
  using T = Accumulator<S>;
  using Group = Team<T, Side>;
  using Shared = typename SeriesMemory<T, Side, kPowers<Side>>::Shared;
  return launch(rotation_step_small<S, Side, Scalar, Shared>, ceil_div(p.B, Group::kTeams),
                Group::kThreads * Group::kTeams, p.stream, Shared{}, p.B, static_cast<int>(p.D),
                Adam<T>(p.options), static_cast<const S*>(p.g), static_cast<T*>(p.q),
                static_cast<T*>(p.m), static_cast<T*>(p.v), static_cast<T*>(p.steps));
}

template <class S, int Side>
cudaError_t step(const Problem& p) {
  return p.options.scalar ? step<S, Side, true>(p) : step<S, Side, false>(p);
}

}  // namespace

int rotation_step(DType dtype, int64_t B, int64_t D, const RotationOptions& options, const void* g,
                  void* q, void* m, void* v, void* steps, void* stream) {
  if (B == 0 || D == 0) return cudaSuccess;
  if (D > (dtype == DType::f64 ? 32 : 64)) return cudaErrorInvalidValue;
  const Problem p{B, D, options, g, q, m, v, steps, stream};
  return with_dtype(dtype, [&]<class S>(S) {
    if (p.D <= 16) return step<S, 16>(p);
    if constexpr (sizeof(S) < 8)
      if (p.D > 32) return step<S, 64>(p);
    return step<S, 32>(p);
  });
}

}  // namespace osf::cuda
