#pragma once
#include "patch_grid.h"

// Every kernel: raw pointers in and out, no torch, no checks. Tensors are contiguous and of one
// dtype; sums are accumulated in float32, in float64 for float64. A result of one image or matrix
// depends neither on its batch mates nor on the number of threads.
namespace osf {

enum class DType { f32, f64, f16, bf16 };

// Runs body(begin, end, context) over parts of [0, n) of at least `grain` items each.
struct Threads {
  int64_t count;
  void (*run)(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
};

// D x D matrices, one per image and tile, `stride` elements apart (0: one for all).
struct Matrices {
  const void* data;
  int64_t stride;
  bool transposed;  // the memory holds q^T
};

// out[n] = q x[n] for every patch vector n
using PatchRotate = void(const Threads&, DType, const PatchGrid&,
                         const void* x,      // [B, C, H, W]
                         const Matrices& q,  // [D, D], [B, D, D] or [B, Gh, Gw, D, D]
                         void* out);         // [B, C, H, W]

// out = sum over n of a[n] b[n]^T
using PatchOuter = void(const Threads&, DType, const PatchGrid&,
                        const void* a,  // [B, C, H, W]
                        const void* b,  // [B, C, H, W]
                        bool shared,    // one sum over all images instead of one per tile
                        void* out);     // [D, D], or [B, Gh, Gw, D, D]

// out = exp(a - a^T)
using SkewExp = void(const Threads&, DType, int64_t B, int64_t D,
                     const void* a,  // [B, D, D]
                     void* out);     // [B, D, D]

// out = d <grad, q> / da for q = exp(a - a^T)
using DSkewExp = void(const Threads&, DType, int64_t B, int64_t D,
                      const void* grad,  // [B, D, D]
                      const void* a,     // [B, D, D]
                      const void* q,     // [B, D, D]
                      void* out);        // [B, D, D]

// resolvent = (I - S)^-1 with S = (a - a^T) / 2, out = 2 resolvent - I = (I - S)^-1 (I + S)
using Cayley = void(const Threads&, DType, int64_t B, int64_t D,
                    const void* a,     // [B, D, D]
                    void* out,         // [B, D, D]
                    void* resolvent);  // [B, D, D], accumulation dtype

// out = W - W^T = d <grad, out of cayley> / da with W = resolvent^T grad resolvent^T
using DCayley = void(const Threads&, DType, int64_t B, int64_t D,
                     const void* grad,       // [B, D, D]
                     const void* resolvent,  // [B, D, D], accumulation dtype
                     void* out);             // [B, D, D]

struct RotationOptions {
  double lr, beta1, beta2, eps, max_angle;  // lr and max_angle in radians
  bool scalar;                              // one second moment per matrix, not per element
};

// One Adam step on rotations, in place. With A = g - g^T: m = beta1 m + (1 - beta1) A,
// v = beta2 v + (1 - beta2) A^2 (the mean over i != j if scalar), X = lr m^ / (sqrt(v^) + eps) with
// the moments' biases removed, made shorter if its rotation angles exceed max_angle, q = exp(-X) q
// and one Newton-Schulz step. A matrix is left as it is if its ||A||_F^2 is not finite.
using RotationStep = void(const Threads&, DType, int64_t B, int64_t D, const RotationOptions&,
                          const void* g,  // [B, D, D]; the others in the accumulation dtype
                          void* q,        // [B, D, D]
                          void* m,        // [B, D, D]
                          void* v,        // [B, D, D], or [B] if scalar
                          void* steps);   // [B]

// loss = mean of (x - sigma eps_hat - target)^2 over the n elements of an image
using LatentMse = void(const Threads&, DType, int64_t B, int64_t n,
                       const void* eps_hat,  // [B, n]
                       const void* x,        // [B, n]
                       const void* target,   // [B, n]
                       double sigma,
                       void* loss);  // [B], accumulation dtype

// out = scale d <grad, loss> / dx; the other gradients are multiples of it
using DLatentMse = void(const Threads&, DType, int64_t B, int64_t n,
                        const void* grad,     // [B], accumulation dtype
                        const void* eps_hat,  // [B, n]
                        const void* x,        // [B, n]
                        const void* target,   // [B, n]
                        double sigma, double scale,
                        void* out);  // [B, n]

// loss = mean of |clamp(y / 2 + 0.5, 0, 1) - target| over the n elements of an image
using PixelL1 = void(const Threads&, DType, int64_t B, int64_t n,
                     const void* y,       // [B, n]
                     const void* target,  // [B, n]
                     void* loss);         // [B], accumulation dtype

// out = d <grad, loss> / dy, or / dtarget
using DPixelL1 = void(const Threads&, DType, int64_t B, int64_t n,
                      const void* grad,    // [B], accumulation dtype
                      const void* y,       // [B, n]
                      const void* target,  // [B, n]
                      bool wrt_target,
                      void* out);  // [B, n]

struct Kernels {
  const char* isa;
  PatchRotate* patch_rotate;
  PatchOuter* patch_outer;
  SkewExp* skew_exp;
  DSkewExp* d_skew_exp;
  Cayley* cayley;
  DCayley* d_cayley;
  RotationStep* rotation_step;
  LatentMse* latent_mse;
  DLatentMse* d_latent_mse;
  PixelL1* pixel_l1;
  DPixelL1* d_pixel_l1;
};

// The kernels for this CPU, or for the instruction set named in the environment variable OSF_CPU.
const Kernels& cpu_kernels();

}  // namespace osf
