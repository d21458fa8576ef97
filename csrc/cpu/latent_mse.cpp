#include "losses.h"

namespace osf::OSF_ISA {

void latent_mse(const Threads& threads, DType dtype, int64_t B, int64_t n, const void* eps_hat,
                const void* x, const void* target, double sigma, void* loss) {
  with_dtype(dtype, [&]<class S>(S) {
    using T = Accumulator<S>;
    const auto square = [s = T(sigma)](auto e, auto z, auto t) {
      const auto error = euler_error(e, z, t, s);
      return error * error;
    };
    mean_per_image<S>(threads, B, n, static_cast<T*>(loss), square, static_cast<const S*>(eps_hat),
                      static_cast<const S*>(x), static_cast<const S*>(target));
  });
}

void d_latent_mse(const Threads& threads, DType dtype, int64_t B, int64_t n, const void* grad,
                  const void* eps_hat, const void* x, const void* target, double sigma,
                  double scale, void* out) {
  with_dtype(dtype, [&]<class S>(S) {
    using T = Accumulator<S>;
    const auto slope = [s = T(sigma)](auto g, auto e, auto z, auto t) {
      return g * euler_error(e, z, t, s);
    };
    map_per_image(threads, B, n, static_cast<const T*>(grad), 2 * scale / double(n),
                  static_cast<S*>(out), slope, static_cast<const S*>(eps_hat),
                  static_cast<const S*>(x), static_cast<const S*>(target));
  });
}

}  // namespace osf::OSF_ISA
