#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define OSF_HD __host__ __device__ __forceinline__
#else
// never emitted out of line: files compiled for different instruction sets share it
#define OSF_HD inline __attribute__((always_inline))
#endif

namespace osf {

// Latents [B, C, H, W] whose patches of side p, D = C p p elements each, are grouped into Gh x Gw
// equal tiles per image. The one definition of the (image, tile, patch, element) -> offset map.
struct PatchGrid {
  int64_t B, C, H, W, p, Gh, Gw;

  OSF_HD int64_t dim() const { return C * p * p; }
  OSF_HD int64_t tiles() const { return Gh * Gw; }
  OSF_HD int64_t tile_columns() const { return W / p / Gw; }
  OSF_HD int64_t tile_patches() const { return H / p / Gh * tile_columns(); }

  // Offset of the first element of patch n of tile g of image b; n runs along the tile's rows.
  OSF_HD int64_t origin(int64_t b, int64_t g, int64_t n) const {
    const int64_t row = g / Gw * (H / p / Gh) + n / tile_columns();
    const int64_t column = g % Gw * tile_columns() + n % tile_columns();
    return (b * C * H + row * p) * W + column * p;
  }
  // Offset of row i of channel c of a patch from the patch's first element.
  OSF_HD int64_t row(int64_t c, int64_t i) const { return (c * H + i) * W; }
};

}  // namespace osf
