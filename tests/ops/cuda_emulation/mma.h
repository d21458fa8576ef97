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

namespace emulation {

// mma.m16n8k16 of a warp: see csrc/cuda/warp_product.cuh for who holds what.
template <class S>
void add_product(const unsigned (&a)[4], const unsigned (&b)[2], float (&sum)[4]) {
  unsigned words[6][32];
  const unsigned warp = threadIdx.x / 32 * 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 6; ++i) {
    memcpy(slot(threadIdx.x), i < 4 ? &a[i] : &b[i - 4], 4);
    wait_for_warp();
    for (unsigned lane = 0; lane < 32; ++lane) memcpy(&words[i][lane], slot(warp + lane), 4);
    wait_for_warp();
  }
  const auto element = [&](unsigned i, unsigned lane, unsigned half) {
    S pair[2];
    memcpy(pair, &words[i][lane], 4);
    return nvcuda::wmma::widen(pair[half]);
  };
  for (unsigned w = 0; w < 4; ++w)
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned within = k % 8 / 2, upper = k / 8;
      sum[w] += element(upper * 2 + w / 2, g * 4 + within, k % 2) *
                element(4 + upper, (t * 2 + w % 2) * 4 + within, k % 2);
    }
}

}  // namespace emulation
