#include "gemm_bf16.h"
#include "patches.h"

namespace osf::OSF_ISA {
namespace {

constexpr int64_t kBlockPatches = 64;
// A sum over all images is made of at most this many partial sums, whatever the threads.
constexpr int64_t kPartialSums = 16;

// sum[16, 16] = or += a_n b_n^T over the patches [n0, n1), see fits_registers: a few patches of b
// are transposed, and the elements of a taken one by one as they lie in the image. As much of the
// sum at once as the registers hold.
template <class T>
void add_in_registers(const PatchGrid& grid, int64_t image, int64_t tile, int64_t n0, int64_t n1,
                      const T* a, const T* b, T* sum, bool accumulate) {
  constexpr int kRows = kRegisters / 2, kPairs = kLanes<uint64_t>;
  const auto part = [&](int m, int d) {
    Vector<T> total[kRows] = {};
    for_each_run(grid, image, tile, n0, n1, [&](int64_t, int64_t count, int64_t offset) {
      for (int64_t j = 0; j < count; j += kPairs) {
        const auto line = [&](int l) { return offset + grid.row(l / 2, l % 2) + 2 * j; };
        Vector<uint64_t> pairs[kPairs];
#pragma GCC unroll 8
        for (int l = 0; l < kPairs; ++l)
          pairs[l] = load(reinterpret_cast<const uint64_t*>(b + line(d / 2 + l)));
        transpose(pairs);
#pragma GCC unroll 8
        for (int n = 0; n < kPairs; ++n)
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r)
            total[r] += a[line((m + r) / 2) + 2 * n + r % 2] * (Vector<T>)pairs[n];
      }
    });
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      T* const to = sum + 16 * (m + r) + d;
      store(to, accumulate ? load(to) + total[r] : total[r]);
    }
  };
  for (int m = 0; m < 16; m += kRows)
    for (int d = 0; d < 16; d += kLanes<T>) part(m, d);
}

// sum[r, d] = or += a_n[r] b_n[d] over the patches of one tile, for the rows [r0, r1); unless it is
// null, the sums are written to out[r1 - r0, D].
template <int P, class S, class T>
void add_tile(const PatchGrid& grid, int64_t image, int64_t tile, const S* a, const S* b,
              int64_t r0, int64_t r1, T* rows_a, T* rows_b, T* sum, int64_t ld, bool accumulate,
              S* out) {
  const int64_t N = grid.tile_patches();
  constexpr bool kPairs = __is_same(S, float);  // of two elements, moved as a uint64_t
  const bool in_registers = kPairs && fits_registers(grid, kLanes<uint64_t>);
  int64_t n0 = 0;
  do {  // also without patches, to write the zeros
    const int64_t n1 = min(N, n0 + kBlockPatches);
    const bool add = accumulate || n0 > 0;
    if (in_registers) {
      if constexpr (kPairs) add_in_registers(grid, image, tile, n0, n1, a, b, sum, add);
    } else {
      gather_rows<P>(grid, image, tile, n0, n1, a, rows_a, ld);
      gather_rows<P>(grid, image, tile, n0, n1, b, rows_b, ld);
      block_product<true, T>(r1 - r0, ld, n1 - n0, rows_a + r0, ld, rows_b, ld, sum, ld, add);
    }
    n0 = n1;
  } while (n0 < N);
  const int64_t D = grid.dim();
  for (int64_t r = 0; out && r < r1 - r0; ++r)
    for (int64_t d = 0; d < D; ++d) narrow(sum[r * ld + d], out[r * D + d]);
}

#ifdef __AVX512BF16__
// The same in bfloat16, two patches at once
template <int P>
void add_tile(const PatchGrid& grid, int64_t image, int64_t tile, const BFloat16* a,
              const BFloat16* b, int64_t r0, int64_t r1, float* rows_a, float* rows_b, float* sum,
              int64_t ld, bool accumulate, BFloat16* out) {
  const int64_t N = grid.tile_patches();
  const auto gather = [&](const BFloat16* x, int64_t n0, int64_t n1, float* memory) {
    const auto pairs = reinterpret_cast<uint32_t*>(memory);
    if constexpr (P > 0)
      if (grid.tile_columns() % 2 == 0) {
        // two neighbours are a patch of uint32_t, each row of it the one's row and the other's
        PatchGrid halved = grid;
        halved.W /= 2;
        gather_rows<P>(halved, image, tile, n0 / 2, n1 / 2, reinterpret_cast<const uint32_t*>(x),
                       pairs, ld);
        for (int64_t i = 0; i < (n1 - n0) / 2 * ld; i += kLanes<uint32_t>)
          store(pairs + i, interleave<P>(load(pairs + i)));
        return pairs;
      }
    const auto rows = reinterpret_cast<uint16_t*>(pairs + kBlockPatches / 2 * ld);
    gather_rows<P>(grid, image, tile, n0, n1, reinterpret_cast<const uint16_t*>(x), rows, ld);
    if ((n1 - n0) % 2) __builtin_memset(rows + (n1 - n0) * ld, 0, ld * sizeof(uint16_t));
    pair_rows(ceil_div(n1 - n0, 2), grid.dim(), rows, ld, pairs, ld);
    return pairs;
  };
  int64_t n0 = 0;
  do {
    const int64_t n1 = min(N, n0 + kBlockPatches);
    const uint32_t *const A = gather(a, n0, n1, rows_a), *const B = gather(b, n0, n1, rows_b);
    product_of_pairs(r1 - r0, ld, ceil_div(n1 - n0, 2), A + r0, ld, B, ld, sum, ld,
                     accumulate || n0 > 0, n1 == N ? out : nullptr, grid.dim());
    n0 = n1;
  } while (n0 < N);
}
#endif

template <int P, class S>
void run(const Threads& threads, const PatchGrid& grid, const S* a, const S* b, bool shared,
         S* out) {
  using T = Accumulator<S>;
  constexpr bool narrower = sizeof(S) < sizeof(T);
  const int64_t D = grid.dim(), ld = round_up(D, kLanes<T>);
  const int64_t images = shared ? ceil_div(grid.B, kPartialSums) : 1;
  const int64_t tiles = shared ? grid.tiles() : 1;  // of each image, in one sum
  const int64_t sums = ceil_div(grid.B, images ? images : 1) * (grid.tiles() / tiles);
  // idle threads take rows of the same sum, which does not change any element
  const int64_t parts = max(1, min(ceil_div(threads.count, max(1, sums)), D / 32));
  const int64_t rows = round_up(ceil_div(D, parts), kTileRows);
  const int64_t grain = ceil_div(1 << 18, rows * ld * grid.tile_patches() * images * tiles + 1);
  Buffer<T> partial(shared ? sums * D * ld : 0);
  parallel_for(threads, sums * parts, grain, [&](int64_t i0, int64_t i1) {
    Buffer<T> memory((2 * kBlockPatches + rows) * ld);
    T *rows_a = memory, *rows_b = rows_a + kBlockPatches * ld, *block = rows_b + kBlockPatches * ld;
    __builtin_memset(rows_b, 0, kBlockPatches * ld * sizeof(T));
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t s = i / parts, r0 = min(D, i % parts * rows), r1 = min(D, r0 + rows);
      T* sum = shared ? partial + (s * D + r0) * ld : block;
      S* narrowed = shared ? nullptr : out + (s * D + r0) * D;
      if constexpr (!narrower)
        if (!shared && ld == D) {
          sum = narrowed;
          narrowed = nullptr;
        }
      const int64_t first = shared ? s * images * tiles : s;
      const int64_t last = shared ? min(grid.B, (s + 1) * images) * tiles : s + 1;
      for (int64_t t = first; t < last; ++t)
        add_tile<P>(grid, t / grid.tiles(), t % grid.tiles(), a, b, r0, r1, rows_a, rows_b, sum, ld,
                    t > first, narrowed);
    }
  });
  if (!shared) return;
  for (int64_t r = 0; r < D; ++r)
    for (int64_t d = 0; d < D; ++d) {
      T total = 0;
      for (int64_t s = 0; s < sums; ++s) total += partial[(s * D + r) * ld + d];
      narrow(total, out[r * D + d]);
    }
}

}  // namespace

void patch_outer(const Threads& threads, DType dtype, const PatchGrid& grid, const void* a,
                 const void* b, bool shared, void* out) {
  with_dtype(dtype, [&]<class S>(S) {
    with_patch_side(grid.p, [&]<int P>() {
      run<P>(threads, grid, static_cast<const S*>(a), static_cast<const S*>(b), shared,
             static_cast<S*>(out));
    });
  });
}

}  // namespace osf::OSF_ISA
