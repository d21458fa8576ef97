#pragma once
#include <cmath>

#include "../patch_grid.h"

// The Taylor series of exp(S) for a skew S, on the host and the device: exp(S) = C + S K with
// C = sum X^k / (2k)!, K = sum X^k / (2k + 1)!, X = S^2, cut after X^m where m = levels * powers:
// with two levels X^(r + 1) .. X^(2 r) cost one product, X^r times a sum of X .. X^r.
namespace osf {

struct Scheme {
  int powers, levels, squarings;
};

constexpr int kMaxPowers = 4;

// 1 / n! for n <= 17
template <class T>
OSF_HD T inverse_factorial(int n) {
  constexpr T table[] = {T(1.),
                         T(1.),
                         T(1. / 2),
                         T(1. / 6),
                         T(1. / 24),
                         T(1. / 120),
                         T(1. / 720),
                         T(1. / 5040),
                         T(1. / 40320),
                         T(1. / 362880),
                         T(1. / 3628800),
                         T(1. / 39916800),
                         T(1. / 479001600),
                         T(1. / 6227020800),
                         T(1. / 87178291200),
                         T(1. / 1307674368000),
                         T(1. / 20922789888000),
                         T(1. / 355687428096000)};
  return table[n];
}

// Coefficient 1 / (2 first + n)! for first = 0 or a number of powers. With a constant n there is no
// table to look up at run time.
template <class T>
OSF_HD T coefficient(int first, int n) {
  switch (first) {
    case 0: return inverse_factorial<T>(n);
    case 2: return inverse_factorial<T>(n + 4);
    case 3: return inverse_factorial<T>(n + 6);
    default: return inverse_factorial<T>(n + 8);
  }
}

// Up to ||S||_2 = theta the series and its derivative are exact to rounding: theta is
// (u (2 m + 1)!)^(1 / (2 m + 1)) with the unit roundoff u.
template <class T>
OSF_HD T series_range(int powers, int levels) {
  constexpr bool wide = sizeof(T) == 8;
  if (levels == 1) return T(wide ? 1.68e-3 : 9.36e-2);
  if (powers == 2) return T(wide ? 7.02e-2 : 6.54e-1);
  if (powers == 3) return T(wide ? 3.37e-1 : 1.576);
  return T(wide ? 8.25e-1 : 2.701);
}

// Squarings that bring ||S||_2 <= bound into the range of a series
template <class T>
OSF_HD int squarings(T bound, int powers, int levels) {
  int s = 0;
  for (T range = series_range<T>(powers, levels); range < bound; range *= 2) ++s;
  return s;
}

// S is normal: ||S||_2 is at most every ||S^k||_1^(1/k), which for large D are far below ||S||_1.
// Not finite: 0, the result will not be finite either.
template <class T>
OSF_HD T norm_bound(T first, T second, T fourth) {
  const T two = std::sqrt(second), four = std::sqrt(std::sqrt(fourth));
  T bound = first;
  bound = two < bound ? two : bound;
  bound = four < bound ? four : bound;
  return bound - bound == T(0) ? bound : T(0);
}

// The cheapest series and scaling with at most `max_powers` powers: products of a half matrix cost
// 1, squarings 2.
template <class T>
OSF_HD Scheme choose_scheme(T bound, int max_powers) {
  Scheme best = {2, 1, squarings(bound, 2, 1)};
  int cost = 3 + 2 * best.squarings;
  for (int powers = 2; powers <= max_powers; ++powers) {
    const int s = squarings(bound, powers, 2), other = 3 + powers + 2 * s;
    if (other < cost) best = {powers, 2, s};
    cost = other < cost ? other : cost;
  }
  return best;
}

}  // namespace osf
