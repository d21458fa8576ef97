#pragma once
#include "patch_grid.h"

// Formulas of the losses and their derivatives; CPU and CUDA both use them. T is a number, on a CPU
// also a vector of numbers, hence the literals: a vector takes them, but is not made of them.
namespace osf {

// x0 - target with the one-step Euler update x0 = x - sigma eps_hat.
template <class T, class Scalar>
OSF_HD T euler_error(T eps_hat, T x, T target, Scalar sigma) {
  return x - sigma * eps_hat - target;
}

// The decoder's [-1, 1] to [0, 1] without the clamp.
template <class T>
OSF_HD T to_unit(T y) {
  return y * 0.5f + 0.5f;
}

// clamp(unit, 0, 1); a NaN stays a NaN.
template <class T>
OSF_HD T clamped(T unit) {
  const T zero{}, one = zero + 1.f;
  unit = zero > unit ? zero : unit;
  return one < unit ? one : unit;
}

// clamp(y / 2 + 0.5, 0, 1) - target
template <class T>
OSF_HD T pixel_error(T y, T target) {
  return clamped(to_unit(y)) - target;
}

template <class T>
OSF_HD T magnitude(T error) {
  return error > -error ? error : -error;
}

// d |error| / d error, 0 at 0.
template <class T>
OSF_HD T sign(T error) {
  const T zero{}, one = zero + 1.f;
  const T below = error < zero ? -one : zero;
  return error > zero ? one : below;
}

// d clamp(y / 2 + 0.5, 0, 1) / dy; the borders count as inside, as in torch.
template <class T>
OSF_HD T unit_slope(T y) {
  const T zero{}, unit = to_unit(y);
  return unit == clamped(unit) ? zero + 0.5f : zero;
}

}  // namespace osf
