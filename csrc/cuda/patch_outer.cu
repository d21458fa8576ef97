#include "patch_outer.cuh"

namespace osf::cuda {
namespace {

struct Outer {
  Tiles tiles;
  bool shared;
  const void* a;  // [B, C, H, W]
  const void* b;  // [B, C, H, W]
  void* workspace;
  void* out;  // [D, D], or [B, Gh, Gw, D, D]
  void* stream;
};

// Side of the square of an output that one block sums
int tile_side(int64_t D) { return D <= 16 ? 16 : D <= 32 ? 32 : 64; }

template <class S, int TD, int RM, int RN, int TN>
cudaError_t tiled(const Outer& o, const OuterPlan& plan) {
  const int width = access_width<S>(o.tiles, o.a, o.b);
  return with_patch_side<S>(o.tiles.grid.p, width, [&]<int P, int V>() {
    return launch(outer_tiled<S, P, V, TD, RM, RN, TN>, plan.blocks(), kPatchThreads, o.stream,
                  o.tiles, plan, static_cast<const S*>(o.a), static_cast<const S*>(o.b),
                  static_cast<Accumulator<S>*>(o.workspace), static_cast<S*>(o.out));
  });
}

template <class S>
cudaError_t on_tensor_cores(const Outer& o, const OuterPlan& plan) {
  const int width = access_width<S>(o.tiles, o.a, o.b);
  return with_patch_side<S>(o.tiles.grid.p, width, [&]<int P, int V>() {
    return launch(outer_mma<S, P, V>, plan.blocks(), kPatchThreads, o.stream, o.tiles, plan,
                  static_cast<const S*>(o.a), static_cast<const S*>(o.b),
                  static_cast<float*>(o.workspace), static_cast<S*>(o.out));
  });
}

template <class S, int P, int K>
cudaError_t in_rows(const Outer& o, const OuterPlan& plan) {
  return launch(outer_rows<S, P, K>, plan.blocks(), kPatchThreads, o.stream, o.tiles, plan,
                static_cast<const S*>(o.a), static_cast<const S*>(o.b),
                static_cast<float*>(o.workspace), static_cast<S*>(o.out));
}

template <class S>
cudaError_t by_size(const Outer& o, const OuterPlan& plan) {
  switch (tile_side(o.tiles.D)) {
    case 16: return tiled<S, 16, 4, 4, 64>(o, plan);
    case 32: return tiled<S, 32, 4, 4, 32>(o, plan);
    default: break;
  }
  if constexpr (sizeof(S) == 2)
    return on_tensor_cores<S>(o, plan);
  else
    return tiled<S, 64, 8, 4, 16>(o, plan);
}

template <class S>
cudaError_t first_stage(const Outer& o, const OuterPlan& plan) {
  const auto otherwise = [&] { return by_size<S>(o, plan); };
  if constexpr (sizeof(S) == 2)
    return with_patch_runs(
        o.tiles,
        [&]<int P, int K>() {
          if constexpr (P < 4) return in_rows<S, P, K>(o, plan);
          return otherwise();
        },
        otherwise, o.a, o.b);
  else
    return otherwise();
}

template <class S>
cudaError_t outer(const Outer& o) {
  const OuterPlan plan(o.tiles, o.shared, tile_side(o.tiles.D));
  const cudaError_t error = first_stage<S>(o, plan);
  const int64_t splits = plan.splits.divisor(), n = o.tiles.D * o.tiles.D;
  if (error != cudaSuccess || splits == 1) return error;
  const Divider blocks(ceil_div(n, kWarp));
  return launch(add_partial_sums<S>, plan.outputs * blocks.divisor(), 256, o.stream, plan.outputs,
                splits, n, blocks, static_cast<const Accumulator<S>*>(o.workspace),
                static_cast<S*>(o.out));
}

}  // namespace

int64_t patch_outer_workspace_bytes(DType dtype, const PatchGrid& grid, bool shared) {
  const Tiles tiles(grid);
  const OuterPlan plan(tiles, shared, tile_side(tiles.D));
  const int64_t splits = plan.splits.divisor();
  if (splits == 1) return 0;
  return plan.outputs * splits * tiles.D * tiles.D * accumulator_bytes(dtype);
}

int patch_outer(DType dtype, const PatchGrid& grid, const void* a, const void* b, bool shared,
                void* workspace, void* out, void* stream) {
  const Tiles tiles(grid);
  if (tiles.D == 0) return cudaSuccess;
  return with_dtype(
      dtype, [&]<class S>(S) { return outer<S>({tiles, shared, a, b, workspace, out, stream}); });
}

}  // namespace osf::cuda
