#pragma once
#include "patch_grid.h"

// Scalar formulas of the losses and their derivatives; CPU and CUDA both use them.
namespace osf {

// x0 - target with the one-step Euler update x0 = x - sigma eps_hat.
template <class T>
OSF_HD T euler_error(T eps_hat, T x, T target, T sigma) {
  return x - sigma * eps_hat - target;
}

// The decoder's [-1, 1] to [0, 1] without the clamp.
template <class T>
OSF_HD T to_unit(T y) {
  return y * T(0.5) + T(0.5);
}

// clamp(y / 2 + 0.5, 0, 1) - target; a NaN stays a NaN.
template <class T>
OSF_HD T pixel_error(T y, T target) {
  T unit = to_unit(y);
  unit = unit < T(0) ? T(0) : unit;
  unit = unit > T(1) ? T(1) : unit;
  return unit - target;
}

// d |error| / d error, 0 at 0.
template <class T>
OSF_HD T sign(T error) {
  return T(error > T(0)) - T(error < T(0));
}

// d clamp(y / 2 + 0.5, 0, 1) / dy; the borders count as inside, as in torch.
template <class T>
OSF_HD T unit_slope(T y) {
  const T unit = to_unit(y);
  return unit >= T(0) && unit <= T(1) ? T(0.5) : T(0);
}

}  // namespace osf
