#include "gemm_bf16.h"
#include "patches.h"

namespace osf::OSF_ISA {
namespace {

// op(q) x for the patches [n0, n1) of one tile, or accumulated over k in blocks.
template <class T>
void rotate(bool transposed, int64_t D, int64_t columns, const T* q, const T* x, T* y, int64_t ld) {
  for (int64_t k = 0; k < D; k += kBlockK) {
    const int64_t K = min(kBlockK, D - k);
    if (transposed)
      block_product<true>(D, columns, K, q + k * D, D, x + k * ld, ld, y, ld, k > 0);
    else
      block_product<false>(D, columns, K, q + k, D, x + k * ld, ld, y, ld, k > 0);
  }
}

// op(q) x for the patches [n0, n1), see fits_registers; q in memory is [16, 16]. As many rows of
// the result at once as the registers hold.
template <bool TA, class T>
void rotate_in_registers(const PatchGrid& grid, int64_t b, int64_t g, int64_t n0, int64_t n1,
                         const T* q, const T* x, T* y) {
  constexpr int kRows = kRegisters / 2;
  for_each_run(grid, b, g, n0, n1, [&](int64_t, int64_t count, int64_t offset) {
    for (int64_t j = 0; j < count; j += kLanes<T>) {
      const auto line = [&](int k) { return offset + grid.row(k / 2, k % 2) + 2 * j; };
      for (int m = 0; m < 16; m += kRows) {
        Vector<T> sum[kRows] = {};
        for (int k = 0; k < 8; ++k) {
          Vector<T> first = load(x + line(k)), second = load(x + line(k) + kLanes<T>);
          unzip(first, second);
          const T* a = q + (TA ? 32 * k + m : 16 * m + 2 * k);
#pragma GCC unroll 16
          for (int i = 0; i < kRows; ++i) sum[i] += a[TA ? i : 16 * i] * first;
#pragma GCC unroll 16
          for (int i = 0; i < kRows; ++i) sum[i] += a[TA ? 16 + i : 16 * i + 1] * second;
        }
#pragma GCC unroll 8
        for (int k = 0; k < kRows / 2; ++k) {
          T* const to = y + line(m / 2 + k);
          zip(sum[2 * k], sum[2 * k + 1]);
          store(to, sum[2 * k]);
          store(to + kLanes<T>, sum[2 * k + 1]);
        }
      }
    }
  });
}

template <int P, class S>
void run(const Threads& threads, const PatchGrid& grid, const S* x, const Matrices& q, S* out) {
  using T = Accumulator<S>;
  constexpr int64_t ld = kTileColumns<T>;
  const int64_t D = grid.dim(), N = grid.tile_patches(), blocks = ceil_div(N, ld);
  const int64_t grain = ceil_div(1 << 18, D * D * ld);
  const bool in_registers = fits_registers(grid, kLanes<T>);
  parallel_for(threads, grid.B * grid.tiles() * blocks, grain, [&](int64_t i0, int64_t i1) {
    Buffer<T> memory(2 * D * ld + (sizeof(S) < sizeof(T) ? D * D : 0));
    T *columns = memory, *rotated = columns + D * ld, *wide = rotated + D * ld;
    __builtin_memset(columns, 0, D * ld * sizeof(T));
    int64_t widened = -1;
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t b = i / blocks / grid.tiles(), g = i / blocks % grid.tiles();
      const int64_t n0 = i % blocks * ld, n1 = min(N, n0 + ld);
      const int64_t at = i / blocks * q.stride;
      const S* matrix = static_cast<const S*>(q.data) + at;
      const T* m;
      if constexpr (sizeof(S) < sizeof(T)) {
        if (at != widened)
          for (int64_t j = 0; j < D * D; ++j) wide[j] = widen(matrix[j]);
        widened = at;
        m = wide;
      } else {
        m = matrix;
      }
      if constexpr (P == 2 && __is_same(S, T))
        if (in_registers) {
          const auto rotate =
              q.transposed ? rotate_in_registers<true, T> : rotate_in_registers<false, T>;
          rotate(grid, b, g, n0, n1, m, x, out);
          continue;
        }
      gather_columns<P>(grid, b, g, n0, n1, x, columns, ld);
      rotate<T>(q.transposed, D, round_up(n1 - n0, kLanes<T>), m, columns, rotated, ld);
      scatter_columns<P>(grid, b, g, n0, n1, rotated, ld, out);
    }
  });
}

#ifdef __AVX512BF16__
// The same in bfloat16: a word is a row of a patch, two elements, and q is in pairs along k
template <bool TA>
void rotate_pairs_in_registers(const PatchGrid& grid, int64_t b, int64_t g, int64_t n0, int64_t n1,
                               const uint32_t* q, const uint32_t* x, uint32_t* y) {
  for_each_run(grid, b, g, n0, n1, [&](int64_t, int64_t count, int64_t offset) {
    for (int64_t j = 0; j < count; j += kLanes<uint32_t>) {
      const auto line = [&](int k) { return (offset + grid.row(k / 2, k % 2)) / 2 + j; };
      __m512 sum[16] = {};
      for (int k = 0; k < 8; ++k) {
        const auto pairs = (__m512bh)load(x + line(k));
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const auto a = (__m512bh)_mm512_set1_epi32(int(q[TA ? 16 * k + i : 8 * i + k]));
          sum[i] = _mm512_dpbf16_ps(sum[i], a, pairs);
        }
      }
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) store(y + line(k), rounded(sum[2 * k], sum[2 * k + 1]));
    }
  });
}

// The same for patches of even side in bfloat16, whose elements are neighbours in pairs
template <int P>
void run_pairs(const Threads& threads, const PatchGrid& grid, const void* x, const Matrices& q,
               void* out) {
  constexpr int64_t ld = kTileColumns<float>;
  const int64_t D = grid.dim(), N = grid.tile_patches(), blocks = ceil_div(N, ld);
  const int64_t grain = ceil_div(1 << 18, D * D * ld);
  const bool in_registers = fits_registers(grid, kLanes<uint32_t>);
  parallel_for(threads, grid.B * grid.tiles() * blocks, grain, [&](int64_t i0, int64_t i1) {
    Buffer<uint32_t> memory(D * ld + (q.transposed ? D / 2 * D : 0));
    uint32_t *columns = memory, *rotated = columns + D / 2 * ld, *paired = rotated + D / 2 * ld;
    __builtin_memset(columns, 0, D / 2 * ld * sizeof(uint32_t));
    int64_t in_pairs = -1;
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t b = i / blocks / grid.tiles(), g = i / blocks % grid.tiles();
      const int64_t n0 = i % blocks * ld, n1 = min(N, n0 + ld);
      const int64_t at = i / blocks * q.stride;
      const uint16_t* const matrix = static_cast<const uint16_t*>(q.data) + at;
      const auto rows = reinterpret_cast<const uint32_t*>(matrix);  // [D, D / 2]
      if (q.transposed && at != in_pairs) pair_rows(D / 2, D, matrix, D, paired, D);
      in_pairs = at;
      const auto words = static_cast<const uint32_t*>(x);
      const auto rotated_words = static_cast<uint32_t*>(out);
      if constexpr (P == 2)
        if (in_registers) {
          const auto rotate =
              q.transposed ? rotate_pairs_in_registers<true> : rotate_pairs_in_registers<false>;
          rotate(grid, b, g, n0, n1, q.transposed ? paired : rows, words, rotated_words);
          continue;
        }
      gather_columns<P>(grid, b, g, n0, n1, words, columns, ld);
      const auto product = [&]<bool TA>(const uint32_t* A, int64_t lda, const uint32_t* ahead) {
        const auto run = n1 - n0 > ld / 2 ? product_to_pairs<2, TA> : product_to_pairs<1, TA>;
        run(D, D / 2, A, lda, columns, ld, ahead, rotated, ld);
      };
      // a small matrix is at hand soon enough
      const bool small = D <= 64;
      if (q.transposed)
        product.template operator()<true>(paired, D, small ? nullptr : rows + q.stride / 2);
      else
        product.template operator()<false>(rows, D / 2, small ? nullptr : rows + 8 * (D / 2));
      scatter_columns<P>(grid, b, g, n0, n1, rotated, ld, rotated_words);
    }
  });
}
#endif

}  // namespace

void patch_rotate(const Threads& threads, DType dtype, const PatchGrid& grid, const void* x,
                  const Matrices& q, void* out) {
  with_dtype(dtype, [&]<class S>(S) {
    with_patch_side(grid.p, [&]<int P>() {
#ifdef __AVX512BF16__
      if constexpr (__is_same(S, BFloat16) && P % 2 == 0)
        if (grid.p % 2 == 0) return run_pairs<P>(threads, grid, x, q, out);
#endif
      run<P>(threads, grid, static_cast<const S*>(x), q, static_cast<S*>(out));
    });
  });
}

}  // namespace osf::OSF_ISA
