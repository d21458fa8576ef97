#pragma once
#include "common.cuh"

// Algebra of small matrices in shared memory, by one team of threads per matrix: a warp for
// D <= 16, four of them in a block, and a whole block above that.
namespace osf::cuda {

// D x D matrices in shared memory, padded with zeros to Side x Side and rows to 16 bytes more, and
// the threads of a team, each of which owns RM x RN elements of every matrix. Side is 16, 32 or 64.
template <class T, int Side>
class Team {
 public:
  static constexpr int RN = 4, RM = Side == 16 ? 2 : 4, kThreads = Side * Side / (RM * RN);
  static constexpr int kTeams = kThreads == kWarp ? 4 : 1;  // per block
  static constexpr int LD = Side + kWide<T>, kElements = Side * LD;

  struct Part {  // a thread's elements of a matrix
    T value[RM][RN];
  };

  __device__ explicit Team(int D)
      : D(D),
        thread(threadIdx.x % kThreads),
        m(thread / (Side / RN) * RM),
        n(thread % (Side / RN) * RN) {}

  const int D, thread, m, n;  // (m, n): first element owned

  __device__ __forceinline__ void sync() const {
    if constexpr (kThreads == kWarp)
      __syncwarp();
    else
      __syncthreads();
  }

  template <class F>
  __device__ __forceinline__ static Part make(F f) {
    Part part;
#pragma unroll
    for (int i = 0; i < RM; ++i)
#pragma unroll
      for (int j = 0; j < RN; ++j) part.value[i][j] = f(i, j);
    return part;
  }
  __device__ __forceinline__ bool diagonal(int i, int j) const { return m + i == n + j; }

  __device__ __forceinline__ Part read(const T* M) const {
    Part part;
#pragma unroll
    for (int i = 0; i < RM; ++i) read_run(M + (m + i) * LD + n, part.value[i]);
    return part;
  }
  __device__ __forceinline__ Part read_transposed(const T* M) const {
    return make([&](int i, int j) { return M[(n + j) * LD + m + i]; });
  }
  __device__ __forceinline__ void write(const Part& part, T* M) const {
#pragma unroll
    for (int i = 0; i < RM; ++i) write_run(part.value[i], M + (m + i) * LD + n);
  }

  template <class S>
  __device__ __forceinline__ Part load(const S* in) const {  // [D, D]
    return make([&](int i, int j) {
      return m + i < D && n + j < D ? widen(in[(m + i) * D + n + j]) : T(0);
    });
  }
  template <class S>
  __device__ __forceinline__ void store(const Part& part, S* out) const {  // [D, D]
#pragma unroll
    for (int i = 0; i < RM; ++i)
#pragma unroll
      for (int j = 0; j < RN; ++j)
        if (m + i < D && n + j < D) out[(m + i) * D + n + j] = convert<S>(part.value[i][j]);
  }

  // part + op(A) B
  template <bool Transposed = false>
  __device__ __forceinline__ Part product(const T* A, const T* B, Part part = {}) const {
#pragma unroll 2
    for (int k = 0; k < D; k += kWide<T>) {
      T left[RM][kWide<T>];
#pragma unroll
      for (int i = 0; i < RM && !Transposed; ++i) read_run(A + (m + i) * LD + k, left[i]);
#pragma unroll
      for (int e = 0; e < kWide<T>; ++e) {
        T column[RM], right[RN];
        if constexpr (Transposed) read_run(A + (k + e) * LD + m, column);
        read_run(B + (k + e) * LD + n, right);
#pragma unroll
        for (int i = 0; i < RM; ++i)
#pragma unroll
          for (int j = 0; j < RN; ++j)
            part.value[i][j] += (Transposed ? column[i] : left[i][e]) * right[j];
      }
    }
    return part;
  }

  // M = part + sign part^T, which every thread may read afterwards; `scratch` may be M.
  __device__ __forceinline__ void write_symmetric(const Part& part, T sign, T* scratch,
                                                  T* M) const {
    write(part, scratch);
    sync();
    const Part transposed = read_transposed(scratch);
    if (scratch == M) sync();
    write(make([&](int i, int j) { return part.value[i][j] + sign * transposed.value[i][j]; }), M);
    sync();
  }

  // Sum of x over the team, in every thread. Shared memory: a sum per warp, free again afterwards.
  __device__ __forceinline__ T sum(T x, T* sums) const {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    if constexpr (kThreads > kWarp) {
      if (thread % kWarp == 0) sums[thread / kWarp] = x;
      sync();
      x = 0;
#pragma unroll
      for (int w = 0; w < kThreads / kWarp; ++w) x += sums[w];
      sync();
    }
    return x;
  }
  // Sum of the squares of all elements
  __device__ __forceinline__ T sum_squares(const Part& part, T* sums) const {
    T x = 0;
#pragma unroll
    for (int i = 0; i < RM; ++i)
#pragma unroll
      for (int j = 0; j < RN; ++j) x += part.value[i][j] * part.value[i][j];
    return sum(x, sums);
  }

  // Largest column sum of |M| for three matrices M that lie one after another.
  // Shared memory: the sums [3][Side].
  __device__ __forceinline__ void one_norms(const T* matrices, T* sums, T (&norms)[3]) const {
    for (int u = thread; u < 3 * Side; u += kThreads) {
      const T* const column = matrices + u / Side * kElements + u % Side;
      T sum = 0;
#pragma unroll 4
      for (int i = 0; i < D; ++i) sum += abs(column[i * LD]);
      sums[u] = sum;
    }
    sync();
#pragma unroll
    for (int matrix = 0; matrix < 3; ++matrix) {
      norms[matrix] = 0;
#pragma unroll 4
      for (int i = 0; i < D; ++i) norms[matrix] = max(norms[matrix], sums[matrix * Side + i]);
    }
  }

 private:
  __device__ __forceinline__ static T abs(T x) { return x < T(0) ? -x : x; }
  __device__ __forceinline__ static T max(T a, T b) { return a > b ? a : b; }
};

}  // namespace osf::cuda
