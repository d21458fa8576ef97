#pragma once
#include "divider.h"
#include "warp_product.cuh"

// Batched products of D x D matrices in device memory, with sums in T.
namespace osf::cuda {

constexpr int kProductThreads = 128, kProductTile = 64;
constexpr int kTerms = 4;

// out = weight (left_0 right_0 + left_1 right_1) + sum of coefficient_i added_i [+ I], for every
// matrix of a batch. A symmetric or skew product (mirror = 1, -1) is computed in the lower triangle
// only and mirrored; what is added need not have the same symmetry. `added` may be `out`.
template <class T>
struct Product {
  int terms = 1;
  bool transposed = false;  // left_i is stored transposed
  const T* left[2] = {};    // [B, D, D]
  const T* right[2] = {};   // [B, D, D]
  T sign = 1;               // of the second term
  int mirror = 0;
  T weight = 1;
  int count = 0;                // of added matrices
  const T* added[kTerms] = {};  // [B, D, D]
  T coefficient[kTerms] = {};
  bool identity = false;
  T* out = nullptr;  // [B, D, D]
};

// One or two independent products in one launch, for the matrices with more than `step` squarings.
template <class T>
struct Products {
  int count = 1, step = -1;
  Product<T> product[2];
};

// Shared memory of a tile: panels [k][m] and [k][n] of the operands, then the product [m][n].
template <class T>
struct ProductMemory {
  static constexpr int TK = 64 / sizeof(T), LD = kProductTile + kWide<T>, LR = kProductTile + 1;
  static constexpr int kPanels = 2 * TK * LD, kResult = kProductTile * LR;
  T value[kPanels > kResult ? kPanels : kResult];
};

// Where a thread's result[i][j] lies in its tile: 8 x 4 neighbours; in float32 a warp has 32 x 32
// elements, in 2 x 4 sums of add_tf32_product, result[4 * .. + ..].
template <class T>
__device__ __forceinline__ int row_of(int i, int j) {
  if constexpr (sizeof(T) == 8) return threadIdx.x / 16 * 8 + i;
  return threadIdx.x / (2 * kWarp) * 32 + i / 4 * 16 + j / 2 * 8 + threadIdx.x % kWarp / 4;
}
template <class T>
__device__ __forceinline__ int column_of(int i, int j) {
  if constexpr (sizeof(T) == 8) return threadIdx.x % 16 * 4 + j;
  return threadIdx.x / kWarp % 2 * 32 + i % 4 * 8 + threadIdx.x % 4 * 2 + j % 2;
}

// result += the product of two panels
__device__ __forceinline__ void add_panels(const double* left, const double* right,
                                           double (&result)[8][4]) {
  using Memory = ProductMemory<double>;
#pragma unroll
  for (int k = 0; k < Memory::TK; ++k) {
    double a[8], b[4];
    read_run(left + k * Memory::LD + row_of<double>(0, 0), a);
    read_run(right + k * Memory::LD + column_of<double>(0, 0), b);
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) result[i][j] += a[i] * b[j];
  }
}

// On tensor cores: each factor is the sum of two tf32 numbers, and of their four products the
// smallest is left out (NVIDIA, CUTLASS, example 27, "3xTF32"). Tensor cores add toward zero, so
// they do for 8 terms only; what they make is added to nearest (Ootomo and Yokota, "Recovering
// single precision accuracy from Tensor Cores", 2022).
__device__ __forceinline__ void add_panels(const float* left, const float* right,
                                           float (&result)[8][4]) {
  using Memory = ProductMemory<float>;
  const int warp_column = threadIdx.x / kWarp % 2 * 32 + threadIdx.x % kWarp / 4;
#pragma unroll 1  // for fewer registers
  for (int k = 0; k < Memory::TK; k += 8) {
    // the two k of a lane are neighbours, in both factors: so its warp reads different banks
    const int first = (k + threadIdx.x % 4 * 2) * Memory::LD, two[] = {first, first + Memory::LD};
    float a[2][4], small_a[2][4], b[2], small_b[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int w = 0; w < 4; ++w)
        split_tf32(left[two[w / 2] + row_of<float>(4 * i, w % 2 * 2)], a[i][w], small_a[i][w]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int w = 0; w < 2; ++w) split_tf32(right[two[w] + warp_column + 8 * j], b[w], small_b[w]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum[4] = {};
        add_tf32_product(small_a[i], b, sum);
        add_tf32_product(a[i], small_b, sum);
        add_tf32_product(a[i], b, sum);
#pragma unroll
        for (int w = 0; w < 4; ++w) result[4 * i + j][w] += sum[w];
      }
    }
  }
}

// result += sign op(A) B in the tile at (m0, n0). The next panels are on their way from device
// memory while the present ones are multiplied.
template <bool Transposed, class T>
__device__ __forceinline__ void add_product(const T* A,  // [D, D]
                                            const T* B,  // [D, D]
                                            T sign, int D, int m0, int n0, T* memory,
                                            T (&result)[8][4]) {
  using Memory = ProductMemory<T>;
  constexpr int TK = Memory::TK, LD = Memory::LD, kLoads = TK * kProductTile / kProductThreads;
  T* const left = memory;
  T* const right = memory + TK * LD;
  T next_left[kLoads], next_right[kLoads];
  // place of element u in the panels; the index that is contiguous in device memory runs fastest
  const auto k_left = [](int u) { return Transposed ? u / kProductTile : u % TK; };
  const auto m_left = [](int u) { return Transposed ? u % kProductTile : u / TK; };
  const auto fetch = [&](int k0) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int u = threadIdx.x + i * kProductThreads;
      const int k = k0 + k_left(u), row = m0 + m_left(u);
      next_left[i] = k < D && row < D ? A[Transposed ? k * D + row : row * D + k] : T(0);
      const int l = k0 + u / kProductTile, column = n0 + u % kProductTile;
      next_right[i] = l < D && column < D ? B[l * D + column] : T(0);
    }
  };
  fetch(0);
  for (int k0 = 0; k0 < D; k0 += TK) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int u = threadIdx.x + i * kProductThreads;
      left[k_left(u) * LD + m_left(u)] = sign * next_left[i];
      right[u / kProductTile * LD + u % kProductTile] = next_right[i];
    }
    __syncthreads();
    if (k0 + TK < D) fetch(k0 + TK);
    add_panels(left, right, result);
  }
}

// out at (row, column) from the product there
template <class T>
__device__ __forceinline__ void write_element(const Product<T>& p, int64_t matrix, int D, int row,
                                              int column, T value) {
  const int64_t at = matrix + int64_t{row} * D + column;
  T sum = p.weight * value;
#pragma unroll
  for (int i = 0; i < kTerms; ++i)
    if (i < p.count) sum += p.coefficient[i] * p.added[i][at];
  if (p.identity && row == column) sum += T(1);
  p.out[at] = sum;
}

// The tile at (m0, n0) of matrix b, and the mirrored one. Every element of out is written by one
// thread, after it has read what is added there.
template <class T>
__device__ __forceinline__ void run_tile(const Product<T>& p, int64_t b, int D, int m0, int n0,
                                         ProductMemory<T>& memory) {
  constexpr int LR = ProductMemory<T>::LR;
  const int64_t matrix = b * D * D;
  T result[8][4] = {};
  for (int t = 0; t < p.terms; ++t) {
    const T *const A = p.left[t] + matrix, *const B = p.right[t] + matrix;
    const T sign = t == 0 ? T(1) : p.sign;
    if (p.transposed)
      add_product<true>(A, B, sign, D, m0, n0, memory.value, result);
    else
      add_product<false>(A, B, sign, D, m0, n0, memory.value, result);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      memory.value[row_of<T>(i, j) * LR + column_of<T>(i, j)] = result[i][j];
  __syncthreads();
  for (int u = threadIdx.x; u < kProductTile * kProductTile; u += kProductThreads) {
    const int i = u / kProductTile, j = u % kProductTile;
    if (m0 + i < D && n0 + j < D && (p.mirror == 0 || m0 + i >= n0 + j)) {
      const T value = p.mirror < 0 && m0 + i == n0 + j ? T(0) : memory.value[i * LR + j];
      write_element(p, matrix, D, m0 + i, n0 + j, value);
    }
    if (p.mirror != 0 && m0 + j < D && n0 + i < D && m0 + j > n0 + i)
      write_element(p, matrix, D, n0 + i, m0 + j, T(p.mirror) * memory.value[j * LR + i]);
  }
  __syncthreads();
}

// All tiles of all matrices and products, a tile per block. (At three blocks per multiprocessor
// registers would be spilled, here and in `square`.)
template <class T>
__global__ void __launch_bounds__(kProductThreads, sizeof(T) == 8 ? 1 : 2)
    multiply(int64_t B, int D, Divider per_matrix,  // tiles of all products
             const __grid_constant__ Products<T> products,
             const int* __restrict__ squarings) {  // [B]
  __shared__ __align__(16) ProductMemory<T> memory;
  const int across = (D + kProductTile - 1) / kProductTile, tiles = across * across;
  for (int64_t work = blockIdx.x; work < B * per_matrix.divisor(); work += gridDim.x) {
    const int64_t b = per_matrix.quotient(work);
    const int rest = static_cast<int>(work - b * per_matrix.divisor());
    const int tile = rest % tiles, m0 = tile / across * kProductTile;
    const int n0 = tile % across * kProductTile;
    const Product<T>& p = products.product[rest / tiles];
    if (p.mirror != 0 && n0 > m0) continue;
    if (products.step >= 0 && squarings[b] <= products.step) continue;
    run_tile(p, b, D, m0, n0, memory);
  }
}

// Squarings: the products of an even and of an odd step; the last one waits for the others.
template <class T>
struct Squaring {
  int count = 0;
  Product<T> product[2][3];
};

// What the blocks of `square` know of one another; zero before it.
using Counter = unsigned long long;
struct Progress {
  Counter* taken;     // tiles
  Counter* steps;     // the most squarings of a matrix
  Counter* finished;  // [B], tiles
};

// All squarings of all matrices. A block takes tile after tile in the order of the steps and waits
// until what it reads, and whoever reads what it overwrites, is finished. It waits for tiles before
// its own only, which blocks that already run have taken, so this ends whatever number of blocks
// runs at once.
template <class T>
__global__ void __launch_bounds__(kProductThreads, sizeof(T) == 8 ? 1 : 2)
    square(int64_t B, int D, Divider tiles, Divider per_product,  // of a matrix, of a batch
           const __grid_constant__ Squaring<T> squaring,
           const int* __restrict__ squarings,  // [B]
           Progress progress) {
  __shared__ __align__(16) ProductMemory<T> memory;
  __shared__ Counter turn;
  const int across = (D + kProductTile - 1) / kProductTile;
  const int64_t count = *progress.steps * squaring.count * per_product.divisor();
  const auto take = [&] {
    __syncthreads();
    if (threadIdx.x == 0) turn = atomicAdd(progress.taken, Counter{1});
    __syncthreads();
    return static_cast<int64_t>(turn);
  };
  for (int64_t work = take(); work < count; work = take()) {
    const int64_t order = per_product.quotient(work);
    const int step = static_cast<int>(order) / squaring.count;
    const int i = static_cast<int>(order) - step * squaring.count;
    const int64_t rest = work - order * per_product.divisor();
    const int b = static_cast<int>(tiles.quotient(rest));
    const int tile = static_cast<int>(rest - b * tiles.divisor());
    if (squarings[b] <= step) continue;
    if (threadIdx.x == 0) {
      const Counter before =
          (step * squaring.count + (i == squaring.count - 1 ? i : 0)) * tiles.divisor();
      while (*static_cast<volatile Counter*>(progress.finished + b) < before) __nanosleep(50);
      __threadfence();
    }
    __syncthreads();
    const Product<T>& p = squaring.product[step % 2][i];
    const int m0 = tile / across * kProductTile, n0 = tile % across * kProductTile;
    if (p.mirror == 0 || n0 <= m0) run_tile(p, b, D, m0, n0, memory);  // a barrier at its end
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(progress.finished + b, Counter{1});
    }
  }
}

}  // namespace osf::cuda
