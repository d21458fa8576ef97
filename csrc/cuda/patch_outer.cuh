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

// Walks over the panels of TN patches of the parts [first, last) and calls f, after a barrier, when
// `origins` holds the offsets of the next panel. Every thread of the block takes part; f has to
// synchronise after its last use of `origins`.
template <int TN, class F>
__device__ __forceinline__ void for_each_panel(const Tiles& tiles, const OuterPlan& plan,
                                               const OuterPlan::Block& block, int64_t* origins,
                                               F f) {
  for (int64_t part = block.first; part < block.last; ++part) {
    const int64_t tile = plan.parts.quotient(part);
    const int64_t n1 = (part - tile * plan.parts.divisor()) * plan.length;
    const int64_t n2 = min(tiles.patches, n1 + plan.length), origin = tiles.origin(tile);
    for (int64_t n0 = n1; n0 < n2; n0 += TN) {
      locate<TN>(tiles, origin, n0, origins);
      __syncthreads();
      f();
    }
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

// Any D: TD x TD of A B^T per block, TN patches at a time.
// Shared memory: a panel [d][n] of a and one of b, then the sums. The threads form groups that
// share the patches of a panel; a thread sums RM x RN products, of rows far apart so that
// neighbours read neighbouring rows, which lie in different banks.
template <class S, int P, int V, int TD, int RM, int RN, int TN>
__global__ void __launch_bounds__(kPatchThreads, 1)
    outer_tiled(Tiles tiles, OuterPlan plan,
                const S* __restrict__ a,               // [B, C, H, W]
                const S* __restrict__ b,               // [B, C, H, W]
                Accumulator<S>* __restrict__ partial,  // [outputs, splits, D, D]
                S* __restrict__ out) {                 // [outputs, D, D]
  using T = Accumulator<S>;
  constexpr int LN = TN + kWide<T>, kRows = TD / RM, kColumns = TD / RN;
  constexpr int kGroups = kPatchThreads / (kRows * kColumns);
  constexpr int kPanels = 2 * TD * LN, kSums = kGroups * TD * TD;
  __shared__ __align__(16) T memory[kPanels > kSums ? kPanels : kSums];
  __shared__ int64_t origins[TN];
  T* const A = memory;
  T* const B = memory + TD * LN;
  const int group = threadIdx.x / (kRows * kColumns), place = threadIdx.x % (kRows * kColumns);
  const int m = place / kColumns, n = place % kColumns;
  for (int64_t work = blockIdx.x; work < plan.blocks(); work += gridDim.x) {
    const OuterPlan::Block block = plan.block<TD>(work);
    T sum[RM][RN] = {};
    for_each_panel<TN>(tiles, plan, block, origins, [&] {
      gather<P, V, TD, TN, LN>(tiles, origins, a, block.m0, A);
      gather<P, V, TD, TN, LN>(tiles, origins, b, block.n0, B);
      __syncthreads();
#pragma unroll 2
      for (int k = group * kWide<T>; k < TN; k += kGroups * kWide<T>) {
        Pack<T, kWide<T>> right[RN];
#pragma unroll
        for (int j = 0; j < RN; ++j)
          right[j] = Pack<T, kWide<T>>::load(B + (n + j * kColumns) * LN + k);
#pragma unroll
        for (int i = 0; i < RM; ++i) {
          const auto left = Pack<T, kWide<T>>::load(A + (m + i * kRows) * LN + k);
#pragma unroll
          for (int j = 0; j < RN; ++j)
#pragma unroll
            for (int e = 0; e < kWide<T>; ++e) sum[i][j] += left.value[e] * right[j].value[e];
        }
      }
    });
    __syncthreads();
#pragma unroll
    for (int i = 0; i < RM; ++i)
#pragma unroll
      for (int j = 0; j < RN; ++j)
        memory[(group * TD + m + i * kRows) * TD + n + j * kColumns] = sum[i][j];
    __syncthreads();
    if constexpr (kGroups > 1) {
      for (int u = threadIdx.x; u < TD * TD; u += kPatchThreads)
        for (int g = 1; g < kGroups; ++g) memory[u] += memory[g * TD * TD + u];
      __syncthreads();
    }
    write_sums<TD, TD>(tiles, plan, block, memory, partial, out);
  }
}

// float16 and bfloat16, D = 16 K, side 1 or 2, on tensor cores. A lane reads the runs of 16 bytes
// of R patches side by side, each of one row of the image; they are the operands, for which patch
// is which column of a product, and which element which row, is chosen. Shared memory: the sums of
// each warp, added in order.
template <class S, int P, int K>
__global__ void __launch_bounds__(kPatchThreads, 1)
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

// float16 and bfloat16, D >= 64: A B^T on tensor cores, 64 x 64 per block, 64 patches at a time.
// Shared memory: a panel [d][n] of a and one of b, then the sums in float32. A warp sums 32 x 32
// products in 2 x 2 fragments; the panel of b is B^T by columns.
template <class S, int P, int V>
__global__ void __launch_bounds__(kPatchThreads, 1)
    outer_wmma(Tiles tiles, OuterPlan plan,
               const S* __restrict__ a,      // [B, C, H, W]
               const S* __restrict__ b,      // [B, C, H, W]
               float* __restrict__ partial,  // [outputs, splits, D, D]
               S* __restrict__ out) {        // [outputs, D, D]
  constexpr int TD = 64, TN = 64, LN = TN + 8, LD = TD + 4;
  constexpr int kPanels = 2 * TD * LN * 2, kSums = TD * LD * 4;
  __shared__ __align__(128) unsigned char memory[kPanels > kSums ? kPanels : kSums];
  __shared__ int64_t origins[TN];
  S* const A = reinterpret_cast<S*>(memory);
  S* const B = A + TD * LN;
  float* const sums = reinterpret_cast<float*>(memory);
  for (int64_t work = blockIdx.x; work < plan.blocks(); work += gridDim.x) {
    const OuterPlan::Block block = plan.block<TD>(work);
    TensorTile<S> sum;
    for_each_panel<TN>(tiles, plan, block, origins, [&] {
      gather<P, V, TD, TN, LN>(tiles, origins, a, block.m0, A);
      gather<P, V, TD, TN, LN>(tiles, origins, b, block.n0, B);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < TN; k += 16) sum.template add<true>(A + k, LN, B + k, LN);
    });
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
