#pragma once
#include "isa.h"

// Small matrix products. Every element of C is one chain of multiply-adds in the order of k, broken
// only at multiples of kBlockK, so its bits do not depend on the tile that it falls into.
namespace osf::OSF_ISA {
namespace {

// Rows of the register tile
constexpr int kTileRows = kRegisters / 4;
constexpr int kTileVectors = 2;
template <class T>
constexpr int64_t kTileColumns = kTileVectors * kLanes<T>;
constexpr int64_t kBlockK = 256;

// C[MR, NR vectors] = or += A[MR, K] B[K, NR vectors]; with TA the memory of A holds [K, MR].
template <int MR, int NR, bool TA, class T>
OSF_INLINE void tile_product(int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, T* C,
                             int64_t ldc, bool accumulate) {
  Vector<T> sum[MR][NR] = {};
  for (int64_t k = 0; k < K; ++k) {
    Vector<T> b[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) b[j] = load(B + k * ldb + j * kLanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const T a = TA ? A[k * lda + i] : A[i * lda + k];
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) sum[i][j] += a * b[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) {
      T* c = C + i * ldc + j * kLanes<T>;
      store(c, accumulate ? load(c) + sum[i][j] : sum[i][j]);
    }
}

// One column panel of NR vectors, rows [m, M).
template <int NR, bool TA, class T>
void panel_product(int64_t m, int64_t M, int64_t K, const T* A, int64_t lda, const T* B,
                   int64_t ldb, T* C, int64_t ldc, bool accumulate) {
  const auto row = [&](int64_t i) { return TA ? A + i : A + i * lda; };
  for (; m + kTileRows <= M; m += kTileRows)
    tile_product<kTileRows, NR, TA>(K, row(m), lda, B, ldb, C + m * ldc, ldc, accumulate);
  for (; m + 4 <= M; m += 4)
    tile_product<4, NR, TA>(K, row(m), lda, B, ldb, C + m * ldc, ldc, accumulate);
  for (; m < M; ++m) tile_product<1, NR, TA>(K, row(m), lda, B, ldb, C + m * ldc, ldc, accumulate);
}

// C[M, N] = or += op(A)[M, K] B[K, N] for K <= kBlockK; N is a multiple of the vector length.
template <bool TA, class T>
void block_product(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B,
                   int64_t ldb, T* C, int64_t ldc, bool accumulate) {
  int64_t n = 0;
  for (; n + kTileColumns<T> <= N; n += kTileColumns<T>)
    panel_product<kTileVectors, TA>(0, M, K, A, lda, B + n, ldb, C + n, ldc, accumulate);
  for (; n < N; n += kLanes<T>)
    panel_product<1, TA>(0, M, K, A, lda, B + n, ldb, C + n, ldc, accumulate);
}

}  // namespace
}  // namespace osf::OSF_ISA
