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
  ChosenScheme scheme;
  T bound;  // of ||S||_2

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

  // Part of [identity] I + sum over i in 1 .. powers of X^i / (2 first + 2 i + parity)!
  __device__ __forceinline__ Part combine(Parity parity, int first, bool identity) const {
    Part sum = team_.make([&](int i, int j) { return T(identity && team_.diagonal(i, j)); });
#pragma unroll
    for (int power = 1; power <= Powers; ++power) {
      if (power > scheme.powers) break;
      const T c = coefficient<T>(first, 2 * power + parity);
      const Part part = team_.read(X(power));
      sum = team_.make([&](int i, int j) { return sum.value[i][j] + c * part.value[i][j]; });
    }
    return sum;
  }

  // Part of C or K. Nobody may be reading Q; afterwards all have read it.
  __device__ __forceinline__ Part value(Parity parity) const {
    const Part low = combine(parity, 0, true);
    if (scheme.levels == 1) return low;
    team_.write(combine(parity, scheme.powers, false), Q);
    team_.sync();
    const Part sum = team_.product(X(scheme.powers), Q, low);
    team_.sync();
    return sum;
  }
  // Part of exp(sign S) without the squarings; others may still be reading Q, which is lost.
  __device__ __forceinline__ Part unsquared(T sign) const {
    const Part even = value(kEven);
    team_.write(value(kOdd), Q);
    team_.sync();
    const Part odd = team_.product(S, Q);
    return team_.make([&](int i, int j) { return even.value[i][j] + sign * odd.value[i][j]; });
  }
  // Part of exp(S). Shared memory: X(1) and Q are lost.
  __device__ __forceinline__ Part exponential() const {
    Part q = unsquared(T(1));
    for (int s = 0; s < scheme.squarings; ++s) {
      team_.sync();
      team_.write(q, X(1));
      team_.sync();
      q = team_.product(X(1), X(1));
    }
    return q;
  }

 private:
  __device__ __forceinline__ void scale(T factor) {
    T norms[3];
    team_.one_norms(S, sums, norms);  // of S, X, X^2
    bound = norm_bound(norms[0], norms[1], norms[2]);
    scheme = choose_scheme(bound * factor, Powers);
    for (int s = 0; s < scheme.squarings; ++s) factor *= T(0.5);
    bound *= factor;
    for (int power = 0; power <= 2; ++power, factor *= factor) {  // S, then X^1, X^2
      const Part part = team_.read(X(power));
      team_.write(team_.make([&](int i, int j) { return factor * part.value[i][j]; }), X(power));
    }
    team_.sync();
  }

  const Team& team_;
};

extern __shared__ __align__(16) unsigned char dynamic_shared[];

// Of a block whose teams hold `Matrices` matrices each besides those of the series
template <class T, int Side, int Powers, int Matrices = 0>
struct SeriesMemory {
  using Group = Team<T, Side>;
  static constexpr int kElements = Series<T, Side, Powers>::kElements + Matrices * Group::kElements;
  using Shared = DynamicShared<Group::kTeams * kElements* int{sizeof(T)}>;

  __device__ __forceinline__ static T* of_team() {
    return reinterpret_cast<T*>(dynamic_shared) + threadIdx.x / Group::kThreads * kElements;
  }
};

// The powers of X that there is room for
template <int Side>
constexpr int kPowers = Side == 64 ? 3 : kMaxPowers;
// Fewer, since the adjoint's own series is short for a short S
template <class T>
constexpr int kAdjointPowers = sizeof(T) == 8 ? 3 : 2;

// q = exp(S), S = a - a^T: exp(2^-s S) = C + S K by its series, then s squarings and, if any, a
// step q (3 I - q^T q) / 2 of Newton and Schulz to the next orthogonal matrix.
// Shared memory: S, the powers of X = S^2, and a sum of them. A thread owns RM x RN elements.
template <class S, int Side, class Shared>
__global__ void __launch_bounds__(
    Team<Accumulator<S>, Side>::kThreads* Team<Accumulator<S>, Side>::kTeams, 1)
    skew_exp_small(Shared, int64_t B, int D,
                   const S* __restrict__ a,  // [B, D, D]
                   S* __restrict__ out) {    // [B, D, D]
  using T = Accumulator<S>;
  using Group = Team<T, Side>;
  using Part = typename Group::Part;
  const Group team(D);
  Series<T, Side, kPowers<Side>> series(team, SeriesMemory<T, Side, kPowers<Side>>::of_team());
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

// Gradient in a. With E = q^T grad - grad^T q and the average phi(Y) of exp(u S) Y exp(-u S) over u
// in [0, 1] it is phi(E), which is skew. With ad(Y) = S Y - Y S, phi is the sum of ad^k / (k + 1)!,
// by Horner's rule at the scaled S, cut where the terms fall below the roundoff: ||ad|| <= 2 ||S||.
// phi(2 S) is phi(S) after E -> (E + exp(S) E exp(-S)) / 2; these maps commute, so phi at the
// scaled S comes first and the squarings of exp(-S) follow. Shared memory: the series' matrices and
// the result so far. A thread owns RM x RN elements.
template <class S, int Side, class Shared>
__global__ void __launch_bounds__(
    Team<Accumulator<S>, Side>::kThreads* Team<Accumulator<S>, Side>::kTeams, 1)
    d_skew_exp_small(Shared, int64_t B, int D,
                     const S* __restrict__ grad,  // [B, D, D]
                     const S* __restrict__ a,     // [B, D, D]
                     const S* __restrict__ q,     // [B, D, D]
                     S* __restrict__ out) {       // [B, D, D]
  using T = Accumulator<S>;
  using Group = Team<T, Side>;
  using Part = typename Group::Part;
  using Sum = Series<T, Side, kAdjointPowers<T>>;
  constexpr T kRoundoff = T(sizeof(T) == 8 ? 1.1e-16 : 6e-8);
  const Group team(D);
  T* const memory = SeriesMemory<T, Side, kAdjointPowers<T>, 1>::of_team();
  Sum series(team, memory);
  T *const phi = memory + Sum::kElements, *const inverse = series.X(1), *const scratch = series.Q;
  for (int64_t b = blockIdx.x * int64_t{Group::kTeams} + threadIdx.x / Group::kThreads; b < B;
       b += gridDim.x * int64_t{Group::kTeams}) {
    team.write(team.load(q + b * D * D), series.X(1));
    team.write(team.load(grad + b * D * D), series.X(2));
    team.sync();
    team.write_symmetric(team.template product<true>(series.X(1), series.X(2)), T(-1), phi, phi);
    const Part E = team.read(phi);
    Part sum = E;
    series.set_generator(a + b * D * D);
    team.write(series.unsquared(T(-1)), inverse);  // exp(-S); of X(1) a thread reads its own part
    team.sync();
    int terms = 0;
    for (T size = 1; size > kRoundoff; size *= 2 * series.bound / T(terms + 1)) ++terms;
    for (; terms > 0; --terms) {
      team.write(team.product(series.S, phi), scratch);
      team.sync();
      const Part own = team.read(scratch), mirrored = team.read_transposed(scratch);
      const T factor = T(1) / T(terms + 1);
      sum = team.make([&](int i, int j) {
        return E.value[i][j] + factor * (own.value[i][j] - mirrored.value[i][j]);
      });
      team.write(sum, phi);
      team.sync();
    }
    for (int s = 0; s < series.scheme.squarings; ++s) {
      team.write(team.product(phi, inverse), scratch);
      const Part squared = team.product(inverse, inverse);
      team.sync();
      const Part turned = team.template product<true>(inverse, scratch);
      sum =
          team.make([&](int i, int j) { return T(0.5) * (sum.value[i][j] + turned.value[i][j]); });
      team.sync();
      team.write(squared, inverse);
      team.write(sum, phi);
      team.sync();
    }
    const Part mirrored = team.read_transposed(phi);
    sum =
        team.make([&](int i, int j) { return T(0.5) * (sum.value[i][j] - mirrored.value[i][j]); });
    team.store(sum, out + b * D * D);
    team.sync();
  }
}

}  // namespace osf::cuda
