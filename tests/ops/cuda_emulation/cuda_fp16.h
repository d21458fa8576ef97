#pragma once
#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
inline float __half2float(__half h) { return __builtin_bit_cast(_Float16, h.bits); }
inline __half __float2half_rn(float x) {
  return {__builtin_bit_cast(uint16_t, static_cast<_Float16>(x))};
}
