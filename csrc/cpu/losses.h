#pragma once
#include "../loss_math.h"
#include "isa.h"

// Per-image means and their gradients: elementwise work in chunks of fixed size, so that the sums
// do not depend on the threads.
namespace osf::OSF_ISA {
namespace {

constexpr int64_t kChunk = 8192;
constexpr int64_t kLarge = 8 << 20;  // bytes that no cache keeps until they are read

template <class S>
OSF_INLINE Vector<Accumulator<S>> widen_vector(const S* p) {
  Accumulator<S> wide[kLanes<Accumulator<S>>];
  for (int l = 0; l < kLanes<Accumulator<S>>; ++l) wide[l] = widen(p[l]);
  return load(wide);
}
template <class S>
OSF_INLINE void narrow_vector(Vector<Accumulator<S>> v, S* p) {
  for (int l = 0; l < kLanes<Accumulator<S>>; ++l) narrow(v[l], p[l]);
}

// loss[b] = mean of f(in[i] ..) over i in [b n, (b + 1) n), summed per lane, then per chunk in
// double. f takes numbers or vectors.
template <class S, class F, class... In>
void mean_per_image(const Threads& threads, int64_t B, int64_t n, Accumulator<S>* loss, F f,
                    const In*... in) {
  using T = Accumulator<S>;
  constexpr int kSums = 4;
  const int64_t chunks = ceil_div(n, kChunk);
  Buffer<double> partial(B * chunks);
  parallel_for(threads, B * chunks, 4, [&](int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; ++c) {
      int64_t i = c / chunks * n + c % chunks * kChunk;
      const int64_t i1 = min(i + kChunk, (c / chunks + 1) * n);
      Vector<T> sum[kSums] = {};
      for (; i + kSums * kLanes<T> <= i1; i += kSums * kLanes<T>)
        for (int j = 0; j < kSums; ++j) sum[j] += f(widen_vector(in + i + j * kLanes<T>)...);
      T rest = 0;
      for (; i < i1; ++i) rest += f(widen(in[i])...);
      partial[c] = rest;
      for (int j = 0; j < kSums; ++j)
        for (int l = 0; l < kLanes<T>; ++l) partial[c] += sum[j][l];
    }
  });
  for (int64_t b = 0; b < B; ++b) {
    double total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += partial[b * chunks + c];
    loss[b] = T(total / double(n));
  }
}

// out[i] = f(factor grad[b], in[i] ..) for the elements i of every image b. f takes numbers or
// vectors.
template <class S, class F, class... In>
void map_per_image(const Threads& threads, int64_t B, int64_t n, const Accumulator<S>* grad,
                   double factor, S* out, F f, const In*... in) {
  using T = Accumulator<S>;
  const int64_t chunks = ceil_div(n, kChunk);
  const bool past_caches = sizeof(S) == sizeof(T) && n % kLanes<T> == 0 &&
                           B * n * int64_t(sizeof(S)) >= kLarge &&
                           reinterpret_cast<uintptr_t>(out) % sizeof(Vector<T>) == 0;
  parallel_for(threads, B * chunks, 4, [&](int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; ++c) {
      const int64_t b = c / chunks;
      int64_t i = b * n + c % chunks * kChunk;
      const int64_t i1 = min(i + kChunk, (b + 1) * n);
      const T scale = T(factor) * grad[b];
      if constexpr (sizeof(S) == sizeof(T))
        for (; past_caches && i < i1; i += kLanes<T>)
          stream(out + i, f(scale, widen_vector(in + i)...));
      for (; i + kLanes<T> <= i1; i += kLanes<T>)
        narrow_vector(f(scale, widen_vector(in + i)...), out + i);
      for (; i < i1; ++i) narrow(f(scale, widen(in[i])...), out[i]);
    }
    if (past_caches) end_stream();
  });
}

}  // namespace
}  // namespace osf::OSF_ISA
