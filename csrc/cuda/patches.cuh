#pragma once
#include "common.cuh"
#include "divider.h"

// Moves patches between images and shared memory. A panel holds panel[d][n], element d of patch n:
// neighbouring patches of an image row are neighbours in it, so both sides move in wide accesses.
namespace osf::cuda {

constexpr int kPatchThreads = 128;

// PatchGrid made fast to index; tiles of all images are numbered as one.
struct Tiles {
  PatchGrid grid;
  int64_t D, count, rows, patches;       // rows, patches: of one tile
  Divider side, tiles, across, columns;  // p, Gh Gw, Gw, patches of a tile along W

  explicit Tiles(const PatchGrid& grid)
      : grid(grid),
        D(grid.dim()),
        count(grid.B * grid.tiles()),
        rows(grid.H / grid.p / grid.Gh),
        patches(grid.tile_patches()),
        side(grid.p),
        tiles(grid.tiles()),
        across(grid.Gw),
        columns(max(1, grid.tile_columns())) {}

  // Offset of the first element of the first patch of a tile
  OSF_HD int64_t origin(int64_t tile) const {
    const int64_t b = tiles.quotient(tile), g = tile - b * tiles.divisor();
    const int64_t i = across.quotient(g), j = g - i * across.divisor();
    return (b * grid.C * grid.H + i * rows * grid.p) * grid.W + j * columns.divisor() * grid.p;
  }
  // Offset of patch n from the tile's first patch
  OSF_HD int64_t patch(int64_t n) const {
    const int64_t i = columns.quotient(n);
    return (i * grid.W + n - i * columns.divisor()) * grid.p;
  }
};

// Elements per access: the widest V up to 16 bytes for which no access of V neighbours of an image
// row leaves a tile or is misaligned; 1 where there is none.
template <class S, class... Pointers>
int access_width(const Tiles& tiles, Pointers... images) {
  constexpr int V = kWide<S>;
  const int64_t p = tiles.grid.p;
  const bool whole = p < V ? V % p == 0 && tiles.columns.divisor() % (V / p) == 0 : p % V == 0;
  return whole && aligned(16, images...) ? V : 1;
}

// origins[n] = offset of patch n0 + n of the tile, -1 beyond its last patch
template <int TN>
__device__ __forceinline__ void locate(const Tiles& tiles, int64_t tile_origin, int64_t n0,
                                       int64_t* origins) {
  for (int n = threadIdx.x; n < TN; n += kPatchThreads)
    origins[n] = n0 + n < tiles.patches ? tile_origin + tiles.patch(n0 + n) : -1;
}

// Where access u of a panel lies: element d of patch n, and its offset in the image or -1 outside.
struct Access {
  int d, n;
  int64_t offset;
};

// P is the patch side, 0 if only known at run time, and then V = 1. d0 is a multiple of P.
template <int P, int V, int TN>
__device__ __forceinline__ Access access(const Tiles& tiles, const int64_t* origins, int64_t d0,
                                         int u) {
  const PatchGrid& grid = tiles.grid;
  if constexpr (P == 0) {
    const int n = u % TN, d = u / TN;
    const int64_t at = d0 + d, row = tiles.side.quotient(at), c = tiles.side.quotient(row);
    const bool inside = at < tiles.D && origins[n] >= 0;
    const int64_t offset = grid.row(c, row - c * grid.p) + at - row * grid.p;
    return {d, n, inside ? origins[n] + offset : -1};
  } else {
    constexpr int kSlots = TN * P / V;  // in one image row
    const int column = u % kSlots * V, n = column / P, j = column % P, d = u / kSlots * P;
    const int row = static_cast<int>(d0 + d) / P;
    const bool inside = d0 + d < tiles.D && origins[n] >= 0;
    return {d + j, n, inside ? origins[n] + grid.row(row / P, row % P) + j : -1};
  }
}

// An access covers kColumns neighbouring patches, kElements of each; kStore of them side by side in
// a panel of T move at once.
template <int P, int V, class T>
struct Run {
  static constexpr int kColumns = P && V > P ? V / P : 1, kElements = V / kColumns;
  static constexpr int kStore = kColumns < kWide<T> ? kColumns : kWide<T>;
};

// panel[d][n] = element d0 + d of the patch at origins[n], 0 outside; d < TD, n < TN. The rows of
// the panel and the panel itself are aligned to 16 bytes.
template <int P, int V, int TD, int TN, int LD, class S, class T>
__device__ __forceinline__ void gather(const Tiles& tiles, const int64_t* origins,
                                       const S* __restrict__ x,  // [B, C, H, W]
                                       int64_t d0, T* panel) {
  using R = Run<P, V, T>;
#pragma unroll 4
  for (int u = threadIdx.x; u < TD * TN / V; u += kPatchThreads) {
    const Access at = access<P, V, TN>(tiles, origins, d0, u);
    Pack<S, V> run = {};
    if (at.offset >= 0) run = Pack<S, V>::load(x + at.offset);
#pragma unroll
    for (int e = 0; e < R::kElements; ++e)
#pragma unroll
      for (int c = 0; c < R::kColumns; c += R::kStore) {
        Pack<T, R::kStore> part;
#pragma unroll
        for (int i = 0; i < R::kStore; ++i)
          part.value[i] = convert<T>(run.value[(c + i) * R::kElements + e]);
        part.store(panel + (at.d + e) * LD + at.n + c);
      }
  }
}

// Inverse of gather; writes nothing outside.
template <int P, int V, int TD, int TN, int LD, class S, class T>
__device__ __forceinline__ void scatter(const Tiles& tiles, const int64_t* origins, const T* panel,
                                        int64_t d0,
                                        S* __restrict__ out) {  // [B, C, H, W]
  using R = Run<P, V, T>;
#pragma unroll 2
  for (int u = threadIdx.x; u < TD * TN / V; u += kPatchThreads) {
    const Access at = access<P, V, TN>(tiles, origins, d0, u);
    if (at.offset < 0) continue;
    Pack<S, V> run;
#pragma unroll
    for (int e = 0; e < R::kElements; ++e)
#pragma unroll
      for (int c = 0; c < R::kColumns; c += R::kStore) {
        const auto part = Pack<T, R::kStore>::load(panel + (at.d + e) * LD + at.n + c);
#pragma unroll
        for (int i = 0; i < R::kStore; ++i)
          run.value[(c + i) * R::kElements + e] = convert<S>(part.value[i]);
      }
    run.store(out + at.offset);
  }
}

// A panel of 16-bit elements for tensor cores: [n][d] where an image row holds several neighbours
// of a patch, else [d][n], so that up to 16 bytes stay together. Rows are aligned to 16 bytes.
template <class S, int P, int V, int TD, int TN>
struct TensorPanel {
  static constexpr bool kByPatch = P > 1;
  static constexpr int kRow = (kByPatch ? TD : TN) + 8, kElements = (kByPatch ? TN : TD) * kRow;

  // Begins to copy element d0 + d of the patch at origins[n], 0 outside, to the panel.
  static __device__ __forceinline__ void fetch(const Tiles& tiles, const int64_t* origins,
                                               const S* __restrict__ x,  // [B, C, H, W]
                                               int64_t d0, S* panel) {
    constexpr int N = kByPatch ? P : V;  // elements that are copied at once
    // eight patches, then 16 bytes of them: neither memory nor banks are met twice
    constexpr int kPieces = kByPatch ? 8 / P : 1, kOctets = TN / 8;
#pragma unroll 4
    for (int u = threadIdx.x; u < TD * TN / N; u += kPatchThreads) {
      const int octet = u / 8 / kPieces, piece = u / 8 % kPieces + octet / kOctets * kPieces;
      const int order = kByPatch ? piece * TN + octet % kOctets * 8 + u % 8 : u;
      const Access at = access<P, N, TN>(tiles, origins, d0, order);
      copy_async<N>(x + at.offset, at.offset >= 0,
                    panel + (kByPatch ? at.n * kRow + at.d : at.d * kRow + at.n));
    }
  }
};

// Calls f with the patch side where it is a compile-time constant, 0 elsewhere, and V.
template <class S, class F>
cudaError_t with_patch_side(int64_t p, int width, F f) {
  constexpr int V = kWide<S>;
  switch (width == V ? p : 0) {
    case 1: return f.template operator()<1, V>();
    case 2: return f.template operator()<2, V>();
    case 4: return f.template operator()<4, V>();
    case 8: return f.template operator()<8, V>();
    default: return f.template operator()<0, 1>();
  }
}

}  // namespace osf::cuda
