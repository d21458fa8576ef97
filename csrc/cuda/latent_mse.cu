#include "losses.cuh"

namespace osf::cuda {
namespace {

// The sum of error^2 over V elements, error = x - sigma eps_hat - target, or, where there are
// weights, gradient[i] = factor weights[b] error.
template <class S>
struct SquaredError {
  using T = Accumulator<S>;
  const S* eps_hat;  // [B, n]
  const S* x;        // [B, n]
  const S* target;   // [B, n]
  T sigma;
  T factor = 0;
  const T* weights = nullptr;  // [B]
  S* gradient = nullptr;       // [B, n]

  template <int V>
  __device__ __forceinline__ T operator()(int64_t b, int64_t i) const {
    const auto e = Pack<S, V>::load(eps_hat + i), z = Pack<S, V>::load(x + i);
    const auto t = Pack<S, V>::load(target + i);
    const T weight = weights ? factor * weights[b] : T(0);
    Pack<S, V> out;
    T sum = 0;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const T error = euler_error(widen(e.value[j]), widen(z.value[j]), widen(t.value[j]), sigma);
      sum += error * error;
      out.value[j] = convert<S>(weight * error);
    }
    if (gradient) out.store(gradient + i);
    return sum;
  }
};

}  // namespace

int64_t loss_workspace_bytes(int64_t B, int64_t n) {
  const Chunks chunks(B, n);
  return chunks.per_image.divisor() == 1 ? 0 : chunks.count() * int64_t{sizeof(double)};
}

int latent_mse(DType dtype, int64_t B, int64_t n, const void* eps_hat, const void* x,
               const void* target, double sigma, void* workspace, void* loss, void* stream) {
  return with_dtype(dtype, [&]<class S>(S) {
    using T = Accumulator<S>;
    const SquaredError<S> f{static_cast<const S*>(eps_hat), static_cast<const S*>(x),
                            static_cast<const S*>(target), T(sigma)};
    return mean_per_image<S>(B, n, wide_runs<S>(n, eps_hat, x, target), f, workspace,
                             static_cast<T*>(loss), stream);
  });
}

int d_latent_mse(DType dtype, int64_t B, int64_t n, const void* grad, const void* eps_hat,
                 const void* x, const void* target, double sigma, double scale, void* out,
                 void* stream) {
  return with_dtype(dtype, [&]<class S>(S) {
    using T = Accumulator<S>;
    const SquaredError<S> f{static_cast<const S*>(eps_hat),
                            static_cast<const S*>(x),
                            static_cast<const S*>(target),
                            T(sigma),
                            T(2 * scale / double(n)),
                            static_cast<const T*>(grad),
                            static_cast<S*>(out)};
    return map_per_image<S>(B, n, wide_runs<S>(n, eps_hat, x, target, out), f, stream);
  });
}

}  // namespace osf::cuda
