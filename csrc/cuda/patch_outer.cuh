#pragma once
#include "patches.cuh"
#include "tensor_tile.cuh"
#include "warp_product.cuh"

// The kernels of patch_outer, out = sum over n of a_n b_n^T, in two stages of fixed order: a block
// sums one part of the patches of one output, then the parts are added.
namespace osf::cuda {

// The patches of every tile are cut into `parts` of `length`; part f of all is part f % parts of
// tile f / parts. An output sums `parts` of one tile, or of all tiles if shared, in `splits` blocks
// of `together` parts each. Nothing of it depends on the other images of the batch, unless shared.
struct OuterPlan {
  static constexpr int64_t kShortest = 256;  // patches
  static constexpr int64_t kMostParts = 16, kMostSplits = 256, kMostBlocks = 512;

  int64_t length, outputs, per_output, together;
  Divider parts, splits, down;  // down: blocks along each side of an output

  OuterPlan(const Tiles& tiles, bool shared, int TD)
      : parts(max(1, min(kMostParts, ceil_div(tiles.patches, kShortest)))),
        down(max(1, ceil_div(tiles.D, TD))) {
    length = round_up(ceil_div(tiles.patches, parts.divisor()), 128);
    outputs = shared ? 1 : tiles.count;
    per_output = shared ? tiles.count * parts.divisor() : parts.divisor();
    const int64_t blocks = down.divisor() * down.divisor();
    const int64_t most = shared ? max(1, min(kMostSplits, kMostBlocks / blocks)) : kMostParts;
    together = max(1, ceil_div(per_output, most));
    splits = Divider(max(1, ceil_div(per_output, together)));
  }
  OSF_HD int64_t blocks() const {
    return outputs * splits.divisor() * down.divisor() * down.divisor();
  }
  struct Block {
    int64_t sum, first, last, m0, n0;  // sum: output and split, [first, last): its parts
  };
  template <int TD>
  OSF_HD Block block(int64_t work) const {
    const int64_t i = down.quotient(work), sum = down.quotient(i), output = splits.quotient(sum);
    const int64_t begin = (sum - output * splits.divisor()) * together;
    return {sum, output * per_output + begin,
            output * per_output + min(per_output, begin + together),
            (i - sum * down.divisor()) * TD, (work - i * down.divisor()) * TD};
  }
};

// Walks over the panels X of TN patches of the parts [first, last), two of a and b at a time: while
// f(panel of a, panel of b) uses those that are there the next ones are on their way. Every thread
// of the block takes part.
template <class X, int TN, class S, class F>
__device__ __forceinline__ void for_each_panel(const Tiles& tiles, const OuterPlan& plan,
                                               const OuterPlan::Block& block,
                                               const S* __restrict__ a,  // [B, C, H, W]
                                               const S* __restrict__ b,  // [B, C, H, W]
                                               S* panels,                // [2, 2, X::kElements]
                                               int64_t (&origins)[2][TN], F f) {
  const auto panel = [&](int stage, int i) { return panels + (2 * stage + i) * X::kElements; };
  int64_t part = block.first - 1, n0 = 0, end = 0, origin = 0;
  for (int stage = 0, count = 0;; stage = 1 - stage, ++count) {
    for (n0 += TN; n0 >= end && ++part < block.last;) {
      const int64_t tile = plan.parts.quotient(part);
      n0 = (part - tile * plan.parts.divisor()) * plan.length;
      end = min(tiles.patches, n0 + plan.length);
      origin = tiles.origin(tile);
    }
    const bool more = part < block.last;
    if (more) locate<TN>(tiles, origin, n0, origins[stage]);
    wait_for_copies();
    __syncthreads();
    if (more) {
      X::fetch(tiles, origins[stage], a, block.m0, panel(stage, 0));
      X::fetch(tiles, origins[stage], b, block.n0, panel(stage, 1));
    }
    if (count > 0) f(panel(1 - stage, 0), panel(1 - stage, 1));
    if (!more) break;
  }
}

// The block's TD x TD sums, rows of LD, to the partial sums or, if there is one split, to out.
template <int TD, int LD, class S, class T>
__device__ __forceinline__ void write_sums(const Tiles& tiles, const OuterPlan& plan,
                                           const OuterPlan::Block& block, const T* sums, T* partial,
                                           S* out) {
  for (int u = threadIdx.x; u < TD * TD; u += kPatchThreads) {
    const int64_t m = block.m0 + u / TD, n = block.n0 + u % TD;
    if (m >= tiles.D || n >= tiles.D) continue;
    const T sum = sums[u / TD * LD + u % TD];
    const int64_t at = (block.sum * tiles.D + m) * tiles.D + n;
    if (plan.splits.divisor() == 1)
      out[at] = convert<S>(sum);
    else
      partial[at] = sum;
  }
}

// A panel of TD elements of TN patches in shared memory as the image has them, a row per row.
template <class S, int P, int V, int TD, int TN>
struct RowPanel {
  using T = Accumulator<S>;
  static constexpr int kSide = P > 0 ? P : 1;
  static constexpr int kRow = TN * kSide + (kSide > kWide<S> ? kSide : kWide<S>);
  static constexpr int kElements = TD / kSide * kRow;
  // read at once: so many elements of so many patches side by side
  static constexpr int kNext = kWide<T>, E = kSide < kNext ? kSide : kNext, N = kNext / E;

  static __device__ __forceinline__ int place(int d, int n) {
    return d / kSide * kRow + n * kSide + d % kSide;
  }
  // Begins to copy element d0 + d of the patch at origins[n], 0 outside.
  static __device__ __forceinline__ void fetch(const Tiles& tiles, const int64_t* origins,
                                               const S* __restrict__ x,  // [B, C, H, W]
                                               int64_t d0, S* panel) {
#pragma unroll 4
    for (int u = threadIdx.x; u < TD * TN / V; u += kPatchThreads) {
      const Access at = access<P, V, TN>(tiles, origins, d0, u);
      copy_async<V>(x + at.offset, at.offset >= 0, panel + place(at.d, at.n));
    }
  }
  // The elements d .. d + E - 1 of the patches n .. n + kNext - 1
  static __device__ __forceinline__ void read(const S* panel, int d, int n, T (&values)[E][kNext]) {
#pragma unroll
    for (int i = 0; i < kNext; i += N) {
      const auto part = Pack<S, kNext>::load(panel + place(d, n + i));
#pragma unroll
      for (int e = 0; e < kNext; ++e) values[e % E][i + e / E] = widen(part.value[e]);
    }
  }
};

// Any D: TD x TD of A B^T per block, TN patches at a time.
// Shared memory: twice a panel of a and one of b, of which one pair is multiplied and the other on
// its way, then the sums. The threads form groups that share the patches of a panel; a thread sums
// RM x RN products, of rows far apart so that neighbours read neighbouring rows, which lie in
// different banks.
template <class S, int P, int V, int TD, int RM, int RN, int TN>
__global__ void __launch_bounds__(kPatchThreads, sizeof(S) == 8 ? 2 : 4)
    outer_tiled(Tiles tiles, OuterPlan plan,
                const S* __restrict__ a,               // [B, C, H, W]
                const S* __restrict__ b,               // [B, C, H, W]
                Accumulator<S>* __restrict__ partial,  // [outputs, splits, D, D]
                S* __restrict__ out) {                 // [outputs, D, D]
  using T = Accumulator<S>;
  using X = RowPanel<S, P, V, TD, TN>;
  constexpr int E = X::E, kNext = X::kNext, kRows = TD / RM, kColumns = TD / RN;
  constexpr int kGroups = kPatchThreads / (kRows * kColumns);
  constexpr int kPanels = 4 * X::kElements * sizeof(S), kSums = kGroups * TD * TD * sizeof(T);
  __shared__ __align__(16) unsigned char memory[kPanels > kSums ? kPanels : kSums];
  __shared__ int64_t origins[2][TN];
  S* const panels = reinterpret_cast<S*>(memory);
  T* const sums = reinterpret_cast<T*>(memory);
  const int group = threadIdx.x / (kRows * kColumns), place = threadIdx.x % (kRows * kColumns);
  const int m = place / kColumns * E, n = place % kColumns * E;
  for (int64_t work = blockIdx.x; work < plan.blocks(); work += gridDim.x) {
    const OuterPlan::Block block = plan.block<TD>(work);
    T sum[RM / E][RN / E][E][E] = {};
    const auto add = [&](const S* panel_a, const S* panel_b) {
#pragma unroll 1
      for (int k = group * kNext; k < TN; k += kGroups * kNext) {
        T right[RN / E][E][kNext];
#pragma unroll
        for (int j = 0; j < RN / E; ++j) X::read(panel_b, n + j * kColumns * E, k, right[j]);
#pragma unroll
        for (int i = 0; i < RM / E; ++i) {
          T left[E][kNext];
          X::read(panel_a, m + i * kRows * E, k, left);
#pragma unroll
          for (int j = 0; j < RN / E; ++j)
#pragma unroll
            for (int e = 0; e < E; ++e)
#pragma unroll
              for (int f = 0; f < E; ++f)
#pragma unroll
                for (int l = 0; l < kNext; ++l) sum[i][j][e][f] += left[e][l] * right[j][f][l];
        }
      }
    };
    for_each_panel<X>(tiles, plan, block, a, b, panels, origins, add);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < RM; ++i)
#pragma unroll
      for (int j = 0; j < RN; ++j)
        sums[(group * TD + m + i / E * kRows * E + i % E) * TD + n + j / E * kColumns * E + j % E] =
            sum[i / E][j / E][i % E][j % E];
    __syncthreads();
    if constexpr (kGroups > 1) {
      for (int u = threadIdx.x; u < TD * TD; u += kPatchThreads)
        for (int g = 1; g < kGroups; ++g) sums[u] += sums[g * TD * TD + u];
      __syncthreads();
    }
    write_sums<TD, TD>(tiles, plan, block, sums, partial, out);
  }
}

// float16 and bfloat16, D = 16 K, side 1 or 2, on tensor cores. A lane reads the runs of 16 bytes
// of R patches side by side, each of one row of the image; they are the operands, for which patch
// is which column of a product, and which element which row, is chosen. Shared memory: the sums of
// each warp, added in order.
template <class S, int P, int K>
__global__ void __launch_bounds__(kPatchThreads, K == 1 ? 4 : 3)
    outer_rows(Tiles tiles, OuterPlan plan,
               const S* __restrict__ a,      // [B, C, H, W]
               const S* __restrict__ b,      // [B, C, H, W]
               float* __restrict__ partial,  // [outputs, splits, D, D]
               S* __restrict__ out) {        // [outputs, D, D]
  constexpr int D = 16 * K, R = PatchRuns<P>::R, kRuns = 2 * K / P, kWarps = kPatchThreads / kWarp;
  constexpr int kSteps = kRuns < 4 ? 4 / kRuns : 1;  // whose loads are on their way together
  __shared__ __align__(16) float sums[kWarps][D * D];
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  // element that is row g (h = 0) or g + 8 (1) of tile m of 16
  const auto element = [](int m, int h, int g) {
    return P == 1 ? m * 16 + h * 8 + g : m * 16 + g * 2 + h;
  };
  const auto load = [&](const S* x, int64_t origin, int64_t n, int64_t end,
                        Pack<S, 8>(&runs)[kRuns]) {
#pragma unroll
    for (int u = 0; u < kRuns; ++u) {
      const int row = u * 8 + g;
      const int64_t place = origin + tiles.patch(n < end ? n : 0);
      runs[u] = Pack<S, 8>::load(x + place + tiles.grid.row(row / P, row % P));
    }
  };
  // the patches 2 i, 2 i + 1 of the runs in that element
  const auto pair = [](const Pack<S, 8>(&runs)[kRuns], int m, int h, int i) {
    const S* const run = runs[P == 1 ? 2 * m + h : m].value + (P == 1 ? 0 : h);
    return word(run[2 * i * P], run[(2 * i + 1) * P]);
  };
  for (int64_t work = blockIdx.x; work < plan.blocks(); work += gridDim.x) {
    const OuterPlan::Block block = plan.block<D>(work);
    float sum[K][2 * K][4] = {};
    for (int64_t part = block.first; part < block.last; ++part) {
      const int64_t tile = plan.parts.quotient(part), origin = tiles.origin(tile);
      const int64_t n1 = (part - tile * plan.parts.divisor()) * plan.length;
      const int64_t n2 = min(tiles.patches, n1 + plan.length);
      for (int64_t n0 = n1 + warp * (4 * R * kSteps); n0 < n2; n0 += kWarps * 4 * R * kSteps) {
        Pack<S, 8> left[kSteps][kRuns], right[kSteps][kRuns];
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          load(a, origin, n0 + (i * 4 + t) * R, n2, left[i]);
          load(b, origin, n0 + (i * 4 + t) * R, n2, right[i]);
        }
        if (n0 + kSteps * 4 * R > n2) {  // the last ones: nothing beyond the end
#pragma unroll
          for (int i = 0; i < kSteps; ++i)
#pragma unroll
            for (int u = 0; u < kRuns; ++u)
              if (n0 + (i * 4 + t) * R >= n2) left[i][u] = right[i][u] = {};
        }
#pragma unroll
        for (int i = 0; i < kSteps; ++i)
#pragma unroll
          for (int k = 0; k < R / 4; ++k)
#pragma unroll
            for (int m = 0; m < K; ++m) {
              const unsigned rows[4] = {pair(left[i], m, 0, 2 * k), pair(left[i], m, 1, 2 * k),
                                        pair(left[i], m, 0, 2 * k + 1),
                                        pair(left[i], m, 1, 2 * k + 1)};
#pragma unroll
              for (int n = 0; n < 2 * K; ++n) {
                const unsigned columns[2] = {pair(right[i], n / 2, n % 2, 2 * k),
                                             pair(right[i], n / 2, n % 2, 2 * k + 1)};
                add_product<S>(rows, columns, sum[m][n]);
              }
            }
      }
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < K; ++m)
#pragma unroll
      for (int n = 0; n < 2 * K; ++n)
#pragma unroll
        for (int w = 0; w < 4; ++w)
          sums[warp][element(m, w / 2, g) * D + element(n / 2, n % 2, 2 * t + w % 2)] =
              sum[m][n][w];
    __syncthreads();
    for (int u = threadIdx.x; u < D * D; u += kPatchThreads)
      for (int w = 1; w < kWarps; ++w) sums[0][u] += sums[w][u];
    __syncthreads();
    write_sums<D, D>(tiles, plan, block, sums[0], partial, out);
  }
}

// float16 and bfloat16, D > 32: A B^T on tensor cores, 64 x 64 per block, 32 patches at a time.
// Shared memory: twice a panel of a and one of b, of which one pair is multiplied and the other on
// its way, then the sums in float32. A warp sums 32 x 32 products.
template <class S, int P, int V>
__global__ void __launch_bounds__(kPatchThreads, 4)
    outer_mma(Tiles tiles, OuterPlan plan,
              const S* __restrict__ a,      // [B, C, H, W]
              const S* __restrict__ b,      // [B, C, H, W]
              float* __restrict__ partial,  // [outputs, splits, D, D]
              S* __restrict__ out) {        // [outputs, D, D]
  constexpr int TD = 64, TN = 32, LD = TD + 4;
  using X = TensorPanel<S, P, V, TD, TN>;
  constexpr int kPanels = 4 * X::kElements * 2, kSums = TD * LD * 4;
  __shared__ __align__(128) unsigned char memory[kPanels > kSums ? kPanels : kSums];
  __shared__ int64_t origins[2][TN];
  S* const panels = reinterpret_cast<S*>(memory);
  float* const sums = reinterpret_cast<float*>(memory);
  for (int64_t work = blockIdx.x; work < plan.blocks(); work += gridDim.x) {
    const OuterPlan::Block block = plan.block<TD>(work);
    TensorTile<S> sum;
    const auto add = [&](const S* panel_a, const S* panel_b) {
      sum.template add<TN, X::kByPatch, !X::kByPatch>(panel_a, X::kRow, panel_b, X::kRow);
    };
    for_each_panel<X>(tiles, plan, block, a, b, panels, origins, add);
    __syncthreads();
    sum.store(sums, LD);
    __syncthreads();
    write_sums<TD, LD>(tiles, plan, block, sums, partial, out);
  }
}

// out[o][e] = sum over s of partial[o][s][e], for the n elements e of an output.
// Shared memory: 8 sums per element, added in order. Thread (g, i) sums the splits g, g + 8, ... of
// element i of 32.
template <class S>
__global__ void __launch_bounds__(256, 1)
    add_partial_sums(int64_t outputs, int64_t splits, int64_t n, Divider blocks,  // per output
                     const Accumulator<S>* __restrict__ partial,  // [outputs, splits, n]
                     S* __restrict__ out) {                       // [outputs, n]
  using T = Accumulator<S>;
  __shared__ T sums[8][kWarp];
  const int g = threadIdx.x / kWarp, i = threadIdx.x % kWarp;
  for (int64_t work = blockIdx.x; work < outputs * blocks.divisor(); work += gridDim.x) {
    const int64_t o = blocks.quotient(work), e = blocks.remainder(work) * kWarp + i;
    T sum = 0;
    if (e < n) {
#pragma unroll 4
      for (int64_t s = g; s < splits; s += 8) sum += partial[(o * splits + s) * n + e];
    }
    sums[g][i] = sum;
    __syncthreads();
    if (g == 0 && e < n) {
      for (int j = 1; j < 8; ++j) sum += sums[j][i];
      out[o * n + e] = convert<S>(sum);
    }
    __syncthreads();
  }
}

}  // namespace osf::cuda
