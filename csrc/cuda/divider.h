#pragma once
#include "../patch_grid.h"

namespace osf::cuda {

// Division of 0 <= n < 2^63 by a number that the host knows, in one multiplication: a 64-bit
// division costs a call and some hundred instructions on a GPU.
// Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.
class Divider {
 public:
  explicit Divider(int64_t divisor = 1) : divisor_(divisor) {
    while (shift_ < 63 && int64_t{1} << shift_ < divisor) ++shift_;
    const auto excess = static_cast<unsigned __int128>((uint64_t{1} << shift_) - divisor);
    multiplier_ = static_cast<uint64_t>((excess << 64) / divisor) + 1;
  }
  OSF_HD int64_t divisor() const { return divisor_; }
  OSF_HD int64_t quotient(int64_t n) const {
    const auto u = static_cast<uint64_t>(n);
#ifdef __CUDA_ARCH__
    const uint64_t high = __umul64hi(multiplier_, u);
#else
    const auto high = static_cast<uint64_t>(static_cast<unsigned __int128>(multiplier_) * u >> 64);
#endif
    return static_cast<int64_t>((high + u) >> shift_);
  }
  OSF_HD int64_t remainder(int64_t n) const { return n - quotient(n) * divisor_; }

 private:
  int64_t divisor_;
  uint64_t multiplier_;
  int shift_ = 0;
};

}  // namespace osf::cuda
