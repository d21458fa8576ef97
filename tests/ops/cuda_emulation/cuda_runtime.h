#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

// What csrc/cuda uses of CUDA, for a host compiler; emulator.cpp says how it runs.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__
// a block at a time runs, on one thread of the system
#define __shared__ thread_local

using std::ldexp;
using std::memcpy;
using std::memset;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1;
};
inline dim3 threadIdx, blockIdx, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulation {

// Waits for the block, or for the warp.
void wait_for_block();
void wait_for_warp();
// Ends this thread and the launch, with an error, unless the condition holds.
void require(bool condition, const char* otherwise);
cudaError_t launch(const cudaLaunchConfig_t& config, void* kernel, std::function<void()> body);
void allow_dynamic_shared(void* kernel, int bytes);
const char* last_error();
// An 8-byte slot of each thread of the block
void* slot(unsigned thread);
// This thread's copies to shared memory that are on their way
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool committed;
};
std::vector<Copy>& copies();

}  // namespace emulation

inline const char* cudaGetErrorString(cudaError_t) { return emulation::last_error(); }
inline void __syncthreads() { emulation::wait_for_block(); }
inline void __syncwarp() { emulation::wait_for_warp(); }

// blocks run one after another
template <class T>
T atomicAdd(T* p, T x) {
  return std::exchange(*p, *p + x);
}
template <class T>
T atomicMax(T* p, T x) {
  return std::exchange(*p, std::max(*p, x));
}
inline void __threadfence() {}
inline void __nanosleep(unsigned) {
  emulation::require(false, "waits for a block that has not begun");
}

template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  memcpy(emulation::slot(threadIdx.x), &value, sizeof value);
  emulation::wait_for_warp();
  memcpy(&value, emulation::slot(threadIdx.x ^ mask), sizeof value);
  emulation::wait_for_warp();
  return value;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  emulation::allow_dynamic_shared(reinterpret_cast<void*>(kernel), value);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> copies(arguments...);
  return emulation::launch(*config, reinterpret_cast<void*>(kernel),
                           [&] { std::apply(kernel, copies); });
}
