#include "losses.h"

namespace osf::OSF_ISA {

void pixel_l1(const Threads& threads, DType dtype, int64_t B, int64_t n, const void* y,
              const void* target, void* loss) {
  with_dtype(dtype, [&]<class S>(S) {
    mean_per_image<S>(
        threads, B, n, static_cast<Accumulator<S>*>(loss),
        [](auto v, auto t) { return magnitude(pixel_error(v, t)); }, static_cast<const S*>(y),
        static_cast<const S*>(target));
  });
}

void d_pixel_l1(const Threads& threads, DType dtype, int64_t B, int64_t n, const void* grad,
                const void* y, const void* target, bool wrt_target, void* out) {
  with_dtype(dtype, [&]<class S>(S) {
    const auto map = [&](double factor, auto f) {
      map_per_image(threads, B, n, static_cast<const Accumulator<S>*>(grad), factor / double(n),
                    static_cast<S*>(out), f, static_cast<const S*>(y),
                    static_cast<const S*>(target));
    };
    if (wrt_target)
      map(-1, [](auto g, auto v, auto t) { return g * sign(pixel_error(v, t)); });
    else
      map(1, [](auto g, auto v, auto t) { return g * unit_slope(v) * sign(pixel_error(v, t)); });
  });
}

}  // namespace osf::OSF_ISA
