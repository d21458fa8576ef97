#pragma once
#include "../loss_math.h"
#include "isa.h"

// Per-image means and their gradients: elementwise work in chunks of fixed size, so that the sums
// do not depend on the threads.
namespace osf::OSF_ISA {
namespace {

constexpr int64_t kChunk = 8192;

// loss[b] = mean of f(i) over i in [b n, (b + 1) n), summed per lane, then per chunk in double.
template <class T, class F>
void mean_per_image(const Threads& threads, int64_t B, int64_t n, T* loss, F f) {
  constexpr int kSums = 4 * kLanes<T>;
  const int64_t chunks = ceil_div(n, kChunk);
  Buffer<double> partial(B * chunks);
  parallel_for(threads, B * chunks, 4, [&](int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; ++c) {
      const int64_t i0 = c / chunks * n + c % chunks * kChunk;
      const int64_t i1 = min(i0 + kChunk, (c / chunks + 1) * n);
      T sum[kSums] = {};
      int64_t i = i0;
      for (; i + kSums <= i1; i += kSums)
        for (int j = 0; j < kSums; ++j) sum[j] += f(i + j);
      for (; i < i1; ++i) sum[0] += f(i);
      partial[c] = 0;
      for (int j = 0; j < kSums; ++j) partial[c] += sum[j];
    }
  });
  for (int64_t b = 0; b < B; ++b) {
    double total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += partial[b * chunks + c];
    loss[b] = T(total / double(n));
  }
}

// out[i] = f(factor grad[b], i) for the elements i of every image b.
template <class S, class F>
void map_per_image(const Threads& threads, int64_t B, int64_t n, const Accumulator<S>* grad,
                   double factor, S* out, F f) {
  const int64_t chunks = ceil_div(n, kChunk);
  parallel_for(threads, B * chunks, 4, [&](int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; ++c) {
      const int64_t b = c / chunks, i0 = b * n + c % chunks * kChunk;
      const int64_t i1 = min(i0 + kChunk, (b + 1) * n);
      const Accumulator<S> scale = Accumulator<S>(factor) * grad[b];
      for (int64_t i = i0; i < i1; ++i) narrow(f(scale, i), out[i]);
    }
  });
}

}  // namespace
}  // namespace osf::OSF_ISA
