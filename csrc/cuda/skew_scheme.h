#pragma once
#include <cmath>

#include "../patch_grid.h"
#include "../skew_table.h"

// Which series of exp(S) a matrix takes, on the host and the device.
namespace osf {

struct ChosenScheme {
  int powers, levels, squarings;
};

template <class T>
OSF_HD T inverse_factorial(int n) {
  constexpr T table[] = OSF_INVERSE_FACTORIALS(T);
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

// theta of a scheme with two levels, or of the first with one
template <class T>
OSF_HD T series_range(int powers, int levels) {
  constexpr bool wide = sizeof(T) == 8;
  constexpr T one = T(wide ? kSchemes[0].theta64 : kSchemes[0].theta32);
  constexpr T two = T(wide ? kSchemes[2].theta64 : kSchemes[2].theta32);
  constexpr T three = T(wide ? kSchemes[3].theta64 : kSchemes[3].theta32);
  constexpr T four = T(wide ? kSchemes[4].theta64 : kSchemes[4].theta32);
  return levels == 1 ? one : powers == 2 ? two : powers == 3 ? three : four;
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
OSF_HD ChosenScheme choose_scheme(T bound, int max_powers) {
  ChosenScheme best = {2, 1, squarings(bound, 2, 1)};
  int cost = 3 + 2 * best.squarings;
  for (int powers = 2; powers <= max_powers; ++powers) {
    const int s = squarings(bound, powers, 2), other = 3 + powers + 2 * s;
    if (other < cost) best = {powers, 2, s};
    cost = other < cost ? other : cost;
  }
  return best;
}

}  // namespace osf
