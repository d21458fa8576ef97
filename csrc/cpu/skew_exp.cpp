#include "skew_exponential.h"

namespace osf::OSF_ISA {

void skew_exp(const Threads& threads, DType dtype, int64_t B, int64_t D, const void* a, void* out) {
  with_dtype(dtype, [&]<class S>(S) {
    for_each_matrix(threads, B, D, [&](int64_t b0, int64_t b1) {
      Exponential<Accumulator<S>> exponential(threads, D, false);
      for (int64_t b = b0; b < b1; ++b) {
        exponential.set_generator(static_cast<const S*>(a) + b * D * D);
        exponential.squares().write(exponential.exp(), static_cast<S*>(out) + b * D * D);
      }
    });
  });
}

void d_skew_exp(const Threads& threads, DType dtype, int64_t B, int64_t D, const void* grad,
                const void* a, const void* q, void* out) {
  with_dtype(dtype, [&]<class S>(S) {
    for_each_matrix(threads, B, D, [&](int64_t b0, int64_t b1) {
      Exponential<Accumulator<S>> exponential(threads, D, true);
      for (int64_t b = b0; b < b1; ++b)
        exponential.adjoint(static_cast<const S*>(grad) + b * D * D,
                            static_cast<const S*>(a) + b * D * D,
                            static_cast<const S*>(q) + b * D * D, static_cast<S*>(out) + b * D * D);
    });
  });
}

}  // namespace osf::OSF_ISA
