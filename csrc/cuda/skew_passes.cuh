#pragma once
#include "batched_product.cuh"
#include "skew_scheme.h"

// Passes over large matrices around the products of exp(a - a^T): generator, norms, scaling, sums.
namespace osf::cuda {

constexpr int kPassThreads = 256;

// out = a - a^T, and the counters are zero
// Shared memory: the tile of 32 x 32 elements that is to be transposed. A thread handles 4 of them.
template <class S>
__global__ void __launch_bounds__(kPassThreads, 1)
    make_generator(int64_t B, int D, Divider tiles,   // of a matrix
                   const S* __restrict__ a,           // [B, D, D]
                   Accumulator<S>* __restrict__ out,  // [B, D, D]
                   Progress progress) {
  using T = Accumulator<S>;
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) *progress.taken = *progress.steps = 0;
    for (int64_t b = threadIdx.x; b < B; b += kPassThreads) progress.finished[b] = 0;
  }
  __shared__ T mirrored[32][33];
  const int across = (D + 31) / 32;
  const int row = threadIdx.x / 32, column = threadIdx.x % 32;
  for (int64_t work = blockIdx.x; work < B * tiles.divisor(); work += gridDim.x) {
    const int64_t matrix = tiles.quotient(work) * D * D;
    const int tile = static_cast<int>(tiles.remainder(work)), m0 = tile / across * 32;
    const int n0 = tile % across * 32;
    for (int i = row; i < 32; i += kPassThreads / 32)
      if (n0 + i < D && m0 + column < D)
        mirrored[i][column] = widen(a[matrix + int64_t{n0 + i} * D + m0 + column]);
    __syncthreads();
    for (int i = row; i < 32; i += kPassThreads / 32)
      if (m0 + i < D && n0 + column < D) {
        const int64_t at = matrix + int64_t{m0 + i} * D + n0 + column;
        out[at] = widen(a[at]) - mirrored[column][i];
      }
    __syncthreads();
  }
}

// sums[k][b][row] = sum over the columns of |M_k|, k < 3; a warp per row. The M are symmetric or
// skew, so these are the column sums too.
template <class T>
__global__ void __launch_bounds__(kPassThreads, 1)
    sum_rows(int64_t B, int D,
             const T* __restrict__ matrices,  // [3, B, D, D]
             T* __restrict__ sums) {          // [3, B, D]
  constexpr int kRows = kPassThreads / kWarp;
  for (int64_t row = blockIdx.x * int64_t{kRows} + threadIdx.x / kWarp; row < 3 * B * D;
       row += gridDim.x * int64_t{kRows}) {
    T sum = 0;
#pragma unroll 4
    for (int i = threadIdx.x % kWarp; i < D; i += kWarp) {
      const T x = matrices[row * D + i];
      sum += x < T(0) ? -x : x;
    }
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % kWarp == 0) sums[row] = sum;
  }
}

// squarings[b] from the norms of S, S^2 and S^4; a warp per matrix.
template <class T>
__global__ void __launch_bounds__(kPassThreads, 1)
    choose_squarings(int64_t B, int D,
                     const T* __restrict__ sums,  // [3, B, D]
                     int* __restrict__ chosen,    // [B]
                     Progress progress) {
  constexpr int kMatrices = kPassThreads / kWarp;
  for (int64_t b = blockIdx.x * int64_t{kMatrices} + threadIdx.x / kWarp; b < B;
       b += gridDim.x * int64_t{kMatrices}) {
    T norm[3] = {};
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      for (int i = threadIdx.x % kWarp; i < D; i += kWarp) {
        const T sum = sums[(k * B + b) * D + i];
        norm[k] = sum > norm[k] ? sum : norm[k];
      }
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) {
        const T other = __shfl_xor_sync(~0u, norm[k], step);
        norm[k] = other > norm[k] ? other : norm[k];
      }
    }
    if (threadIdx.x % kWarp == 0) {
      chosen[b] = squarings(norm_bound(norm[0], norm[1], norm[2]), kMaxPowers, 2);
      atomicMax(progress.steps, static_cast<Counter>(chosen[b]));
    }
  }
}

// M_k *= 2^(-2^k s) for M_0 = S, M_1 = S^2, M_2 = S^4 of the matrices with s > 0 squarings
template <class T>
__global__ void __launch_bounds__(kPassThreads, 1)
    scale_powers(int64_t B, Divider size,            // D D
                 const int* __restrict__ squarings,  // [B]
                 T* __restrict__ matrices) {         // [3, B, D, D]
  const int64_t count = B * size.divisor();
  for (int64_t i = blockIdx.x * int64_t{kPassThreads} + threadIdx.x; i < count;
       i += gridDim.x * int64_t{kPassThreads}) {
    const int s = squarings[size.quotient(i)];
    if (s == 0) continue;
    T factor = ldexp(T(1), -s);
    for (int k = 0; k < 3; ++k, factor *= factor) matrices[k * count + i] *= factor;
  }
}

// Q_parity = sum over i in 1 .. 4 of M_i / (8 + 2 i + parity)! for both parities
template <class T>
__global__ void __launch_bounds__(kPassThreads, 1)
    sum_powers(int64_t count,                   // B D D
               const T* __restrict__ matrices,  // [4, B, D, D]
               T* __restrict__ even,            // [B, D, D]
               T* __restrict__ odd) {           // [B, D, D]
  for (int64_t i = blockIdx.x * int64_t{kPassThreads} + threadIdx.x; i < count;
       i += gridDim.x * int64_t{kPassThreads}) {
    T sums[2] = {};
#pragma unroll
    for (int power = 1; power <= kMaxPowers; ++power) {
      const T x = matrices[(power - 1) * count + i];
      sums[0] += inverse_factorial<T>(2 * kMaxPowers + 2 * power) * x;
      sums[1] += inverse_factorial<T>(2 * kMaxPowers + 2 * power + 1) * x;
    }
    even[i] = sums[0];
    odd[i] = sums[1];
  }
}

// out = in, or in_other for the matrices chosen by their squarings: an odd number of them, or any.
enum Choice { kNone, kOddSquarings, kSquared };
template <class To, class From>
__global__ void __launch_bounds__(kPassThreads, 1)
    copy(int64_t count, Divider size,        // B D D, D D
         const From* __restrict__ in,        // [B, D, D]
         const From* __restrict__ in_other,  // [B, D, D]
         Choice choice,
         const int* __restrict__ squarings,  // [B]
         To* __restrict__ out) {             // [B, D, D]
  for (int64_t i = blockIdx.x * int64_t{kPassThreads} + threadIdx.x; i < count;
       i += gridDim.x * int64_t{kPassThreads}) {
    const int s = choice == kNone ? 0 : squarings[size.quotient(i)];
    const bool other = choice == kOddSquarings ? s % 2 == 1 : s > 0;
    out[i] = convert<To>(other ? in_other[i] : in[i]);
  }
}

}  // namespace osf::cuda
