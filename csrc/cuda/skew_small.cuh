#pragma once
#include "skew_scheme.h"
#include "team.cuh"

// exp of small skew matrices and its adjoint, each matrix from start to end in shared memory.
namespace osf::cuda {

enum Parity { kEven, kOdd };

// S = a - a^T scaled by 2^-s, and the series made of it. Powers is the largest power of X = S^2.
template <class T, int Side, int Powers>
class Series {
 public:
  using Team = osf::cuda::Team<T, Side>;
  using Part = typename Team::Part;
  static constexpr int kMatrices = 2 + Powers;
  static constexpr int kElements = kMatrices * Team::kElements + 3 * Side;

  // Shared memory: S, X .. X^Powers, Q for sums, and the column sums of the norms
  __device__ Series(const Team& team, T* memory)
      : S(memory),
        Q(memory + (1 + Powers) * Team::kElements),
        sums(Q + Team::kElements),
        team_(team) {}
  T *const S, *const Q, *const sums;
  Scheme scheme;

  __device__ __forceinline__ T* X(int power) const { return S + power * Team::kElements; }

  template <class In>
  __device__ __forceinline__ void set_generator(const In* a) {  // [D, D]
    team_.write_symmetric(team_.load(a), T(-1), Q, S);
    expand([] { return T(1); });
  }

  // Multiplies S by factor(), which may read S^2 and S^4 in X(1) and X(2), and prepares its series.
  template <class Factor>
  __device__ __forceinline__ void expand(Factor factor) {
    team_.write(team_.product(S, S), X(1));
    team_.sync();
    team_.write(team_.product(X(1), X(1)), X(2));
    team_.sync();
    scale(factor());
    if (Powers > 2 && scheme.powers > 2) team_.write(team_.product(X(1), X(2)), X(3));
    if (Powers > 3 && scheme.powers > 3) team_.write(team_.product(X(2), X(2)), X(4));
    team_.sync();
  }

  // Part of [identity] I + sum over i in 1 .. powers of M_i / (2 first + 2 i + parity)!, where the
  // M_i follow M_0 in memory
  __device__ __forceinline__ Part combine(Parity parity, int first, bool identity,
                                          const T* M0) const {
    Part sum = team_.make([&](int i, int j) { return T(identity && team_.diagonal(i, j)); });
#pragma unroll
    for (int power = 1; power <= Powers; ++power) {
      if (power > scheme.powers) break;
      const T c = coefficient<T>(first, 2 * power + parity);
      const Part part = team_.read(M0 + power * Team::kElements);
      sum = team_.make([&](int i, int j) { return sum.value[i][j] + c * part.value[i][j]; });
    }
    return sum;
  }

  // Part of C or K. Nobody may be reading Q; afterwards all have read it.
  __device__ __forceinline__ Part value(Parity parity) const {
    const Part low = combine(parity, 0, true, S);
    if (scheme.levels == 1) return low;
    team_.write(combine(parity, scheme.powers, false, S), Q);
    team_.sync();
    const Part sum = team_.product(X(scheme.powers), Q, low);
    team_.sync();
    return sum;
  }
  // Part of exp(S). Shared memory: X(1) and Q are lost.
  __device__ __forceinline__ Part exponential() const {
    const Part even = value(kEven);
    team_.write(value(kOdd), Q);
    team_.sync();
    Part q = team_.product(S, Q, even);
    for (int s = 0; s < scheme.squarings; ++s) {
      team_.sync();
      team_.write(q, X(1));
      team_.sync();
      q = team_.product(X(1), X(1));
    }
    return q;
  }
  // Part of its derivative; the derivatives of X^i follow dX0 in memory, dQ is one more matrix like
  // Q.
  __device__ __forceinline__ Part derivative(Parity parity, const T* dX0, T* dQ) const {
    const Part low = combine(parity, 0, false, dX0);
    if (scheme.levels == 1) return low;
    team_.write(combine(parity, scheme.powers, false, S), Q);
    team_.write(combine(parity, scheme.powers, false, dX0), dQ);
    team_.sync();
    const T* const dX = dX0 + scheme.powers * Team::kElements;
    const Part sum = team_.product(X(scheme.powers), dQ, team_.product(dX, Q, low));
    team_.sync();
    return sum;
  }

 private:
  __device__ __forceinline__ void scale(T factor) {
    T norms[3];
    team_.one_norms(S, sums, norms);  // of S, X, X^2
    scheme = choose_scheme(norm_bound(norms[0], norms[1], norms[2]) * factor, Powers);
    for (int s = 0; s < scheme.squarings; ++s) factor *= T(0.5);
    for (int power = 0; power <= 2; ++power, factor *= factor) {  // S, then X^1, X^2
      const Part part = team_.read(X(power));
      team_.write(team_.make([&](int i, int j) { return factor * part.value[i][j]; }), X(power));
    }
    team_.sync();
  }

  const Team& team_;
};

extern __shared__ __align__(16) unsigned char dynamic_shared[];

// q = exp(S), S = a - a^T: exp(2^-s S) = C + S K by its series, then s squarings and, if any, a
// step q (3 I - q^T q) / 2 of Newton and Schulz to the next orthogonal matrix.
// Shared memory: S, X = S^2 to X^4, and a sum of them. A thread owns RM x RN elements.
template <class S, int Side>
__global__ void __launch_bounds__(
    Team<Accumulator<S>, Side>::kThreads* Team<Accumulator<S>, Side>::kTeams, 1)
    skew_exp_small(int64_t B, int D,
                   const S* __restrict__ a,  // [B, D, D]
                   S* __restrict__ out) {    // [B, D, D]
  using T = Accumulator<S>;
  using Group = Team<T, Side>;
  using Part = typename Group::Part;
  using Sum = Series<T, Side, kMaxPowers>;
  const Group team(D);
  T* const memory = reinterpret_cast<T*>(dynamic_shared);
  Sum series(team, memory + threadIdx.x / Group::kThreads * Sum::kElements);
  T* const R = series.X(1);
  for (int64_t b = blockIdx.x * int64_t{Group::kTeams} + threadIdx.x / Group::kThreads; b < B;
       b += gridDim.x * int64_t{Group::kTeams}) {
    series.set_generator(a + b * D * D);
    Part q = series.exponential();
    if (series.scheme.squarings > 0) {  // each doubled the distance to the orthogonal matrices
      team.sync();
      team.write(q, R);
      team.sync();
      team.write(team.template product<true>(R, R), series.Q);
      team.sync();
      const Part cubic = team.product(R, series.Q);
      q = team.make(
          [&](int i, int j) { return T(1.5) * q.value[i][j] - T(0.5) * cubic.value[i][j]; });
    }
    team.store(q, out + b * D * D);
    team.sync();
  }
}

// The matrices of the adjoint in shared memory, after those of the series
template <class T, int Side, int Powers>
struct AdjointMemory {
  using Series = osf::cuda::Series<T, Side, Powers>;
  static constexpr int kMatrix = Team<T, Side>::kElements;
  static constexpr int kElements = Series::kElements + (3 + Powers) * kMatrix;

  __device__ explicit AdjointMemory(T* memory)
      : E(memory + Series::kElements), inverse(E + kMatrix), K(inverse + kMatrix) {}
  T *const E, *const inverse, *const K;  // inverse = exp(-S)
  __device__ __forceinline__ T* dX(int power) const { return K + power * kMatrix; }
};

// phi(E) at the scaled S; every thread has its part of it, and may still be reading `inverse` and
// K.
template <class T, int Side, int Powers>
__device__ __forceinline__ typename Team<T, Side>::Part average(
    const Team<T, Side>& team, const Series<T, Side, Powers>& series,
    const AdjointMemory<T, Side, Powers>& memory) {
  using Part = typename Team<T, Side>::Part;
  T *const E = memory.E, *const inverse = memory.inverse, *const K = memory.K;
  const auto dX = [&](int power) { return memory.dX(power); };
  const auto X = [&](int power) { return series.X(power); };
  team.write(series.value(kOdd), K);
  const Part even = series.value(kEven);
  team.sync();
  const Part odd = team.product(series.S, K), EK = team.product(E, K);
  team.write(team.make([&](int i, int j) { return even.value[i][j] - odd.value[i][j]; }), inverse);

  team.write_symmetric(team.product(series.S, E), T(1), dX(1), dX(1));
  team.write_symmetric(team.product(X(1), dX(1)), T(1), dX(2), dX(2));
  if constexpr (Powers == 4) {
    if (series.scheme.powers > 2)
      team.write(team.product(X(1), dX(2), team.product(dX(1), X(2))), dX(3));
    if (series.scheme.powers > 3)
      team.write_symmetric(team.product(X(2), dX(2)), T(1), dX(4), dX(4));
    team.sync();
  }
  const Part d_even = series.derivative(kEven, dX(0), K);
  team.write(series.derivative(kOdd, dX(0), K), series.Q);
  team.sync();
  const Part L = team.product(series.S, series.Q, EK);  // its skew half; -L^T = L - d_even
  team.write(team.make([&](int i, int j) { return L.value[i][j] - d_even.value[i][j]; }), K);
  team.sync();
  return team.template product<true>(inverse, K);
}

// Gradient in a. With E = q^T grad - grad^T q and the average phi(Y) of exp(u S) Y exp(-u S) over u
// in [0, 1] it is phi(E), which is skew. At the scaled S, phi(E) = L exp(-S) = -exp(S) L^T with the
// derivative L of exp at S in the direction E; phi(2 S) is phi(S) after
// E -> (E + exp(S) E exp(-S)) / 2. These maps commute, so phi at the scaled S comes first and the
// squarings of exp(-S) follow.
// Shared memory: the series' matrices, E, exp(-S), K and the derivatives of X. A thread owns
// RM x RN elements.
template <class S, int Side, int Powers>
__global__ void __launch_bounds__(
    Team<Accumulator<S>, Side>::kThreads* Team<Accumulator<S>, Side>::kTeams, 1)
    d_skew_exp_small(int64_t B, int D,
                     const S* __restrict__ grad,  // [B, D, D]
                     const S* __restrict__ a,     // [B, D, D]
                     const S* __restrict__ q,     // [B, D, D]
                     S* __restrict__ out) {       // [B, D, D]
  using T = Accumulator<S>;
  using Group = Team<T, Side>;
  using Part = typename Group::Part;
  using Memory = AdjointMemory<T, Side, Powers>;
  const Group team(D);
  T* const begin =
      reinterpret_cast<T*>(dynamic_shared) + threadIdx.x / Group::kThreads * Memory::kElements;
  Series<T, Side, Powers> series(team, begin);
  const Memory memory(begin);
  T *const E = memory.E, *const inverse = memory.inverse, *const turned = series.Q;
  for (int64_t b = blockIdx.x * int64_t{Group::kTeams} + threadIdx.x / Group::kThreads; b < B;
       b += gridDim.x * int64_t{Group::kTeams}) {
    team.write(team.load(q + b * D * D), series.X(1));
    team.write(team.load(grad + b * D * D), series.X(2));
    team.sync();
    team.write_symmetric(team.template product<true>(series.X(1), series.X(2)), T(-1), E, E);
    series.set_generator(a + b * D * D);
    Part phi = average(team, series, memory);
    for (int s = 0; s < series.scheme.squarings; ++s) {
      team.write(phi, E);  // all readers of E have passed a barrier
      team.sync();
      team.write(team.product(E, inverse), turned);
      const Part squared = team.product(inverse, inverse);
      team.sync();
      const Part other = team.template product<true>(inverse, turned);
      phi = team.make([&](int i, int j) { return T(0.5) * (phi.value[i][j] + other.value[i][j]); });
      team.sync();
      team.write(squared, inverse);
    }
    team.write(phi, E);
    team.sync();
    const Part mirrored = team.read_transposed(E);
    phi =
        team.make([&](int i, int j) { return T(0.5) * (phi.value[i][j] - mirrored.value[i][j]); });
    team.store(phi, out + b * D * D);
    team.sync();
  }
}

}  // namespace osf::cuda
