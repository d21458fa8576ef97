#include "skew_exponential.h"

namespace osf::OSF_ISA {
namespace {

OSF_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
OSF_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// Adam's step X = size m / (sqrt(v / bias) + eps), element by element.
template <class T>
class Adam {
 public:
  Adam(const RotationOptions& o, int64_t D)
      : D_(D),
        pairs_(max(1, D * (D - 1))),
        lr_(o.lr),
        log_beta1_(__builtin_log(o.beta1)),
        log_beta2_(__builtin_log(o.beta2)),
        keep1_(T(o.beta1)),
        keep2_(T(o.beta2)),
        add1_(T(1 - o.beta1)),
        add2_(T(1 - o.beta2)),
        eps_(T(o.eps)) {}

  // A = -X from A, the step number and the moments, which it moves on; norm is ||A||_F.
  template <bool Scalar>
  void step(double number, double norm, int64_t ld, T* __restrict A, T* __restrict m,
            T* __restrict v) const {
    const T size = T(lr_ / __builtin_expm1(number * log_beta1_));  // negative, for -X
    const T unbias = T(-1 / __builtin_expm1(number * log_beta2_));
    if (Scalar) v[0] = keep2_ * v[0] + add2_ * T(norm * norm / pairs_);
    const T common = size / (square_root(v[0] * unbias) + eps_);
    for (int64_t i = 0; i < D_; ++i) {
      T *const a = A + i * ld, *const mi = m + i * D_, *const vi = v + (Scalar ? 0 : i * D_);
      for (int64_t j = 0; j < D_; ++j) {
        mi[j] = keep1_ * mi[j] + add1_ * a[j];
        if (Scalar) {
          a[j] = common * mi[j];
        } else {
          vi[j] = keep2_ * vi[j] + add2_ * (a[j] * a[j]);
          a[j] = size * mi[j] / (square_root(vi[j] * unbias) + eps_);
        }
      }
    }
  }

 private:
  const int64_t D_;
  const double pairs_, lr_, log_beta1_, log_beta2_;
  const T keep1_, keep2_, add1_, add2_, eps_;
};

// q = exp(-X) q, then one step of Newton and Schulz, q (3 I - q^T q) / 2, to the next orthogonal
// matrix; as q + q (I - q^T q) / 2 it rounds a small change only.
template <class T>
class Retraction {
 public:
  Retraction(const Squares<T>& squares) : m_(squares), memory_(3 * m_.size) {}

  void apply(const T* R, T* q) {
    T *const turned = memory_, *const sum = memory_ + m_.size, *const W = sum + m_.size;
    m_.read(q, W);
    m_.product(R, W, turned);
    m_.template half_product<true>(turned, turned, W);
    m_.mirror(W, 1);
    m_.scale(W, T(-0.5));
    for (int64_t i = 0; i < m_.D; ++i) W[i * (m_.ld + 1)] += T(0.5);
    __builtin_memcpy(sum, turned, m_.size * sizeof(T));
    m_.product(turned, W, sum, false, true);
    m_.write(sum, q);
  }

 private:
  const Squares<T>& m_;
  Buffer<T> memory_;
};

template <bool Scalar, class S, class T = Accumulator<S>>
void steps(const Threads& threads, int64_t b0, int64_t b1, int64_t D,
           const RotationOptions& options, const S* g, T* q, T* m, T* v, T* count) {
  const Adam<T> adam(options, D);
  Exponential<T> exponential(threads, D, false);
  const Squares<T>& squares = exponential.squares();
  Retraction<T> retraction(squares);
  for (int64_t b = b0; b < b1; ++b) {
    T* const A = exponential.set_generator(g + b * D * D);
    const double norm = squares.frobenius_norm(A);
    if (!(norm < __builtin_huge_val())) continue;
    count[b] += 1;
    adam.template step<Scalar>(count[b], norm, squares.ld, A, m + b * D * D,
                               v + (Scalar ? b : b * D * D));
    retraction.apply(exponential.exp(options.max_angle), q + b * D * D);
  }
}

}  // namespace

void rotation_step(const Threads& threads, DType dtype, int64_t B, int64_t D,
                   const RotationOptions& options, const void* g, void* q, void* m, void* v,
                   void* count) {
  with_dtype(dtype, [&]<class S>(S) {
    using T = Accumulator<S>;
    for_each_matrix(threads, B, D, [&](int64_t b0, int64_t b1) {
      const auto run = options.scalar ? steps<true, S> : steps<false, S>;
      run(threads, b0, b1, D, options, static_cast<const S*>(g), static_cast<T*>(q),
          static_cast<T*>(m), static_cast<T*>(v), static_cast<T*>(count));
    });
  });
}

}  // namespace osf::OSF_ISA
