#pragma once
#include "skew_series.h"

namespace osf::OSF_ISA {
namespace {

enum Series { kEven, kOdd };

// The exponential of a skew S, scaled by 2^-s into the range of a Taylor series.
template <class T>
class Exponential {
 public:
  Exponential(const Threads& threads, int64_t D, bool adjoint)
      : m_(threads, D), memory_((adjoint ? kAdjointMatrices : kMatrices) * m_.size) {
    T** const all[] = {&S_, &X_[1],  &X_[2],  &X_[3],  &X_[4],  &Q_, &K_,  &C_,  &W_,
                       &R_, &dX_[1], &dX_[2], &dX_[3], &dX_[4], &E_, &dQ_, &dK_, &q_};
    for (int i = 0; i < (adjoint ? kAdjointMatrices : kMatrices); ++i)
      *all[i] = memory_ + i * m_.size;
  }

  const Squares<T>& squares() const { return m_; }

  // Makes S = a - a^T and returns it; the caller may change it before exp(), as long as it is skew.
  template <class In>
  T* set_generator(const In* a) {
    m_.read(a, W_);
    m_.add_transpose(W_, -1, S_);
    return S_;
  }

  // exp(S), after S is made shorter if its rotation angles exceed max_angle. Overwrites S.
  const T* exp(double max_angle = __builtin_huge_val()) {
    expand(max_angle);
    exponential(1, R_);
    for (int k = 0; k < squarings_; ++k) {
      square(k, R_, Q_);
      swap(R_, Q_);
    }
    return R_;
  }

  // With W = q^T grad and the average phi(Y) of exp(u S) Y exp(-u S) over u in [0, 1], the
  // gradient in a is phi(W - W^T): everything stays skew.
  template <class In>
  void adjoint(const In* grad, const In* a, const In* q, In* out) {
    m_.read(q, q_);
    m_.read(grad, C_);
    m_.template product<true>(q_, C_, W_);
    m_.add_transpose(W_, -1, E_);
    set_generator(a);
    expand();
    series(kOdd, K_);
    m_.mirror(K_, 1);
    if (squarings_ > 0) undo_squarings();
    average();
    m_.mirror(W_, -1);
    m_.write(W_, out);
  }

 private:
  static constexpr int kMatrices = 10, kAdjointMatrices = 18;

  static void swap(T*& a, T*& b) {
    T* c = a;
    a = b;
    b = c;
  }

  // The powers of S, all scaled into the range of a series.
  void expand(double max_angle = __builtin_huge_val()) {
    // powers of S / 2^e, whose norm is about 1, neither overflow nor underflow
    int e = 0;
    __builtin_frexp(m_.frobenius_norm(S_), &e);
    m_.scale(S_, T(__builtin_ldexp(1., -e)));
    m_.half_product(S_, S_, X_[1]);
    m_.mirror(X_[1], 1);
    m_.half_product(X_[1], X_[1], X_[2]);
    m_.mirror(X_[2], 1);
    const double angle = angle_bound(e);
    const double shrink = angle > max_angle ? max_angle / angle : 1;
    choose_scheme(angle * shrink);
    const double factor = __builtin_ldexp(shrink, e - squarings_);
    m_.scale(S_, T(factor));
    m_.scale(X_[1], T(factor * factor));
    m_.scale(X_[2], T(factor * factor * factor * factor));
    for (int r = 3; r <= scheme_->powers; ++r) {
      m_.half_product(X_[r / 2], X_[r - r / 2], X_[r]);
      m_.mirror(X_[r], 1);
    }
  }

  // The 8-norm of the rotation angles of S, from S^4 / 2^(4 e): at least the largest of them, which
  // is ||S||_2, and at most (D / 2)^(1/8) times that. S^4 has every angle^4 twice.
  double angle_bound(int e) const {
    const double fourth = m_.frobenius_norm(X_[2]) * __builtin_sqrt(0.5);
    return __builtin_ldexp(__builtin_sqrt(__builtin_sqrt(fourth)), e);
  }

  // The cheapest series and scaling for ||S||_2 <= bound. Not finite: the result will not be
  // either.
  void choose_scheme(double bound) {
    int best = 1 << 30;
    for (const Scheme& scheme : kSchemes) {
      double theta = sizeof(T) == 8 ? scheme.theta64 : scheme.theta32;
      int s = 0;
      for (; theta < bound && bound < __builtin_huge_val(); theta *= 2) ++s;
      if (scheme.half_products + 2 * s >= best) continue;
      best = scheme.half_products + 2 * s;
      scheme_ = &scheme;
      squarings_ = s;
    }
  }

  // out = or += [first = 0] I + sum over i in 1 .. powers of coefficient(first + i) M_i
  template <int powers>
  void combine(Series parity, int first, bool identity, T* const* M, T* out,
               bool accumulate) const {
    const double* c = kInverseFactorials + 2 * first + parity;
    for (int64_t i = 0; i < m_.D * m_.ld; ++i) {
      T sum = T(c[2]) * M[1][i];
      for (int r = 2; r <= powers; ++r) sum += T(c[2 * r]) * M[r][i];
      out[i] = accumulate ? out[i] + sum : sum;
    }
    for (int64_t i = 0; identity && i < m_.D; ++i) out[i * (m_.ld + 1)] += 1;
  }
  void combine(Series parity, int first, bool identity, T* const* M, T* out,
               bool accumulate) const {
    switch (scheme_->powers) {
      case 2: return combine<2>(parity, first, identity, M, out, accumulate);
      case 3: return combine<3>(parity, first, identity, M, out, accumulate);
      case 4: return combine<4>(parity, first, identity, M, out, accumulate);
    }
  }

  // The lower triangle of C or K
  void series(Series parity, T* out) const {
    const int r = scheme_->powers;
    if (scheme_->levels == 2) {
      combine(parity, r, false, X_, Q_, false);
      m_.half_product(X_[r], Q_, out);
    }
    combine(parity, 0, true, X_, out, scheme_->levels == 2);
  }
  // The lower triangle of its derivative
  void d_series(Series parity, T* out) const {
    const int r = scheme_->powers;
    if (scheme_->levels == 2) {
      combine(parity, r, false, X_, Q_, false);
      combine(parity, r, false, dX_, dQ_, false);
      m_.half_product(dX_[r], Q_, out);
      m_.half_product(X_[r], dQ_, out, true);
    }
    combine(parity, 0, false, dX_, out, scheme_->levels == 2);
  }

  // R = exp(sign S) of the scaled S
  void exponential(T sign, T* R) {
    series(kOdd, K_);
    m_.mirror(K_, 1);
    series(kEven, C_);
    m_.half_product(S_, K_, W_);
    m_.assemble(1, C_, sign, W_, R);
  }

  // R = M M for the k-th time. A squaring doubles the distance from an orthogonal matrix, which a
  // Newton-Schulz step now and then, R = R (3 I - R^T R) / 2, brings back to rounding.
  void square(int k, const T* M, T* R) {
    m_.product(M, M, R);
    if (k % 4 != 3) return;
    m_.template half_product<true>(R, R, W_);
    m_.mirror(W_, 1);
    m_.scale(W_, T(-0.5));
    for (int64_t i = 0; i < m_.D; ++i) W_[i * (m_.ld + 1)] += T(1.5);
    m_.product(R, W_, C_);
    __builtin_memcpy(R, C_, m_.size * sizeof(T));
  }

  // E = phi(E) at S, expressed by phi at the scaled S: phi(S) = (1 + exp(S/2) . exp(-S/2)) / 2
  // after phi(S/2). q becomes exp of the scaled S.
  void undo_squarings() {
    Buffer<T> chain(squarings_ * m_.size);  // exp(-S) of the scaled S, squared again and again
    exponential(-1, chain);
    for (int k = 0; k + 1 < squarings_; ++k)
      square(k, chain + k * m_.size, chain + (k + 1) * m_.size);
    for (int k = squarings_ - 1; k >= 0; --k) {
      const T* inverse = chain + k * m_.size;
      m_.product(E_, inverse, R_);
      m_.template half_product<true>(inverse, R_, W_);
      m_.mirror(W_, -1);
      for (int64_t i = 0; i < m_.D * m_.ld; ++i) E_[i] = T(0.5) * (E_[i] + W_[i]);
    }
    for (int64_t i = 0; i < m_.D; ++i)
      for (int64_t j = 0; j < m_.D; ++j) q_[i * m_.ld + j] = chain[j * m_.ld + i];
  }

  // W = phi(E) = L exp(-S) at the scaled S, with the derivative L of exp at S in the direction E;
  // W is skew, so W = -W^T = exp(S) (-L^T), and L is d_even + d_odd, symmetric plus skew.
  void average() {
    m_.product(S_, E_, W_);
    m_.add_transpose(W_, 1, dX_[1]);
    m_.product(X_[1], dX_[1], W_);
    m_.add_transpose(W_, 1, dX_[2]);
    for (int r = 3; r <= scheme_->powers; ++r) {
      m_.half_product(dX_[r / 2], X_[r - r / 2], dX_[r]);
      m_.half_product(X_[r / 2], dX_[r - r / 2], dX_[r], true);
      m_.mirror(dX_[r], 1);
    }
    d_series(kEven, C_);
    d_series(kOdd, dK_);
    m_.mirror(dK_, 1);
    m_.half_product(E_, K_, W_);
    m_.half_product(S_, dK_, W_, true);
    m_.assemble(-1, C_, 1, W_, R_);
    m_.half_product(q_, R_, W_);
  }

  const Squares<T> m_;
  Buffer<T> memory_;
  T *S_, *X_[kMaxPowers + 1], *Q_, *K_, *C_, *W_, *R_;
  T *E_, *dX_[kMaxPowers + 1], *dQ_, *dK_, *q_;
  const Scheme* scheme_;
  int squarings_;
};

// f(b) for every matrix b: with fewer matrices than threads, the products share the threads.
template <class F>
void for_each_matrix(const Threads& threads, int64_t B, int64_t D, F f) {
  if (B < threads.count && D >= 128)
    f(0, B);
  else
    parallel_for(threads, B, ceil_div(1 << 16, D * D * D + 1), f);
}

}  // namespace
}  // namespace osf::OSF_ISA
