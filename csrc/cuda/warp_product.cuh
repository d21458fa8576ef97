#pragma once
#include "common.cuh"
#ifndef __CUDACC__
#include <mma.h>  // the emulation's
#endif

// Products on tensor cores whose operands a warp holds in registers.
namespace osf::cuda {

// Two neighbouring elements of a row of A or of a column of B, the first in the lower half
template <class S>
__device__ __forceinline__ unsigned word(S first, S second) {
  const S both[] = {first, second};
  unsigned bits;
  memcpy(&bits, both, sizeof bits);
  return bits;
}

// sum += A B for A [16, 16] and B [16, 8]. Lane 4 g + t of the warp holds, of A, the rows g (words
// 0, 2) and g + 8 (1, 3) in the columns 2 t, 2 t + 1 (0, 1) and 2 t + 8, 2 t + 9 (2, 3); of B the
// column g in the same rows (0 and 1); of the sum the rows g (0, 1) and g + 8 (2, 3) in the columns
// 2 t, 2 t + 1. PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
template <class S>
__device__ __forceinline__ void add_product(const unsigned (&a)[4], const unsigned (&b)[2],
                                            float (&sum)[4]) {
#ifdef __CUDACC__
#define OSF_MMA(type)                                                        \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (__is_same(S, __half))
    OSF_MMA("f16");
  else
    OSF_MMA("bf16");
#undef OSF_MMA
#else
  emulation::add_product<S>(a, b, sum);
#endif
}

// The nearest tf32, which has 10 bits of mantissa; ties away from zero
__device__ __forceinline__ float to_tf32(float x) {
#ifdef __CUDACC__
  unsigned nearest;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(nearest) : "f"(x));
  return __uint_as_float(nearest);
#else
  return emulation::to_tf32(x);
#endif
}

// x = high + low, but for 2^-22 x
__device__ __forceinline__ void split_tf32(float x, float& high, float& low) {
  high = to_tf32(x);
  low = to_tf32(x - high);
}

// sum += A B for A [16, 8] and B [8, 8] in tf32. Lane 4 g + t holds, of A, the rows g (0, 2) and
// g + 8 (1, 3) in the columns t (0, 1) and t + 4 (2, 3); of B the column g in the rows t (0) and
// t + 4 (1); of the sum as above. PTX ISA, "Matrix Fragments for mma.m16n8k8".
__device__ __forceinline__ void add_tf32_product(const float (&a)[4], const float (&b)[2],
                                                 float (&sum)[4]) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#else
  emulation::add_tf32_product(a, b, sum);
#endif
}

// Four 8 x 8 matrices of 16-bit elements from shared memory, of whose 32 rows, each aligned to 16
// bytes, every lane names one. Word i of lane 4 g + t holds, of matrix i, the columns 2 t, 2 t + 1
// of row g, or of its transpose. PTX ISA, ldmatrix.
template <bool Transposed, class S>
__device__ __forceinline__ void load_matrices(const S* row, unsigned (&words)[4]) {
#ifdef __CUDACC__
#define OSF_LDMATRIX(trans)                                                                \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 {%0, %1, %2, %3}, [%4];" \
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])            \
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))                 \
               : "memory")
  if constexpr (Transposed)
    OSF_LDMATRIX(".trans");
  else
    OSF_LDMATRIX("");
#undef OSF_LDMATRIX
#else
  emulation::load_matrices<Transposed>(row, words);
#endif
}

// Patches as runs of 16 bytes of an image row: R patches side by side in each.
template <int P>
struct PatchRuns {
  static constexpr int R = 8 / P;

  // Whether no run leaves a tile or is misaligned
  template <class Tiles, class... Pointers>
  static bool fit(const Tiles& tiles, Pointers... images) {
    return tiles.columns.divisor() % R == 0 && aligned(16, images...);
  }
};

// f<P, K>() where patches of side P have 16 K elements, K = 1 or 2, and fit; else otherwise().
template <class Tiles, class F, class Otherwise, class... Pointers>
cudaError_t with_patch_runs(const Tiles& tiles, F f, Otherwise otherwise, Pointers... images) {
  const auto with_side = [&]<int P>() {
    if (!PatchRuns<P>::fit(tiles, images...)) return otherwise();
    return tiles.D == 16 ? f.template operator()<P, 1>() : f.template operator()<P, 2>();
  };
  if (tiles.D != 16 && tiles.D != 32) return otherwise();
  switch (tiles.grid.p) {
    case 1: return with_side.template operator()<1>();
    case 2: return with_side.template operator()<2>();
    case 4: return with_side.template operator()<4>();
    default: return otherwise();
  }
}

}  // namespace osf::cuda
