#pragma once
#include <mma.h>

#include "common.cuh"

namespace osf::cuda {

// The 32 x 32 part of a 64 x 64 product that one of four warps computes on tensor cores, in 2 x 2
// fragments of float32 sums. The operands lie in shared memory, aligned to 32 bytes.
template <class S>
class TensorTile {
 public:
  __device__ __forceinline__ TensorTile() {
    for (auto& row : sum_)
      for (auto& part : row) nvcuda::wmma::fill_fragment(part, 0.f);
  }

  // Adds left[m][k] right[k][n] for 16 k; Columns says that right is stored as [n][k].
  template <bool Columns>
  __device__ __forceinline__ void add(const S* left, int left_row, const S* right, int right_row) {
    namespace wmma = nvcuda::wmma;
    using Layout = std::conditional_t<Columns, wmma::col_major, wmma::row_major>;
    wmma::fragment<wmma::matrix_a, 16, 16, 16, S, wmma::row_major> a[2];
    wmma::fragment<wmma::matrix_b, 16, 16, 16, S, Layout> b[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      wmma::load_matrix_sync(a[i], left + (row() + 16 * i) * left_row, left_row);
      wmma::load_matrix_sync(b[i], right + (column() + 16 * i) * (Columns ? right_row : 1),
                             right_row);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) wmma::mma_sync(sum_[i][j], a[i], b[j], sum_[i][j]);
  }

  __device__ __forceinline__ void store(float* out, int out_row) const {  // [64, out_row]
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        nvcuda::wmma::store_matrix_sync(out + (row() + 16 * i) * out_row + column() + 16 * j,
                                        sum_[i][j], out_row, nvcuda::wmma::mem_row_major);
  }

 private:
  __device__ __forceinline__ static int row() { return threadIdx.x / kWarp / 2 * 32; }
  __device__ __forceinline__ static int column() { return threadIdx.x / kWarp % 2 * 32; }

  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sum_[2][2];
};

}  // namespace osf::cuda
