#pragma once
#include "../kernels.h"

// The CUDA kernels' launchers, for hosts that know no CUDA: device pointers in and out, a
// cudaStream_t as void*, a cudaError_t as int. They launch on the current device, allocate nothing,
// never synchronise and can be captured in a CUDA graph. Dtypes, sums and sizes are as in
// kernels.h; every sum has a fixed order. A workspace is uninitialised device memory, aligned to
// 256 bytes, of *_workspace_bytes(...) bytes (0: it may be null), free again when the stream has
// passed the launch.
namespace osf::cuda {

// What CUDA says of an error that a launcher returned
const char* error_text(int error);

// out[n] = q x[n] for every patch vector n
int patch_rotate(DType, const PatchGrid&,
                 const void* x,      // [B, C, H, W]
                 const Matrices& q,  // [D, D], [B, D, D] or [B, Gh, Gw, D, D]
                 void* out,          // [B, C, H, W], not x
                 void* stream);

// out = sum over n of a[n] b[n]^T
int64_t patch_outer_workspace_bytes(DType, const PatchGrid&, bool shared);
int patch_outer(DType, const PatchGrid&,
                const void* a,  // [B, C, H, W]
                const void* b,  // [B, C, H, W]
                bool shared,    // one sum over all images instead of one per tile
                void* workspace,
                void* out,  // [D, D], or [B, Gh, Gw, D, D]
                void* stream);

// out = exp(a - a^T)
int64_t skew_exp_workspace_bytes(DType, int64_t B, int64_t D);
int skew_exp(DType, int64_t B, int64_t D,
             const void* a,  // [B, D, D]
             void* workspace,
             void* out,  // [B, D, D]
             void* stream);

// out = d <grad, q> / da for q = exp(a - a^T)
int64_t d_skew_exp_workspace_bytes(DType, int64_t B, int64_t D);
int d_skew_exp(DType, int64_t B, int64_t D,
               const void* grad,  // [B, D, D]
               const void* a,     // [B, D, D]
               const void* q,     // [B, D, D]
               void* workspace,
               void* out,  // [B, D, D]
               void* stream);

// One Adam step on rotations, in place, see kernels.h; for D <= 64, or 32 in float64
int rotation_step(DType, int64_t B, int64_t D, const RotationOptions&,
                  const void* g,  // [B, D, D]; the others in the accumulation dtype
                  void* q,        // [B, D, D]
                  void* m,        // [B, D, D]
                  void* v,        // [B, D, D], or [B] if scalar
                  void* steps,    // [B]
                  void* stream);

// Of either loss below
int64_t loss_workspace_bytes(int64_t B, int64_t n);

// loss = mean of (x - sigma eps_hat - target)^2 over the n elements of an image
int latent_mse(DType, int64_t B, int64_t n,
               const void* eps_hat,  // [B, n]
               const void* x,        // [B, n]
               const void* target,   // [B, n]
               double sigma, void* workspace,
               void* loss,  // [B], accumulation dtype
               void* stream);

// out = scale d <grad, loss> / dx
int d_latent_mse(DType, int64_t B, int64_t n,
                 const void* grad,     // [B], accumulation dtype
                 const void* eps_hat,  // [B, n]
                 const void* x,        // [B, n]
                 const void* target,   // [B, n]
                 double sigma, double scale,
                 void* out,  // [B, n]
                 void* stream);

// loss = mean of |clamp(y / 2 + 0.5, 0, 1) - target| over the n elements of an image
int pixel_l1(DType, int64_t B, int64_t n,
             const void* y,       // [B, n]
             const void* target,  // [B, n]
             void* workspace,
             void* loss,  // [B], accumulation dtype
             void* stream);

// out = d <grad, loss> / dy, or / dtarget
int d_pixel_l1(DType, int64_t B, int64_t n,
               const void* grad,    // [B], accumulation dtype
               const void* y,       // [B, n]
               const void* target,  // [B, n]
               bool wrt_target,
               void* out,  // [B, n]
               void* stream);

}  // namespace osf::cuda
