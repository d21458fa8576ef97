#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"

// Every thread of a warp holds the whole fragments, and stores its share.
namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  float value[16][16];
};

inline float widen(__half x) { return __half2float(x); }
inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
inline void require_aligned(const void* p, unsigned row_bytes) {
  emulation::require(reinterpret_cast<uintptr_t>(p) % 32 == 0 && row_bytes % 16 == 0,
                     "fragment not aligned");
}

template <class Fragment>
void fill_fragment(Fragment& f, float x) {
  for (auto& row : f.value)
    for (float& element : row) element = x;
}

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& f, const T* p, unsigned row) {
  require_aligned(p, row * sizeof(T));
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j)
      f.value[i][j] = widen(std::is_same_v<Layout, row_major> ? p[i * row + j] : p[j * row + i]);
}

// d = a b + c, where d may be c
template <class C, class A, class B>
void mma_sync(C& d, const A& a, const B& b, const C& c) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      float sum = c.value[i][j];
      for (int k = 0; k < 16; ++k) sum += a.value[i][k] * b.value[k][j];
      d.value[i][j] = sum;
    }
}

template <class C>
void store_matrix_sync(float* p, const C& c, unsigned row, layout_t) {
  require_aligned(p, row * sizeof(float));
  const unsigned i = threadIdx.x % 32 / 2, j = threadIdx.x % 2 * 8;  // of 8 elements per thread
  memcpy(p + i * row + j, &c.value[i][j], 8 * sizeof(float));
}

}  // namespace nvcuda::wmma
