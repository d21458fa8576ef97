#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace emulation {

inline float widen(__half x) { return __half2float(x); }
inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// ldmatrix.x4 of a warp
template <bool Transposed, class S>
void load_matrices(const S* row, unsigned (&words)[4]) {
  const S* rows[32];
  const unsigned warp = threadIdx.x / 32 * 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  require(reinterpret_cast<uintptr_t>(row) % 16 == 0, "matrix not aligned");
  memcpy(slot(threadIdx.x), &row, sizeof row);
  wait_for_warp();
  for (unsigned lane = 0; lane < 32; ++lane) memcpy(&rows[lane], slot(warp + lane), sizeof row);
  wait_for_warp();
  for (unsigned i = 0; i < 4; ++i) {
    const S* const* const matrix = rows + 8 * i;
    const S pair[2] = {Transposed ? matrix[2 * t][g] : matrix[g][2 * t],
                       Transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1]};
    memcpy(&words[i], pair, sizeof pair);
  }
}

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
    return widen(pair[half]);
  };
  for (unsigned w = 0; w < 4; ++w)
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned within = k % 8 / 2, upper = k / 8;
      sum[w] += element(upper * 2 + w / 2, g * 4 + within, k % 2) *
                element(4 + upper, (t * 2 + w % 2) * 4 + within, k % 2);
    }
}

#pragma GCC push_options
#pragma GCC optimize("O2")  // most of the time is spent here

inline float to_tf32(float x) {
  uint32_t word;
  memcpy(&word, &x, sizeof x);
  if (x - x == 0) word = (word + 0x1000) & ~0x1fffu;
  memcpy(&x, &word, sizeof x);
  return x;
}

// The double next to x toward zero with so many bits of mantissa
inline double truncated(double x, int bits) {
  uint64_t word;
  memcpy(&word, &x, sizeof x);
  word &= ~uint64_t{0} << (53 - bits);
  memcpy(&x, &word, sizeof x);
  return x;
}

// mma.m16n8k8 of a warp. It adds four products, toward zero, with one bit more than a float has: a
// model after Fasi et al., "Numerical behavior of NVIDIA tensor cores" (2021), whose A100 cuts all
// terms where the largest ends, not one sum after the other. It was compared with no GPU.
inline void add_tf32_product(const float (&a)[4], const float (&b)[2], float (&sum)[4]) {
  const float held[] = {a[0], a[1], a[2], a[3], b[0], b[1]}, *const mine = held;
  for (float x : held) require(x != x || to_tf32(x) == x, "operand is not tf32");
  const unsigned warp = threadIdx.x / 32 * 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const float *rows[4], *columns[2][4];
  memcpy(slot(threadIdx.x), &mine, sizeof mine);
  wait_for_warp();
  for (unsigned k = 0; k < 4; ++k) {
    memcpy(&rows[k], slot(warp + g * 4 + k), sizeof mine);
    for (unsigned n = 0; n < 2; ++n)
      memcpy(&columns[n][k], slot(warp + (t * 2 + n) * 4 + k), sizeof mine);
  }
  for (unsigned w = 0; w < 4; ++w)
    for (unsigned four = 0; four < 2; ++four) {
      double total = sum[w];
      for (unsigned k = 0; k < 4; ++k) {
        const double product = double{rows[k][four * 2 + w / 2]} * columns[w % 2][k][4 + four];
        total = truncated(total + product, 25);
      }
      sum[w] = static_cast<float>(truncated(total, 24));
    }
  wait_for_warp();
}

#pragma GCC pop_options

}  // namespace emulation
