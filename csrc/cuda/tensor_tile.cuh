#pragma once
#include "warp_product.cuh"

namespace osf::cuda {

// The 32 x 32 part of a 64 x 64 product of 16-bit numbers that one of four warps computes on tensor
// cores, with float32 sums in registers. The operands lie in shared memory, their rows aligned to
// 16 bytes.
template <class S>
class TensorTile {
 public:
  // Adds left[m][k] right[k][n] for K steps of k, a multiple of 16; an operand is stored as such,
  // or by columns as [k][m] or [n][k].
  template <int K, bool LeftColumns, bool RightColumns>
  __device__ __forceinline__ void add(const S* left, int left_row, const S* right, int right_row) {
    // which of four 8 x 8 matrices this lane names a row of, and the row
    const int part = threadIdx.x % kWarp / 8, line = threadIdx.x % 8;
    const int low = part % 2 * 8, high = part / 2 * 8;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
      unsigned a[2][4], b[4][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int m = row() + 16 * i + low, l = k + high;
        load_matrices<LeftColumns>(
            left + (LeftColumns ? (l + line) * left_row + m : (m + line) * left_row + l), a[i]);
      }
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const int n = column() + 8 * j + high, l = k + low;
        unsigned words[4];
        load_matrices<!RightColumns>(
            right + (RightColumns ? (n + line) * right_row + l : (l + line) * right_row + n),
            words);
#pragma unroll
        for (int w = 0; w < 4; ++w) b[j + w / 2][w % 2] = words[w];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) add_product<S>(a[i], b[j], sum_[i][j]);
    }
  }

  __device__ __forceinline__ void store(float* out, int out_row) const {  // [64, out_row]
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int w = 0; w < 4; w += 2) {
          const Pack<float, 2> pair = {{sum_[i][j][w], sum_[i][j][w + 1]}};
          pair.store(out + (row() + 16 * i + w * 4 + g) * out_row + column() + 8 * j + 2 * t);
        }
  }

 private:
  __device__ __forceinline__ static int row() { return threadIdx.x / kWarp / 2 * 32; }
  __device__ __forceinline__ static int column() { return threadIdx.x / kWarp % 2 * 32; }

  float sum_[2][4][4] = {};
};

}  // namespace osf::cuda
