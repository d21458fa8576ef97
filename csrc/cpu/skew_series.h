#pragma once
#include "gemm.h"

// Products of commuting symmetric and skew matrices, and Taylor series of exp(S) made of them.
namespace osf::OSF_ISA {
namespace {

// D x D matrices with rows of ld elements. A product that is symmetric or skew is computed in the
// lower triangle only (half_product) and completed by mirror or assemble.
template <class T>
class Squares {
 public:
  Squares(const Threads& threads, int64_t D)
      : D(D), ld(round_up(D, kLanes<T>)), size(D * ld), threads_(threads) {}

  const int64_t D, ld, size;

  // C = op(A) B, or C += op(A) B
  template <bool TA = false>
  void product(const T* A, const T* B, T* C, bool half = false, bool accumulate = false) const {
    const auto panels = [&](int64_t j0, int64_t j1) {
      for (int64_t j = j0; j < j1; ++j) panel<TA>(j * kTileColumns<T>, A, B, C, half, accumulate);
    };
    const int64_t count = ceil_div(ld, kTileColumns<T>);
    if (D < 128)
      panels(0, count);
    else
      parallel_for(threads_, count, 1, panels);
  }
  template <bool TA = false>
  void half_product(const T* A, const T* B, T* C, bool accumulate = false) const {
    product<TA>(A, B, C, true, accumulate);
  }

  // R = alpha C + beta W from the lower triangles of a symmetric C and a skew W
  void assemble(T alpha, const T* C, T beta, const T* W, T* R) const {
    for_each_pair([&](int64_t lower, int64_t upper) {
      const T c = alpha * C[lower], w = beta * W[lower];
      R[upper] = c - w;
      R[lower] = lower == upper ? c : c + w;
    });
  }
  // The upper triangle from the lower one of a symmetric (1) or skew (-1) matrix
  void mirror(T* C, T sign) const {
    for_each_pair([&](int64_t lower, int64_t upper) {
      C[upper] = sign * C[lower];
      if (lower == upper && sign < 0) C[lower] = 0;
    });
  }
  // out = M + sign M^T
  void add_transpose(const T* M, T sign, T* out) const {
    for_each_pair([&](int64_t lower, int64_t upper) {
      const T l = M[lower], u = M[upper];
      out[upper] = u + sign * l;
      out[lower] = l + sign * u;
    });
  }
  void scale(T* M, T factor) const {
    for (int64_t i = 0; i < size; ++i) M[i] *= factor;
  }
  // Largest column sum of |M|
  T one_norm(const T* M, T* scratch) const {
    for (int64_t j = 0; j < ld; ++j) scratch[j] = 0;
    for (int64_t i = 0; i < D; ++i)
      for (int64_t j = 0; j < ld; ++j) scratch[j] += M[i * ld + j] < 0 ? -M[i * ld + j] : M[i * ld + j];
    T norm = 0;
    for (int64_t j = 0; j < D; ++j) norm = scratch[j] > norm ? scratch[j] : norm;
    return norm;
  }

 private:
  template <bool TA>
  void panel(int64_t n, const T* A, const T* B, T* C, bool half, bool accumulate) const {
    const int64_t m = half ? n : 0;
    for (int64_t k = 0; k < D; k += kBlockK) {
      const T* a = TA ? A + k * ld : A + k;
      const int64_t K = min(kBlockK, D - k);
      if (ld - n >= kTileColumns<T>)
        panel_product<kTileVectors, TA>(m, D, K, a, ld, B + k * ld + n, ld, C + n, ld,
                                        accumulate || k > 0);
      else
        panel_product<1, TA>(m, D, K, a, ld, B + k * ld + n, ld, C + n, ld, accumulate || k > 0);
    }
  }
  // f(offset of (i, j), offset of (j, i)) for i >= j, in blocks that stay in the cache
  template <class F>
  void for_each_pair(F f) const {
    constexpr int64_t block = 16;
    for (int64_t i0 = 0; i0 < D; i0 += block)
      for (int64_t j0 = 0; j0 <= i0; j0 += block)
        for (int64_t i = i0; i < min(D, i0 + block); ++i)
          for (int64_t j = j0; j < min(i + 1, j0 + block); ++j) f(i * ld + j, j * ld + i);
  }

  const Threads& threads_;
};

// exp(S) = C + S K with C = sum X^k / (2k)!, K = sum X^k / (2k + 1)!, X = S^2, cut after X^m where
// m = levels * powers: with two levels X^(r + 1) .. X^(2 r) cost one product, X^r times a sum of
// X .. X^r. Up to ||S||_2 = theta the series and its derivative are exact to rounding: theta is
// (u (2 m + 1)!)^(1 / (2 m + 1)) with the unit roundoff u.
struct Scheme {
  int powers, levels, half_products;
  double theta32, theta64;
};
constexpr int kMaxPowers = 4;
constexpr Scheme kSchemes[] = {{2, 1, 3, 9.36e-2, 1.68e-3},
                               {2, 2, 5, 6.54e-1, 7.02e-2},
                               {3, 2, 6, 1.576, 3.37e-1},
                               {4, 2, 7, 2.701, 8.25e-1}};
constexpr double kInverseFactorials[] = {1.,
                                         1.,
                                         1. / 2,
                                         1. / 6,
                                         1. / 24,
                                         1. / 120,
                                         1. / 720,
                                         1. / 5040,
                                         1. / 40320,
                                         1. / 362880,
                                         1. / 3628800,
                                         1. / 39916800,
                                         1. / 479001600,
                                         1. / 6227020800,
                                         1. / 87178291200,
                                         1. / 1307674368000,
                                         1. / 20922789888000,
                                         1. / 355687428096000};

}  // namespace
}  // namespace osf::OSF_ISA
