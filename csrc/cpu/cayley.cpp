#include "skew_exponential.h"

namespace osf::OSF_ISA {
namespace {

// N = (s I + N)^-1 - s I in place; s = 1 where that is near the identity, so that only what differs
// from it is rounded, else s = 0. Gauss-Jordan elimination with partial pivoting, by panels of
// columns. Eliminating a panel K leaves in it the columns K of G - s I, where G multiplies all
// other columns from the left; G - I is zero elsewhere, so they take one product: with s = 1, X +=
// (G - I)[:, K] X[K]; with s = 0 the rows K of X are set to zero before that.
template <class T>
class Inverse {
 public:
  Inverse(const Threads& threads, const Squares<T>& squares)
      : threads_(threads), m_(squares), rows_(2 * squares.D) {}

  void apply(T* N, T shift) {
    shift_ = shift;
    swaps_ = 0;
    const int64_t panels = ceil_div(m_.D, kWidth);
    for (int64_t k = 0; k < panels; ++k) {
      if (whole(k))
        eliminate<kTileVectors>(N, k);
      else
        eliminate<1>(N, k);
      const auto update_some = [&](int64_t j0, int64_t j1) {
        for (int64_t j = j0; j < j1; ++j)
          if (j != k) whole(j) ? update<kTileVectors>(N, k, j) : update<1>(N, k, j);
      };
      if (m_.D < kParallelDim)
        update_some(0, panels);
      else
        parallel_for(threads_, panels, 1, update_some);
    }
    for (int64_t i = 0; swaps_ > 0 && i < m_.D; ++i) {  // the inverse of P A is A^-1 P^T
      T* const row = N + i * m_.ld;
      row[i] += shift_;
      for (int64_t s = swaps_; s-- > 0;) swap(row[rows_[2 * s]], row[rows_[2 * s + 1]]);
      row[i] -= shift_;
    }
  }

 private:
  static constexpr int64_t kWidth = kTileColumns<T>, kParallelDim = 128;

  // Whether a panel has all its vectors
  bool whole(int64_t panel) const { return m_.columns - panel * kWidth >= kWidth; }

  static void swap(T& a, T& b) {
    const T c = a;
    a = b;
    b = c;
  }

  static T magnitude(T a) { return a < 0 ? -a : a; }

  // Brings the row among [k, D) with the largest element of column k to row k.
  void pivot(T* N, int64_t k) {
    int64_t r = k;
    T largest = magnitude(shift_ + N[k * m_.ld + k]);
    for (int64_t i = k + 1; i < m_.D; ++i) {
      const T size = magnitude(N[i * m_.ld + k]);
      r = size > largest ? i : r;
      largest = size > largest ? size : largest;
    }
    if (r == k) return;
    rows_[2 * swaps_] = k;
    rows_[2 * swaps_++ + 1] = r;
    T *const a = N + k * m_.ld, *const b = N + r * m_.ld;
    a[k] += shift_;
    b[r] += shift_;
    for (int64_t j = 0; j < m_.D; ++j) swap(a[j], b[j]);
    a[k] -= shift_;
    b[r] -= shift_;
  }

  // The steps of the columns of a panel of NR vectors, for this panel alone
  template <int NR>
  void eliminate(T* N, int64_t panel) {
    const int64_t first = panel * kWidth, last = min(m_.D, first + kWidth);
    for (int64_t k = first; k < last; ++k) {
      pivot(N, k);
      const auto at = [&](int j) { return lane_numbers<T>() == T(k - first - j * kLanes<T>); };
      T* const row = N + k * m_.ld + first;
      const T excess = row[k - first], factor = T(1) / (shift_ + excess);
      Vector<T> scaled[NR];
      for (int j = 0; j < NR; ++j) {
        const Vector<T> old = load(row + j * kLanes<T>);
        scaled[j] = factor * (at(j) ? Vector<T>{} + 1 : old);
      }
      for (int64_t i = 0; i < m_.D; ++i) {
        T* const other = N + i * m_.ld + first;
        const T a = other[k - first];
        for (int j = 0; j < NR; ++j) {
          const Vector<T> old = load(other + j * kLanes<T>);
          store(other + j * kLanes<T>, (at(j) ? Vector<T>{} : old) - a * scaled[j]);
        }
      }
      const Vector<T> corner = Vector<T>{} + (shift_ > 0 ? -excess * factor : factor);
      for (int j = 0; j < NR; ++j) store(row + j * kLanes<T>, at(j) ? corner : scaled[j]);
    }
  }

  // The same steps for panel j of NR vectors
  template <int NR>
  void update(T* N, int64_t panel, int64_t j) const {
    constexpr int64_t width = NR * kLanes<T>;
    const int64_t first = panel * kWidth, K = min(kWidth, m_.D - first);
    T rows[kWidth * width];
    T* const X = N + j * kWidth;
    for (int64_t k = 0; k < K; ++k) {
      __builtin_memcpy(rows + k * width, X + (first + k) * m_.ld, width * sizeof(T));
      if (shift_ == 0) __builtin_memset(X + (first + k) * m_.ld, 0, width * sizeof(T));
    }
    panel_product<NR, false>(0, m_.D, K, N + first, m_.ld, rows, width, X, m_.ld, true);
  }

  const Threads& threads_;
  const Squares<T>& m_;
  Buffer<int64_t> rows_;  // exchanged, in pairs
  int64_t swaps_;
  T shift_;
};

template <class S, class T = Accumulator<S>>
void transform(const Threads& threads, int64_t b0, int64_t b1, int64_t D, const S* a, S* out,
               T* resolvent) {
  const Squares<T> m(threads, D);
  Inverse<T> inverse(threads, m);
  Buffer<T> memory(2 * m.size);
  T *const N = memory, *const M = memory + m.size;
  const auto write = [&](T scale, T identity, auto* to) {
    for (int64_t i = 0; i < D * m.ld; ++i) M[i] = scale * N[i];
    for (int64_t i = 0; i < D; ++i) M[i * (m.ld + 1)] += identity;
    m.write(M, to);
  };
  for (int64_t b = b0; b < b1; ++b) {
    m.read(a + b * D * D, M);
    m.add_transpose(M, -1, N);
    m.scale(N, T(-0.5));
    const double norm = m.frobenius_norm(N);
    const T shift = norm * norm < double(D) ? 1 : 0;
    for (int64_t i = 0; i < D; ++i) N[i * (m.ld + 1)] += 1 - shift;
    inverse.apply(N, shift);
    write(1, shift, resolvent + b * D * D);
    write(2, 2 * shift - 1, out + b * D * D);
  }
}

}  // namespace

void cayley(const Threads& threads, DType dtype, int64_t B, int64_t D, const void* a, void* out,
            void* resolvent) {
  with_dtype(dtype, [&]<class S>(S) {
    for_each_matrix(threads, B, D, [&](int64_t b0, int64_t b1) {
      transform(threads, b0, b1, D, static_cast<const S*>(a), static_cast<S*>(out),
                static_cast<Accumulator<S>*>(resolvent));
    });
  });
}

void d_cayley(const Threads& threads, DType dtype, int64_t B, int64_t D, const void* grad,
              const void* resolvent, void* out) {
  with_dtype(dtype, [&]<class S>(S) {
    using T = Accumulator<S>;
    for_each_matrix(threads, B, D, [&](int64_t b0, int64_t b1) {
      const Squares<T> m(threads, D);
      Buffer<T> memory(3 * m.size);
      T *const M = memory, *const G = M + m.size, *const W = G + m.size;
      for (int64_t b = b0; b < b1; ++b) {
        m.read(static_cast<const T*>(resolvent) + b * D * D, M);
        m.read(static_cast<const S*>(grad) + b * D * D, G);
        m.template product<true>(G, M, W);
        m.product(M, W, G);  // (M^T grad M^T)^T
        m.add_transpose(G, -1, W);
        m.scale(W, -1);
        m.write(W, static_cast<S*>(out) + b * D * D);
      }
    });
  });
}

}  // namespace osf::OSF_ISA
