#include "losses.cuh"

namespace osf::cuda {
namespace {

// The sum of |error| over V elements, error = clamp(y / 2 + 0.5, 0, 1) - target, or, where there
// are weights, gradient[i] = factor weights[b] slope sign(error) with slope = d error / dy, or /
// dtarget.
template <class S>
struct AbsoluteError {
  using T = Accumulator<S>;
  const S* y;       // [B, n]
  const S* target;  // [B, n]
  bool wrt_target = false;
  T factor = 0;
  const T* weights = nullptr;  // [B]
  S* gradient = nullptr;       // [B, n]

  template <int V>
  __device__ __forceinline__ T operator()(int64_t b, int64_t i) const {
    const auto v = Pack<S, V>::load(y + i), t = Pack<S, V>::load(target + i);
    const T weight = weights ? factor * weights[b] : T(0);
    Pack<S, V> out;
    T sum = 0;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const T pixel = widen(v.value[j]), error = pixel_error(pixel, widen(t.value[j]));
      const T slope = wrt_target ? T(-1) : unit_slope(pixel);
      sum += error < T(0) ? -error : error;
      out.value[j] = convert<S>(weight * slope * sign(error));
    }
    if (gradient) out.store(gradient + i);
    return sum;
  }
};

}  // namespace

int pixel_l1(DType dtype, int64_t B, int64_t n, const void* y, const void* target, void* workspace,
             void* loss, void* stream) {
  return with_dtype(dtype, [&]<class S>(S) {
    using T = Accumulator<S>;
    const AbsoluteError<S> f{static_cast<const S*>(y), static_cast<const S*>(target)};
    return mean_per_image<S>(B, n, wide_runs<S>(n, y, target), f, workspace, static_cast<T*>(loss),
                             stream);
  });
}

int d_pixel_l1(DType dtype, int64_t B, int64_t n, const void* grad, const void* y,
               const void* target, bool wrt_target, void* out, void* stream) {
  return with_dtype(dtype, [&]<class S>(S) {
    using T = Accumulator<S>;
    const AbsoluteError<S> f{
        static_cast<const S*>(y), static_cast<const S*>(target), wrt_target,
        T(1 / double(n)),         static_cast<const T*>(grad),   static_cast<S*>(out)};
    return map_per_image<S>(B, n, wide_runs<S>(n, y, target, out), f, stream);
  });
}

}  // namespace osf::cuda
