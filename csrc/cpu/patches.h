#pragma once
#include "isa.h"

// Gathers patches into small matrices that stay in the cache, and scatters them back.
namespace osf::OSF_ISA {
namespace {

// f(n, count, offset) for every run of patches of [n0, n1) that lie side by side in one tile row.
template <class F>
OSF_INLINE void for_each_run(const PatchGrid& grid, int64_t b, int64_t g, int64_t n0, int64_t n1,
                             F f) {
  for (int64_t n = n0; n < n1;) {
    const int64_t count = min(n1 - n, grid.tile_columns() - n % grid.tile_columns());
    f(n - n0, count, grid.origin(b, g, n));
    n += count;
  }
}

// f(j) for j in [0, count), in groups of whole and half vectors that the compiler unrolls.
template <class T, class F>
OSF_INLINE void for_each_lane(int64_t count, F f) {
  int64_t j = 0;
  for (; j + kLanes<T> <= count; j += kLanes<T>)
    for (int i = 0; i < kLanes<T>; ++i) f(j + i);
  for (; j + kLanes<T> / 2 <= count; j += kLanes<T> / 2)
    for (int i = 0; i < kLanes<T> / 2; ++i) f(j + i);
  for (; j < count; ++j) f(j);
}

// Elements of a patch's row in one S: a uint32_t is two of 16 bits.
template <class S>
constexpr int64_t kElements = 1;
template <>
constexpr int64_t kElements<uint32_t> = 2;

// Patches as columns: columns[d][n] for n in [n0, n1); P is the patch side, or 0 if only known
// at run time.
template <int P, class S, class T>
void gather_columns(const PatchGrid& grid, int64_t b, int64_t g, int64_t n0, int64_t n1,
                    const S* __restrict x, T* __restrict columns, int64_t ld) {
  const int64_t p = P ? P : grid.p, width = p / kElements<S>;
  for_each_run(grid, b, g, n0, n1, [&](int64_t n, int64_t count, int64_t offset) {
    for (int64_t c = 0; c < grid.C; ++c)
      for (int64_t i = 0; i < p; ++i) {
        const S* src = x + (offset + grid.row(c, i)) / kElements<S>;
        T* dst = columns + (c * p + i) * width * ld + n;
        for_each_lane<T>(count, [&](int64_t j) {
          for (int64_t k = 0; k < width; ++k) dst[k * ld + j] = widen(src[j * width + k]);
        });
      }
  });
}

// Inverse of gather_columns.
template <int P, class S, class T>
void scatter_columns(const PatchGrid& grid, int64_t b, int64_t g, int64_t n0, int64_t n1,
                     const T* __restrict columns, int64_t ld, S* __restrict y) {
  const int64_t p = P ? P : grid.p, width = p / kElements<S>;
  for_each_run(grid, b, g, n0, n1, [&](int64_t n, int64_t count, int64_t offset) {
    for (int64_t c = 0; c < grid.C; ++c)
      for (int64_t i = 0; i < p; ++i) {
        S* dst = y + (offset + grid.row(c, i)) / kElements<S>;
        const T* src = columns + (c * p + i) * width * ld + n;
        for_each_lane<T>(count, [&](int64_t j) {
          for (int64_t k = 0; k < width; ++k) narrow(src[k * ld + j], dst[j * width + k]);
        });
      }
  });
}

// Patches as rows: rows[n][d] for n in [n0, n1).
template <int P, class S, class T>
void gather_rows(const PatchGrid& grid, int64_t b, int64_t g, int64_t n0, int64_t n1,
                 const S* __restrict x, T* __restrict rows, int64_t ld) {
  const int64_t p = P ? P : grid.p, lines = grid.C * p;
  for_each_run(grid, b, g, n0, n1, [&](int64_t n, int64_t count, int64_t offset) {
    // p elements of every patch from each line
    const auto line = [&](int64_t l) { return x + offset + grid.row(l / p, l % p); };
    const auto copy = [&](int64_t l0, int64_t l1, int64_t j0) {
      for (int64_t l = l0; l < l1; ++l) {
        const S* src = line(l);
        T* dst = rows + n * ld + l * p;
        for (int64_t j = j0; j < count; ++j)
          for (int64_t k = 0; k < p; ++k) dst[j * ld + k] = widen(src[j * p + k]);
      }
    };
    int64_t l = 0;
    // where a vector has p elements of four patches or more, they are transposed in registers
    constexpr int kWords = __is_same(S, T) ? P * sizeof(S) / sizeof(uint32_t) : 0;
    if constexpr (kWords > 0 && kWords <= kLanes<uint32_t> / 4) {
      constexpr int size = kLanes<uint32_t> / kWords;
      for (; l + size <= lines; l += size) {
        int64_t j = 0;
        for (; j + size <= count; j += size) {
          Vector<uint32_t> v[size];
#pragma GCC unroll 16
          for (int i = 0; i < size; ++i)
            v[i] = load(reinterpret_cast<const uint32_t*>(line(l + i) + j * P));
          transpose<kWords>(v);
#pragma GCC unroll 16
          for (int i = 0; i < size; ++i)
            store(reinterpret_cast<uint32_t*>(rows + (n + j + i) * ld + l * P), v[i]);
        }
        copy(l, l + size, j);
      }
    }
    copy(l, lines, 0);
  });
}

// Whether patches are of 2 x 2 in latents of 4 channels, in a row of a tile a multiple of
// `patches`: the sums of their 16 elements, or of half of them, stay in registers, and nothing is
// gathered. The results are those of the general ways, bit by bit.
inline bool fits_registers(const PatchGrid& grid, int64_t patches) {
  return grid.p == 2 && grid.C == 4 && grid.tile_columns() % patches == 0;
}

// Calls f with the patch side as a constant where a fast path exists.
template <class F>
void with_patch_side(int64_t p, F f) {
  switch (p) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 4: return f.template operator()<4>();
    case 8: return f.template operator()<8>();
    default: return f.template operator()<0>();
  }
}

}  // namespace
}  // namespace osf::OSF_ISA
