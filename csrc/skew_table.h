#pragma once

// The numbers of the series of exp(S) for a skew S, for the CPU, for CUDA and, through
// tools/series_table.py, for Triton: exp(S) = C + S K with C = sum X^k / (2k)!,
// K = sum X^k / (2k + 1)!, X = S^2, cut after X^m where m = levels * powers: with two levels
// X^(r + 1) .. X^(2 r) cost one product, X^r times a sum of X .. X^r.
namespace osf {

constexpr int kMaxPowers = 4;

// Up to ||S||_2 = theta the series and its derivative are exact to rounding: theta is
// (u (2 m + 1)!)^(1 / (2 m + 1)) with the unit roundoff u.
struct Scheme {
  int powers, levels, half_products;
  double theta32, theta64;
};
constexpr Scheme kSchemes[] = {{2, 1, 3, 9.36e-2, 1.68e-3},
                               {3, 1, 4, 3.14e-1, 1.78e-2},
                               {2, 2, 5, 6.54e-1, 7.02e-2},
                               {3, 2, 6, 1.576, 3.37e-1},
                               {4, 2, 7, 2.701, 8.25e-1}};

// 1 / n! for n <= 17, a list that makes an array of any type
#define OSF_INVERSE_FACTORIALS(T) \
  {T(1.),                         \
   T(1.),                         \
   T(1. / 2),                     \
   T(1. / 6),                     \
   T(1. / 24),                    \
   T(1. / 120),                   \
   T(1. / 720),                   \
   T(1. / 5040),                  \
   T(1. / 40320),                 \
   T(1. / 362880),                \
   T(1. / 3628800),               \
   T(1. / 39916800),              \
   T(1. / 479001600),             \
   T(1. / 6227020800),            \
   T(1. / 87178291200),           \
   T(1. / 1307674368000),         \
   T(1. / 20922789888000),        \
   T(1. / 355687428096000)}

}  // namespace osf
