#pragma once
#include <cstdint>
#include <new>
#include <utility>

#include "../kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Compiled once per instruction set, with OSF_ISA (namespace) and OSF_VECTOR_BYTES set. Everything
// has internal linkage and no function of std:: is used: an inline function compiled for AVX-512
// must not be the copy that the linker keeps for the other files.
namespace osf::OSF_ISA {

PatchRotate patch_rotate;
PatchOuter patch_outer;
SkewExp skew_exp;
DSkewExp d_skew_exp;
Cayley cayley;
DCayley d_cayley;
RotationStep rotation_step;
LatentMse latent_mse;
DLatentMse d_latent_mse;
PixelL1 pixel_l1;
DPixelL1 d_pixel_l1;
extern const Kernels kernels;

namespace {

#define OSF_INLINE inline __attribute__((always_inline))

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(OSF_VECTOR_BYTES)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = OSF_VECTOR_BYTES / sizeof(T);
// AVX-512 and NEON have 32 of them, SSE and AVX2 have 16.
#if OSF_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

template <class T>
OSF_INLINE Vector<T> load(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
OSF_INLINE void store(T* p, Vector<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Past the caches, without reading the line first; p is a multiple of the vector's size.
template <class T>
OSF_INLINE void stream(T* p, Vector<T> v) {
#if OSF_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif OSF_VECTOR_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__x86_64__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
  store(p, v);
#endif
}
OSF_INLINE void end_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// 0, 1, 2, ..
template <class T>
OSF_INLINE Vector<T> lane_numbers() {
  return []<int... l>(std::integer_sequence<int, l...>) {
    return Vector<T>{T(l)...};
  }(std::make_integer_sequence<int, kLanes<T>>{});
}

// Lanes of a and of b, whose numbers go on where those of a end
template <int... lane, class V>
OSF_INLINE V pick(V a, V b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, lane...);
#else
  typedef decltype(a < a) Mask;
  return __builtin_shuffle(a, b, Mask{lane...});
#endif
}

// Exchanges, for every lane l with bit h set, lane l of a with lane l - h of b.
template <int h, class V>
OSF_INLINE void exchange(V& a, V& b) {
  constexpr int n = sizeof(V) / sizeof(a[0]);
  [&]<int... l>(std::integer_sequence<int, l...>) {
    const V c = pick<(l & h ? n + l - h : l)...>(a, b);
    b = pick<(l & h ? n + l : l + h)...>(a, b);
    a = c;
  }(std::make_integer_sequence<int, n>{});
}

// Pairs in a and then b: their first halves in a, their second halves in b, in an order that costs
// least, within the 16 bytes that a shuffle does not leave; zip is the inverse.
template <class V>
OSF_INLINE void unzip(V& a, V& b) {
  constexpr int n = sizeof(V) / sizeof(a[0]), w = 16 / sizeof(a[0]);
  [&]<int... l>(std::integer_sequence<int, l...>) {
    const V c = pick<(l / w * w + l * 2 % w + (l % w < w / 2 ? 0 : n))...>(a, b);
    b = pick<(l / w * w + l * 2 % w + 1 + (l % w < w / 2 ? 0 : n))...>(a, b);
    a = c;
  }(std::make_integer_sequence<int, n>{});
}
template <class V>
OSF_INLINE void zip(V& a, V& b) {
  constexpr int n = sizeof(V) / sizeof(a[0]), w = 16 / sizeof(a[0]);
  [&]<int... l>(std::integer_sequence<int, l...>) {
    const V c = pick<(l / w * w + l % w / 2 + l % 2 * n)...>(a, b);
    b = pick<(l / w * w + (w + l % w) / 2 + l % 2 * n)...>(a, b);
    a = c;
  }(std::make_integer_sequence<int, n>{});
}

// Transposes n x n elements, of one or more lanes each, whose rows are vectors: exchanges the
// off-diagonal blocks of h x h, then those of h / 2, ...
template <int element = 1, int n, class V, int h = n / 2>
OSF_INLINE void transpose(V (&rows)[n]) {
  if constexpr (h > 0) {
#pragma GCC unroll 16
    for (int r = 0; r < n; ++r)
      if (!(r & h)) exchange<h * element>(rows[r], rows[r + h]);
    transpose<element, n, V, h / 2>(rows);
  }
}

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

OSF_INLINE float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
OSF_INLINE uint32_t as_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

// Bits, one or two elements of 16 bits each, are moved as they are.
OSF_INLINE uint16_t widen(uint16_t x) { return x; }
OSF_INLINE uint32_t widen(uint32_t x) { return x; }
OSF_INLINE float widen(float x) { return x; }
OSF_INLINE double widen(double x) { return x; }
OSF_INLINE float widen(BFloat16 x) { return as_float(uint32_t(x.bits) << 16); }
OSF_INLINE float widen(Half x) {
  const uint32_t u = x.bits & 0x7fffu;
  const float subnormal = float(int32_t(u)) * 0x1p-24f;
  const float normal = as_float((u << 13) + (u >= 0x7c00u ? 224u << 23 : 112u << 23));
  return as_float(as_bits(u < 0x400u ? subnormal : normal) | uint32_t(x.bits & 0x8000u) << 16);
}

// Rounds to nearest, ties to even.
OSF_INLINE void narrow(uint32_t x, uint32_t& out) { out = x; }
OSF_INLINE void narrow(float x, float& out) { out = x; }
OSF_INLINE void narrow(double x, double& out) { out = x; }
OSF_INLINE void narrow(float x, BFloat16& out) {
  const uint32_t u = as_bits(x);
  const uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  out.bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
OSF_INLINE void narrow(float x, Half& out) {
  const uint32_t bits = as_bits(x), u = bits & 0x7fffffffu;
  const uint32_t subnormal = as_bits(as_float(u) + 0.5f) - as_bits(0.5f);
  const uint32_t normal = (u + 0xc8000fffu + (u >> 13 & 1u)) >> 13;
  const uint32_t finite = u < 0x38800000u ? subnormal : normal;
  const uint32_t special = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out.bits = uint16_t((u >= 0x47800000u ? special : finite) | (bits >> 16 & 0x8000u));
}

template <class S>
using Accumulator = decltype(widen(S{}));

// Uninitialised scratch memory, aligned to a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() { return data_; }

 private:
  T* data_;
};

template <class F>
void parallel_for(const Threads& threads, int64_t n, int64_t grain, F f) {
  threads.run(n, grain, [](int64_t i0, int64_t i1, void* g) { (*static_cast<F*>(g))(i0, i1); }, &f);
}

// Calls f with a value of the storage type.
template <class F>
void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::f16: return f(Half{});
    case DType::bf16: return f(BFloat16{});
  }
}

}  // namespace
}  // namespace osf::OSF_ISA
