#pragma once
#include "../skew_table.h"
#include "gemm.h"

// Products of commuting symmetric and skew matrices, and Taylor series of exp(S) made of them.
namespace osf::OSF_ISA {
namespace {

// A square of one vector per row, in registers.
template <class T>
struct Tile {
  static constexpr int kSize = kLanes<T>;
  Vector<T> rows[kSize];

  OSF_INLINE void read(const T* p, int64_t ld) {
    for (int r = 0; r < kSize; ++r) rows[r] = load(p + r * ld);
  }
  OSF_INLINE void write(T* p, int64_t ld) const {
    for (int r = 0; r < kSize; ++r) store(p + r * ld, rows[r]);
  }
  // Replaces what lies above the diagonal.
  OSF_INLINE void take_upper(const Tile& other) {
#pragma GCC unroll 16
    for (int r = 0; r < kSize; ++r) rows[r] = lane_numbers<T>() > T(r) ? other.rows[r] : rows[r];
  }
  OSF_INLINE void transpose() { OSF_ISA::transpose(rows); }
};

// D x D matrices padded to whole vectors in both directions; what lies beyond D is never read into
// what lies within. A product that is symmetric or skew is computed in the
// lower triangle only (half_product) and completed by mirror or assemble.
template <class T>
class Squares {
 public:
  Squares(const Threads& threads, int64_t D)
      : D(D),
        columns(round_up(D, kLanes<T>)),
        // rows a power of two apart would fall into the same few cache sets
        ld(columns * sizeof(T) % 1024 ? columns : columns + kLanes<T>),
        size(columns * ld),
        threads_(threads) {}

  const int64_t D, columns, ld, size;

  // Between a dense matrix [D, D] and one of ours
  template <class In>
  void read(const In* in, T* M) const {
    for (int64_t i = 0; i < D; ++i)
      for (int64_t j = 0; j < D; ++j) M[i * ld + j] = widen(in[i * D + j]);
  }
  template <class Out>
  void write(const T* M, Out* out) const {
    for (int64_t i = 0; i < D; ++i)
      for (int64_t j = 0; j < D; ++j) narrow(M[i * ld + j], out[i * D + j]);
  }

  // C = op(A) B, or C += op(A) B
  template <bool TA = false>
  void product(const T* A, const T* B, T* C, bool half = false, bool accumulate = false) const {
    const auto panels = [&](int64_t j0, int64_t j1) {
      for (int64_t j = j0; j < j1; ++j) panel<TA>(j * kTileColumns<T>, A, B, C, half, accumulate);
    };
    const int64_t count = ceil_div(columns, kTileColumns<T>);
    if (D < kParallelDim)
      panels(0, count);
    else
      parallel_for(threads_, count, 1, panels);
  }
  template <bool TA = false>
  void half_product(const T* A, const T* B, T* C, bool accumulate = false) const {
    product<TA>(A, B, C, true, accumulate);
  }

  // The upper triangle from the lower one of a symmetric (1) or skew (-1) matrix
  void mirror(T* C, T sign) const {
    if (sign < 0) clear_diagonal(C);
    for_each_tile(C, [&](int64_t lower, int64_t, Tile<T>& lo, Tile<T>& up) {
      lo.read(C + lower, ld);
      for (int r = 0; r < Tile<T>::kSize; ++r) up.rows[r] = sign * lo.rows[r];
    });
  }
  // R = alpha C + beta W from the lower triangles of a symmetric C and a skew W
  void assemble(T alpha, const T* C, T beta, T* W, T* R) const {
    clear_diagonal(W);
    for_each_tile(R, [&](int64_t lower, int64_t, Tile<T>& lo, Tile<T>& up) {
      for (int r = 0; r < Tile<T>::kSize; ++r) {
        const Vector<T> c = alpha * load(C + lower + r * ld), w = beta * load(W + lower + r * ld);
        lo.rows[r] = c + w;
        up.rows[r] = c - w;
      }
    });
  }
  // out = M + sign M^T
  void add_transpose(const T* M, T sign, T* out) const {
    for_each_tile(out, [&](int64_t lower, int64_t upper, Tile<T>& lo, Tile<T>& up) {
      lo.read(M + lower, ld);
      up.read(M + upper, ld);
      up.transpose();
      for (int r = 0; r < Tile<T>::kSize; ++r) {
        const Vector<T> l = lo.rows[r], u = up.rows[r];
        lo.rows[r] = l + sign * u;
        up.rows[r] = u + sign * l;
      }
    });
  }
  void scale(T* M, T factor) const {
    for (int64_t i = 0; i < D * ld; ++i) M[i] *= factor;
  }
  // Square root of the sum of squares
  double frobenius_norm(const T* M) const {
    Vector<T> sum = {};
    for (int64_t i = 0; i < D; ++i) {
      Vector<T> row = {};  // sums of sums round less
      for (int64_t j = 0; j < D; j += kLanes<T>) {
        const Vector<T> m = lane_numbers<T>() < T(D - j) ? load(M + i * ld + j) : Vector<T>{};
        row += m * m;
      }
      sum += row;
    }
    double total = 0;
    for (int l = 0; l < kLanes<T>; ++l) total += sum[l];
    return __builtin_sqrt(total);
  }

 private:
  template <bool TA>
  void panel(int64_t n, const T* A, const T* B, T* C, bool half, bool accumulate) const {
    const int64_t m = half ? n : 0;
    for (int64_t k = 0; k < D; k += kBlockK) {
      const T* a = TA ? A + k * ld : A + k;
      const int64_t K = min(kBlockK, D - k);
      if (columns - n >= kTileColumns<T>)
        panel_product<kTileVectors, TA>(m, D, K, a, ld, B + k * ld + n, ld, C + n, ld,
                                        accumulate || k > 0);
      else
        panel_product<1, TA>(m, D, K, a, ld, B + k * ld + n, ld, C + n, ld, accumulate || k > 0);
    }
  }
  void clear_diagonal(T* M) const {
    for (int64_t i = 0; i < D; ++i) M[i * (ld + 1)] = 0;
  }
  // f(offset below the diagonal, offset above it, lo, up) sets two tiles of which lo and the
  // transpose of up are written; on the diagonal, the lower triangle of lo and the upper of up^T.
  template <class F>
  void for_each_tile(T* out, F f) const {
    for (int64_t i = 0; i < D; i += Tile<T>::kSize)
      for (int64_t j = 0; j <= i; j += Tile<T>::kSize) {
        Tile<T> lo, up;
        f(i * ld + j, j * ld + i, lo, up);
        up.transpose();
        if (i == j)
          lo.take_upper(up);
        else
          up.write(out + j * ld + i, ld);
        lo.write(out + i * ld + j, ld);
      }
  }

  static constexpr int64_t kParallelDim = 128;
  const Threads& threads_;
};

constexpr double kInverseFactorials[] = OSF_INVERSE_FACTORIALS(double);

}  // namespace
}  // namespace osf::OSF_ISA
