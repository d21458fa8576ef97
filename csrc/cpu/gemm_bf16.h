#pragma once
#include "gemm.h"

#ifdef __AVX512BF16__

// Products of bfloat16 matrices whose elements come in pairs along k, two in a uint32_t: vdpbf16ps
// adds both products to a float. It takes numbers below 2^-126 as zero.
namespace osf::OSF_ISA {
namespace {

// sum[MR, NR vectors] += A[MR, K] B[K, NR vectors], K in pairs; with TA the memory of A is [K, MR].
// What is needed next, [MR, K] at `ahead` unless it is null, comes into the caches meanwhile.
template <bool TA, int MR, int NR>
OSF_INLINE void add_pairs(int64_t K, const uint32_t* A, int64_t lda, const uint32_t* B, int64_t ldb,
                          const uint32_t* ahead, __m512 (&sum)[MR][NR]) {
  for (int64_t k = 0; k < K; ++k) {
    if (ahead) __builtin_prefetch(ahead + MR * k);
    __m512bh b[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) b[j] = (__m512bh)_mm512_loadu_si512(B + k * ldb + 16 * j);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const auto a = (__m512bh)_mm512_set1_epi32(int(TA ? A[k * lda + i] : A[i * lda + k]));
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], a, b[j]);
    }
  }
}

// From size elements and then size others to size pairs, everywhere in the vector
template <int size>
OSF_INLINE Vector<uint32_t> interleave(Vector<uint32_t> v) {
  return [&]<int... l>(std::integer_sequence<int, l...>) {
    const auto halves = (Vector<uint16_t>)v;
    return (Vector<uint32_t>)pick<(l / (2 * size) * 2 * size + l % 2 * size + l / 2 % size)...>(
        halves, halves);
  }(std::make_integer_sequence<int, kLanes<uint16_t>>{});
}

OSF_INLINE Vector<uint32_t> rounded(__m512 first, __m512 second) {
  return interleave<16>((Vector<uint32_t>)_mm512_cvtne2ps_pbh(second, first));
}

// Rows 2 r and 2 r + 1 of C[M, NR vectors] = op(A) B as pairs; M is a multiple of 4. What is needed
// next, [M, K], is at `ahead` unless it is null.
template <int NR, bool TA>
void product_to_pairs(int64_t M, int64_t K, const uint32_t* A, int64_t lda, const uint32_t* B,
                      int64_t ldb, const uint32_t* ahead, uint32_t* C, int64_t ldc) {
  const auto rows = [&]<int MR>(int64_t m) {
    __m512 sum[MR][NR] = {};
    add_pairs<TA>(K, TA ? A + m : A + m * lda, lda, B, ldb, ahead ? ahead + m * K : nullptr, sum);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i += 2)
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j)
        store(C + (m + i) / 2 * ldc + 16 * j, rounded(sum[i][j], sum[i + 1][j]));
  };
  int64_t m = 0;
  for (; m + 8 <= M; m += 8) rows.template operator()<8>(m);
  for (; m < M; m += 4) rows.template operator()<4>(m);
}

// C[M, N] = or += A^T B in float, N a multiple of 16; unless it is null, the result goes to
// out[M, columns] in bfloat16 instead.
inline void product_of_pairs(int64_t M, int64_t N, int64_t K, const uint32_t* A, int64_t lda,
                             const uint32_t* B, int64_t ldb, float* C, int64_t ldc, bool accumulate,
                             BFloat16* out, int64_t columns) {
  const auto tile = [=]<int MR, int NR>(int64_t m, int64_t n) {
    __m512 sum[MR][NR] = {};
    float* const c = C + m * ldc + n;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j)
        if (accumulate) sum[i][j] = _mm512_loadu_ps(c + i * ldc + 16 * j);
    if (out)  // written soon
      for (int i = 0; i < MR; ++i) __builtin_prefetch(out + (m + i) * columns + n, 1);
    add_pairs<true>(K, A + m, lda, B + n, ldb, nullptr, sum);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) {
        const int64_t left = columns - n - 16 * j;
        if (out == nullptr) {
          _mm512_storeu_ps(c + i * ldc + 16 * j, sum[i][j]);
          continue;
        }
        const auto half = (__m256i)_mm512_cvtneps_pbh(sum[i][j]);
        BFloat16* const o = out + (m + i) * columns + n + 16 * j;
        if (left >= 16)  // a masked store is slow
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(o), half);
        else if (left > 0)
          _mm256_mask_storeu_epi16(o, __mmask16((1u << left) - 1), half);
      }
  };
  const auto panel = [&]<int NR>(int64_t n) {
    int64_t m = 0;
    for (; m + 8 <= M; m += 8) tile.template operator()<8, NR>(m, n);
    for (; m + 4 <= M; m += 4) tile.template operator()<4, NR>(m, n);
    for (; m < M; ++m) tile.template operator()<1, NR>(m, n);
  };
  int64_t n = 0;
  for (; n + 32 <= N; n += 32) panel.template operator()<2>(n);
  for (; n < N; n += 16) panel.template operator()<1>(n);
}

// pairs[k][i] = rows[2 k][i] and rows[2 k + 1][i]
inline void pair_rows(int64_t count, int64_t columns, const uint16_t* rows, int64_t ld,
                      uint32_t* pairs, int64_t ld_pairs) {
  for (int64_t k = 0; k < count; ++k) {
    const uint16_t *const first = rows + 2 * k * ld, *const second = first + ld;
    for (int64_t i = 0; i < columns; ++i)
      pairs[k * ld_pairs + i] = first[i] | uint32_t(second[i]) << 16;
  }
}

}  // namespace
}  // namespace osf::OSF_ISA
#endif
