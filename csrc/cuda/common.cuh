#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "launchers.h"

// Storage types, wide memory accesses and the launch itself, shared by all kernels.
namespace osf::cuda {

constexpr int kWarp = 32;
constexpr int64_t kMaxBlocks = 0x7fffffff;

OSF_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
OSF_HD constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
OSF_HD constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
OSF_HD constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// float64 sums for float64, float32 sums for the others
template <class S>
using Accumulator = decltype(widen(S{}));

// Between a storage type and its accumulation type, rounded to nearest, ties to even
template <class To, class From>
__device__ __forceinline__ To convert(From x) {
  if constexpr (__is_same(To, From))
    return x;
  else if constexpr (__is_same(To, __half))
    return __float2half_rn(x);
  else if constexpr (__is_same(To, __nv_bfloat16))
    return __float2bfloat16_rn(x);
  else
    return widen(x);
}

// Elements in one access of 16 bytes
template <class S>
constexpr int kWide = 16 / sizeof(S);

template <int Bytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

// V neighbouring elements, moved by one instruction. V sizeof(S) is 2, 4, 8 or 16 bytes, and the
// address a multiple of it.
template <class S, int V>
struct Pack {
  using Word = typename WordOf<V * sizeof(S)>::type;
  S value[V];

  static __device__ __forceinline__ Pack load(const S* p) {
    const Word word = *reinterpret_cast<const Word*>(p);
    Pack pack;
    memcpy(&pack, &word, sizeof word);
    return pack;
  }
  __device__ __forceinline__ void store(S* p) const {
    Word word;
    memcpy(&word, this, sizeof word);
    *reinterpret_cast<Word*>(p) = word;
  }
};

// N neighbouring elements from or to an address that is a multiple of 16 bytes, or of N elements
template <class T, int N>
__device__ __forceinline__ void read_run(const T* p, T (&run)[N]) {
  constexpr int V = N < kWide<T> ? N : kWide<T>;
#pragma unroll
  for (int i = 0; i < N; i += V) {
    const auto part = Pack<T, V>::load(p + i);
#pragma unroll
    for (int j = 0; j < V; ++j) run[i + j] = part.value[j];
  }
}
template <class T, int N>
__device__ __forceinline__ void write_run(const T (&run)[N], T* p) {
  constexpr int V = N < kWide<T> ? N : kWide<T>;
#pragma unroll
  for (int i = 0; i < N; i += V) {
    Pack<T, V> part;
#pragma unroll
    for (int j = 0; j < V; ++j) part.value[j] = run[i + j];
    part.store(p + i);
  }
}

// N neighbouring elements of device memory to shared memory, or zeros if not inside. In accesses of
// 4, 8 or 16 bytes, to which both addresses are aligned, they pass no registers and land by
// wait_for_copies, which waits for all that this thread has begun.
template <int N, class T>
__device__ __forceinline__ void copy_async(const T* from, bool inside, T* to) {
  constexpr int V = N < kWide<T> ? N : kWide<T>;
#pragma unroll
  for (int i = 0; i < N; i += V) {
    if (!inside)
      Pack<T, V>{}.store(to + i);
    else if constexpr (V * sizeof(T) < 4)
      Pack<T, V>::load(from + i).store(to + i);
    else
      __pipeline_memcpy_async(to + i, from + i, V * sizeof(T));
  }
}
__device__ __forceinline__ void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

// Whether every address is a multiple of `bytes`.
template <class... Pointers>
bool aligned(size_t bytes, Pointers... pointers) {
  return (... && (reinterpret_cast<uintptr_t>(pointers) % bytes == 0));
}

// Calls f with a value of the storage type.
template <class F>
cudaError_t with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::f16: return f(__half{});
    case DType::bf16: return f(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

// Bytes of an element in the accumulation dtype
inline int64_t accumulator_bytes(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

// Dynamic shared memory of a block. A kernel that needs it has such a first parameter, whose type
// is an argument of its template, so that the kernel's name tells tools/check_cuda.py the size.
template <int Bytes>
struct DynamicShared {
  static_assert(Bytes <= 99 << 10, "sm_86, sm_89 and sm_120 give a block no more");
};
template <class...>
constexpr int kSharedBytes = 0;
template <int Bytes, class... More>
constexpr int kSharedBytes<DynamicShared<Bytes>, More...> = Bytes;

// Launches at most kMaxBlocks blocks: every kernel steps over its work by the size of the grid.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
                   Arguments... arguments) {
  constexpr int kShared = kSharedBytes<Parameters...>;
  if (blocks == 0) return cudaSuccess;
  if constexpr (kShared > 48 << 10) {  // more must be asked for, per kernel and device
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(min(blocks, kMaxBlocks)));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = kShared;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace osf::cuda
