#include "patch_rotate.cuh"

namespace osf::cuda {
namespace {

struct Rotation {
  Tiles tiles;
  const void* x;      // [B, C, H, W]
  const Matrices& q;  // [D, D], [B, D, D] or [B, Gh, Gw, D, D]
  void* out;          // [B, C, H, W]
  void* stream;
};

template <class S, int P, int C>
cudaError_t in_registers(const Rotation& r) {
  using T = Accumulator<S>;
  // patches per thread: one 16-byte access per image row, but at most 256 bytes of registers
  constexpr int kRow = kWide<S> / P > 1 ? kWide<S> / P : 1;
  constexpr int kHeld = static_cast<int>(256 / (C * P * P * sizeof(T)));
  constexpr int R = kHeld < 1 ? 1 : kRow < kHeld ? kRow : kHeld;
  constexpr int A = R * P < kWide<S> ? R * P : kWide<S>;
  const auto run = [&](auto kernel, int patches) {
    const Divider blocks(ceil_div(r.tiles.patches, patches * kPatchThreads));
    return launch(kernel, r.tiles.count * blocks.divisor(), kPatchThreads, r.stream, r.tiles,
                  blocks, static_cast<const S*>(r.x), static_cast<const S*>(r.q.data), r.q.stride,
                  r.q.transposed, static_cast<S*>(r.out));
  };
  if (r.tiles.columns.divisor() % R == 0 && aligned(A * sizeof(S), r.x, r.out))
    return run(rotate_registers<S, P, C, R, A>, R);
  return run(rotate_registers<S, P, C, 1, 1>, 1);
}

template <class S, int P, int K>
cudaError_t in_rows(const Rotation& r) {
  const Divider blocks(ceil_div(r.tiles.patches, RowsOfPatches<S, P, K>::kPatches));
  return launch(rotate_rows<S, P, K>, r.tiles.count * blocks.divisor(), kPatchThreads, r.stream,
                r.tiles, blocks, static_cast<const S*>(r.x), static_cast<const S*>(r.q.data),
                r.q.stride, r.q.transposed, static_cast<S*>(r.out));
}

template <class S, int TM, int TN, int RM, int RN>
cudaError_t tiled(const Rotation& r) {
  const int width = access_width<S>(r.tiles, r.x, r.out);
  return with_patch_side<S>(r.tiles.grid.p, width, [&]<int P, int V>() {
    const RotateBlocks<TM, TN> blocks(r.tiles);
    return launch(rotate_tiled<S, P, V, TM, TN, RM, RN>, blocks.count, kPatchThreads, r.stream,
                  r.tiles, blocks, static_cast<const S*>(r.x), static_cast<const S*>(r.q.data),
                  r.q.stride, r.q.transposed, static_cast<S*>(r.out));
  });
}

template <class S>
cudaError_t on_tensor_cores(const Rotation& r) {
  const int width = access_width<S>(r.tiles, r.x, r.out);
  return with_patch_side<S>(r.tiles.grid.p, width, [&]<int P, int V>() {
    const RotateBlocks<64, 64> blocks(r.tiles);
    return launch(rotate_mma<S, P, V>, blocks.count, kPatchThreads, r.stream, r.tiles, blocks,
                  static_cast<const S*>(r.x), static_cast<const S*>(r.q.data), r.q.stride,
                  r.q.transposed, r.tiles.D % kWide<S> == 0 && aligned(16, r.q.data),
                  static_cast<S*>(r.out));
  });
}

// The kernel by size; which is faster at D = 64 in float32 is not measured.
template <class S>
cudaError_t by_size(const Rotation& r) {
  const int64_t p = r.tiles.grid.p, C = r.tiles.grid.C, D = r.tiles.D;
  switch (p * 100 + (C < 100 ? C : 0)) {
    case 104: return in_registers<S, 1, 4>(r);
    case 108: return in_registers<S, 1, 8>(r);
    case 116: return in_registers<S, 1, 16>(r);
    case 203: return in_registers<S, 2, 3>(r);
    case 204: return in_registers<S, 2, 4>(r);
    case 208: return in_registers<S, 2, 8>(r);
    case 401: return in_registers<S, 4, 1>(r);
    case 402: return in_registers<S, 4, 2>(r);
    case 403: return in_registers<S, 4, 3>(r);
    default: break;
  }
  if (D <= 32) return tiled<S, 16, 128, 4, 4>(r);
  if constexpr (sizeof(S) == 2)
    return on_tensor_cores<S>(r);
  else
    return tiled<S, 64, 64, 8, 4>(r);
}

template <class S>
cudaError_t rotate(const Rotation& r) {
  if constexpr (sizeof(S) == 2)
    return with_patch_runs(
        r.tiles, [&]<int P, int K>() { return in_rows<S, P, K>(r); }, [&] { return by_size<S>(r); },
        r.x, r.out);
  else
    return by_size<S>(r);
}

}  // namespace

int patch_rotate(DType dtype, const PatchGrid& grid, const void* x, const Matrices& q, void* out,
                 void* stream) {
  const Tiles tiles(grid);
  if (tiles.count == 0 || tiles.D == 0 || tiles.patches == 0) return cudaSuccess;
  return with_dtype(dtype, [&]<class S>(S) { return rotate<S>({tiles, x, q, out, stream}); });
}

}  // namespace osf::cuda
