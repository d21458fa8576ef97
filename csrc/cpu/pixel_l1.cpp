#include "losses.h"

namespace osf::OSF_ISA {

void pixel_l1(const Threads& threads, DType dtype, int64_t B, int64_t n, const void* y,
              const void* target, void* loss) {
  with_dtype(dtype, [&]<class S>(S) {
    using T = Accumulator<S>;
    const S *v = static_cast<const S*>(y), *t = static_cast<const S*>(target);
    mean_per_image(threads, B, n, static_cast<T*>(loss), [=](int64_t i) {
      const T error = pixel_error(widen(v[i]), widen(t[i]));
      return error < T(0) ? -error : error;
    });
  });
}

void d_pixel_l1(const Threads& threads, DType dtype, int64_t B, int64_t n, const void* grad,
                const void* y, const void* target, bool wrt_target, void* out) {
  with_dtype(dtype, [&]<class S>(S) {
    using T = Accumulator<S>;
    const S *v = static_cast<const S*>(y), *t = static_cast<const S*>(target);
    map_per_image(threads, B, n, static_cast<const T*>(grad), 1 / double(n), static_cast<S*>(out),
                  [=](T g, int64_t i) {
                    const T slope = wrt_target ? T(-1) : unit_slope(widen(v[i]));
                    return g * slope * sign(pixel_error(widen(v[i]), widen(t[i])));
                  });
  });
}

}  // namespace osf::OSF_ISA
