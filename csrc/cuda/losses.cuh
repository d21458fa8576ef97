#pragma once
#include "../loss_math.h"
#include "common.cuh"
#include "divider.h"

// Means per image in two stages of fixed order, and elementwise maps. A chunk is the part of an
// image that one block handles, whatever the batch.
namespace osf::cuda {

constexpr int kLossThreads = 256;
constexpr int64_t kChunk = 4096;  // elements

struct Chunks {
  int64_t B, n;
  Divider per_image;

  Chunks(int64_t B, int64_t n) : B(B), n(n), per_image(max(1, ceil_div(n, kChunk))) {}
  OSF_HD int64_t count() const { return n > 0 ? B * per_image.divisor() : 0; }
};

// The sum over a block, in thread 0: by warps, then warp after warp.
// Shared memory: a sum per warp.
__device__ __forceinline__ double block_sum(double sum) {
  __shared__ double warps[kLossThreads / kWarp];
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  for (int w = 1; threadIdx.x == 0 && w < kLossThreads / kWarp; ++w) sum += warps[w];
  return sum;
}

// partial[chunk] = sum of f over a chunk; loss = its mean if images have one chunk only. f(b, i)
// returns the sum of V terms from element i of all on. A thread sums
// every 256th run of V elements in the accumulation dtype, the block in double.
template <class T, int V, class F>
__global__ void __launch_bounds__(kLossThreads, 1)
    sum_chunks(Chunks chunks, F f,
               double* __restrict__ partial,  // [B, chunks of an image]
               T* __restrict__ loss) {        // [B], accumulation dtype
  for (int64_t work = blockIdx.x; work < chunks.count(); work += gridDim.x) {
    const int64_t b = chunks.per_image.quotient(work);
    const int64_t i0 = b * chunks.n + chunks.per_image.remainder(work) * kChunk;
    const int64_t i1 = min(i0 + kChunk, (b + 1) * chunks.n);
    T sum = 0;
#pragma unroll 4
    for (int64_t i = i0 + threadIdx.x * V; i < i1; i += kLossThreads * V)
      sum += f.template operator()<V>(b, i);
    const double total = block_sum(sum);
    if (threadIdx.x != 0) continue;
    if (chunks.per_image.divisor() == 1)
      loss[b] = T(total / double(chunks.n));
    else
      partial[work] = total;
  }
}

// loss[b] = mean from the sums of the chunks; a warp per image.
template <class T>
__global__ void __launch_bounds__(kLossThreads, 1)
    add_chunks(Chunks chunks,
               const double* __restrict__ partial,  // [B, chunks of an image]
               T* __restrict__ loss) {              // [B], accumulation dtype
  constexpr int kImages = kLossThreads / kWarp;
  const int64_t count = chunks.n > 0 ? chunks.per_image.divisor() : 0;
  for (int64_t b = blockIdx.x * int64_t{kImages} + threadIdx.x / kWarp; b < chunks.B;
       b += gridDim.x * int64_t{kImages}) {
    double sum = 0;
    for (int64_t c = threadIdx.x % kWarp; c < count; c += kWarp) sum += partial[b * count + c];
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % kWarp == 0) loss[b] = T(sum / double(chunks.n));
  }
}

// f(b, i) for every V elements i of every image b.
template <int V, class F>
__global__ void __launch_bounds__(kLossThreads, 1) map_chunks(Chunks chunks, F f) {
  for (int64_t work = blockIdx.x; work < chunks.count(); work += gridDim.x) {
    const int64_t b = chunks.per_image.quotient(work);
    const int64_t i0 = b * chunks.n + chunks.per_image.remainder(work) * kChunk;
    const int64_t i1 = min(i0 + kChunk, (b + 1) * chunks.n);
#pragma unroll 4
    for (int64_t i = i0 + threadIdx.x * V; i < i1; i += kLossThreads * V)
      f.template operator()<V>(b, i);
  }
}

// Elements per access: 16 bytes where every run of them is aligned and lies in one image.
template <class S, class... Pointers>
bool wide_runs(int64_t n, Pointers... pointers) {
  return n % kWide<S> == 0 && aligned(16, pointers...);
}

template <class S, class F>
cudaError_t mean_per_image(int64_t B, int64_t n, bool wide, F f, void* workspace,
                           Accumulator<S>* loss, void* stream) {
  using T = Accumulator<S>;
  const Chunks chunks(B, n);
  double* const partial = static_cast<double*>(workspace);
  const auto kernel = wide ? sum_chunks<T, kWide<S>, F> : sum_chunks<T, 1, F>;
  const cudaError_t error =
      launch(kernel, chunks.count(), kLossThreads, stream, chunks, f, partial, loss);
  // a mean of no elements is a NaN, written by the second stage
  if (error != cudaSuccess || (n > 0 && chunks.per_image.divisor() == 1)) return error;
  return launch(add_chunks<T>, ceil_div(B, kLossThreads / kWarp), kLossThreads, stream, chunks,
                static_cast<const double*>(partial), loss);
}

template <class S, class F>
cudaError_t map_per_image(int64_t B, int64_t n, bool wide, F f, void* stream) {
  const Chunks chunks(B, n);
  const auto kernel = wide ? map_chunks<kWide<S>, F> : map_chunks<1, F>;
  return launch(kernel, chunks.count(), kLossThreads, stream, chunks, f);
}

}  // namespace osf::cuda
