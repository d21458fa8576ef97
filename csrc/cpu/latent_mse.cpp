#include "losses.h"

namespace osf::OSF_ISA {

void latent_mse(const Threads& threads, DType dtype, int64_t B, int64_t n, const void* eps_hat,
                const void* x, const void* target, double sigma, void* loss) {
  with_dtype(dtype, [&]<class S>(S) {
    using T = Accumulator<S>;
    const S *e = static_cast<const S*>(eps_hat), *z = static_cast<const S*>(x);
    const S* t = static_cast<const S*>(target);
    mean_per_image(threads, B, n, static_cast<T*>(loss), [=, s = T(sigma)](int64_t i) {
      const T error = euler_error(widen(e[i]), widen(z[i]), widen(t[i]), s);
      return error * error;
    });
  });
}

void d_latent_mse(const Threads& threads, DType dtype, int64_t B, int64_t n, const void* grad,
                  const void* eps_hat, const void* x, const void* target, double sigma,
                  double scale, void* out) {
  with_dtype(dtype, [&]<class S>(S) {
    using T = Accumulator<S>;
    const S *e = static_cast<const S*>(eps_hat), *z = static_cast<const S*>(x);
    const S* t = static_cast<const S*>(target);
    map_per_image(threads, B, n, static_cast<const T*>(grad), 2 * scale / double(n),
                  static_cast<S*>(out), [=, s = T(sigma)](T g, int64_t i) {
                    return g * euler_error(widen(e[i]), widen(z[i]), widen(t[i]), s);
                  });
  });
}

}  // namespace osf::OSF_ISA
