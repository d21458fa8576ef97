#pragma once
#include "patches.cuh"
#include "tensor_tile.cuh"
#include "warp_product.cuh"

// The kernels of patch_rotate, z = q x on every patch x of a tile. q[i][k] is q.data[i D + k], or
// data[k D + i] if the memory holds q^T.
namespace osf::cuda {

// Small D, known C and P: z[i] = sum over k of q[i][k] x[k].
// Shared memory: q as it multiplies, rows padded to 16 bytes more. A thread keeps R patches side by
// side in registers, reads and writes every image row of them in accesses of A elements, and reads
// each element of q, the same for the whole warp, once for the R patches.
template <class S, int P, int C, int R, int A>
__global__ void __launch_bounds__(kPatchThreads, 1)
    rotate_registers(Tiles tiles, Divider blocks,  // per tile
                     const S* __restrict__ x,      // [B, C, H, W]
                     const S* __restrict__ q,      // [tiles, D, D], `stride` elements apart
                     int64_t stride, bool transposed,
                     S* __restrict__ out) {  // [B, C, H, W]
  using T = Accumulator<S>;
  constexpr int D = C * P * P, LD = D + kWide<T>, kRow = R * P;
  __shared__ __align__(16) T matrix[D * LD];
  for (int64_t work = blockIdx.x; work < tiles.count * blocks.divisor(); work += gridDim.x) {
    const int64_t tile = blocks.quotient(work);
    const int64_t n = (blocks.remainder(work) * kPatchThreads + threadIdx.x) * R;
    const bool inside = n < tiles.patches;
    const int64_t first = tiles.origin(tile) + tiles.patch(inside ? n : 0);
    // on their way from device memory while q is staged
    Pack<S, A> runs[C * P][kRow / A];
#pragma unroll
    for (int row = 0; row < C * P; ++row)
#pragma unroll
      for (int e = 0; e < kRow / A; ++e)
        runs[row][e] = Pack<S, A>::load(x + first + tiles.grid.row(row / P, row % P) + e * A);
    __syncthreads();
    for (int u = threadIdx.x; u < D * D; u += kPatchThreads) {
      const int row = u / D, column = u % D;
      matrix[transposed ? column * LD + row : row * LD + column] = widen(q[tile * stride + u]);
    }
    __syncthreads();
    if (!inside) continue;
    T patch[R][D];
#pragma unroll
    for (int row = 0; row < C * P; ++row)
#pragma unroll
      for (int e = 0; e < kRow; ++e)
        patch[e / P][row * P + e % P] = widen(runs[row][e / A].value[e % A]);
#pragma unroll 1
    for (int row = 0; row < C * P; ++row) {
      T z[kRow] = {};
#pragma unroll
      for (int k = 0; k < D; k += kWide<T>)
#pragma unroll
        for (int j = 0; j < P; ++j) {
          const auto part = Pack<T, kWide<T>>::load(matrix + (row * P + j) * LD + k);
#pragma unroll
          for (int i = 0; i < kWide<T>; ++i)
#pragma unroll
            for (int r = 0; r < R; ++r) z[r * P + j] += part.value[i] * patch[r][k + i];
        }
#pragma unroll
      for (int e = 0; e < kRow; e += A) {
        Pack<S, A> run;
#pragma unroll
        for (int i = 0; i < A; ++i) run.value[i] = convert<S>(z[e + i]);
        run.store(out + first + tiles.grid.row(row / P, row % P) + e);
      }
    }
  }
}

// float16 and bfloat16, D = 16 K, side 1, 2 or 4, on tensor cores: Z^T = X^T Q^T with a patch per
// row. A lane holds R patches side by side in runs of 16 bytes, each of one row of the image; which
// patch is which row of a product, and which element which column, is chosen such that the runs are
// the operands, so x and z pass through no shared memory. A warp takes G such groups of 8 R
// patches.
template <class S, int P, int K>
struct RowsOfPatches {
  static constexpr int R = PatchRuns<P>::R, kRuns = 4 * K / P;
  static constexpr int G = kRuns < 4 ? 4 / kRuns : 1, kPatches = kPatchThreads / 4 * R * G;
};
template <class S, int P, int K>
__global__ void __launch_bounds__(kPatchThreads, 1)
    rotate_rows(Tiles tiles, Divider blocks,  // per tile
                const S* __restrict__ x,      // [B, C, H, W]
                const S* __restrict__ q,      // [tiles, D, D], `stride` elements apart
                int64_t stride, bool transposed,
                S* __restrict__ out) {  // [B, C, H, W]
  using Rows = RowsOfPatches<S, P, K>;
  constexpr int D = 16 * K, R = Rows::R, G = Rows::G, kRuns = Rows::kRuns, kPairs = 2 * K;
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  // first of the elements 2 t, 2 t + 1 of pair j of columns
  const auto element = [](int j, int t) {
    return P == 4 ? j / 2 * 16 + t * 4 + j % 2 * 2 : j * 8 + t * 2;
  };
  // place of element e of run u in the pairs of a patch
  const auto pair = [](int u, int e) { return P == 1 ? u / 2 : u * (P / 2) + e % P / 2; };
  const auto half = [](int u, int e) { return P == 1 ? u % 2 : e % 2; };
  const auto row = [&](int u) {
    const int r = P == 1 ? u / 2 * 8 + t * 2 + u % 2 : u * 4 + t;
    return tiles.grid.row(r / P, r % P);
  };
  for (int64_t work = blockIdx.x; work < tiles.count * blocks.divisor(); work += gridDim.x) {
    const int64_t tile = blocks.quotient(work), origin = tiles.origin(tile);
    const int64_t n0 = blocks.remainder(work) * Rows::kPatches + warp * (8 * R * G) + g * R;
    Pack<S, 8> runs[G][kRuns];
    int64_t places[G];
#pragma unroll
    for (int i = 0; i < G; ++i) {
      const int64_t n = n0 + i * 8 * R;  // beyond the last patch any other is read, none written
      places[i] = origin + tiles.patch(n < tiles.patches ? n : 0);
#pragma unroll
      for (int u = 0; u < kRuns; ++u) runs[i][u] = Pack<S, 8>::load(x + places[i] + row(u));
    }
    const S* const matrix = q + tile * stride;
    unsigned right[kPairs][K][2];
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        const int m = element(j, g / 2) + g % 2, d = element(k, t);
        const S* const at = matrix + (transposed ? d * D + m : m * D + d);
        right[j][k / 2][k % 2] = word(at[0], at[transposed ? D : 1]);
      }
#pragma unroll
    for (int i = 0; i < G; ++i) {
      S left[R][kPairs][2], z[R][kPairs][2];
#pragma unroll
      for (int u = 0; u < kRuns; ++u)
#pragma unroll
        for (int e = 0; e < 8; ++e) left[e / P][pair(u, e)][half(u, e)] = runs[i][u].value[e];
#pragma unroll
      for (int r = 0; r < R; r += 2)
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          float sum[4] = {};
#pragma unroll
          for (int k = 0; k < K; ++k) {
            unsigned a[4];
#pragma unroll
            for (int w = 0; w < 4; ++w) {
              const S(&both)[2] = left[r + w % 2][2 * k + w / 2];
              a[w] = word(both[0], both[1]);
            }
            add_product<S>(a, right[j][k], sum);
          }
#pragma unroll
          for (int w = 0; w < 4; ++w) z[r + w / 2][j][w % 2] = convert<S>(sum[w]);
        }
      if (n0 + i * 8 * R >= tiles.patches) continue;
#pragma unroll
      for (int u = 0; u < kRuns; ++u) {
        Pack<S, 8> run;
#pragma unroll
        for (int e = 0; e < 8; ++e) run.value[e] = z[e / P][pair(u, e)][half(u, e)];
        run.store(out + places[i] + row(u));
      }
    }
  }
}

// The work of the tiled kernels, TM elements of TN patches of one tile per block.
template <int TM, int TN>
struct RotateBlocks {
  Divider across, down;  // blocks along the patches and along the elements of a tile
  int64_t count;

  explicit RotateBlocks(const Tiles& tiles)
      : across(ceil_div(tiles.patches, TN)),
        down(ceil_div(tiles.D, TM)),
        count(tiles.count * across.divisor() * down.divisor()) {}
  struct Block {
    int64_t tile, n0, m0;
  };
  OSF_HD Block operator[](int64_t work) const {
    const int64_t i = down.quotient(work), tile = across.quotient(i);
    return {tile, (i - tile * across.divisor()) * TN, (work - i * down.divisor()) * TM};
  }
};

// Any D: Z = Q X, TM x TN of it per block, k in steps of 16.
// Shared memory: Q transposed to [k][m] and X as a panel [k][n], then Z as a panel [m][n]. A thread
// computes RM x RN of Z from RM + RN elements per k.
template <class S, int P, int V, int TM, int TN, int RM, int RN>
__global__ void __launch_bounds__(kPatchThreads, 1)
    rotate_tiled(Tiles tiles, RotateBlocks<TM, TN> blocks,
                 const S* __restrict__ x,  // [B, C, H, W]
                 const S* __restrict__ q,  // [tiles, D, D], `stride` elements apart
                 int64_t stride, bool transposed,
                 S* __restrict__ out) {  // [B, C, H, W]
  using T = Accumulator<S>;
  constexpr int TK = 16, LM = TM + kWide<T>, LN = TN + kWide<T>;
  static_assert(TM / RM * (TN / RN) == kPatchThreads);
  constexpr int kPanels = TK * LM + TK * LN, kResult = TM * LN;
  __shared__ __align__(16) T memory[kPanels > kResult ? kPanels : kResult];
  __shared__ int64_t origins[TN];
  T* const Q = memory;
  T* const X = memory + TK * LM;
  const int m = threadIdx.x / (TN / RN) * RM, n = threadIdx.x % (TN / RN) * RN;
  for (int64_t work = blockIdx.x; work < blocks.count; work += gridDim.x) {
    const auto [tile, n0, m0] = blocks[work];
    const S* const matrix = q + tile * stride;
    locate<TN>(tiles, tiles.origin(tile), n0, origins);
    T z[RM][RN] = {};
    for (int64_t k0 = 0; k0 < tiles.D; k0 += TK) {
      __syncthreads();
      gather<P, V, TK, TN, LN>(tiles, origins, x, k0, X);
#pragma unroll 4
      for (int u = threadIdx.x; u < TK * TM; u += kPatchThreads) {
        const int k = transposed ? u / TM : u % TK, i = transposed ? u % TM : u / TK;
        const bool inside = k0 + k < tiles.D && m0 + i < tiles.D;
        const int64_t at = transposed ? (k0 + k) * tiles.D + m0 + i : (m0 + i) * tiles.D + k0 + k;
        Q[k * LM + i] = inside ? widen(matrix[at]) : T(0);
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < TK; ++k) {
        T left[RM], right[RN];
        read_run(Q + k * LM + m, left);
        read_run(X + k * LN + n, right);
#pragma unroll
        for (int i = 0; i < RM; ++i)
#pragma unroll
          for (int j = 0; j < RN; ++j) z[i][j] += left[i] * right[j];
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < RM; ++i) write_run(z[i], memory + (m + i) * LN + n);
    __syncthreads();
    scatter<P, V, TM, TN, LN>(tiles, origins, memory, m0, out);
    __syncthreads();
  }
}

// float16 and bfloat16, D > 32: Z = Q X on tensor cores, 64 x 64 of it per block, k in steps of 32.
// Shared memory: twice Q as it lies in device memory and X as a panel, of which one is multiplied
// and the other on its way, then Z in float32 as a panel [m][n]. A warp computes 32 x 32 of Z.
// `wide`: the rows of q are aligned to 16 bytes.
template <class S, int P, int V>
__global__ void __launch_bounds__(kPatchThreads, 4)
    rotate_mma(Tiles tiles, RotateBlocks<64, 64> blocks,
               const S* __restrict__ x,  // [B, C, H, W]
               const S* __restrict__ q,  // [tiles, D, D], `stride` elements apart
               int64_t stride, bool transposed, bool wide,
               S* __restrict__ out) {  // [B, C, H, W]
  constexpr int TM = 64, TN = 64, TK = 32, LM = TM + 8, LK = TK + 8, LZ = TN + 4;
  using X = TensorPanel<S, P, V, TK, TN>;
  constexpr int kMatrix = TM * LK > TK * LM ? TM * LK : TK * LM, kStage = kMatrix + X::kElements;
  constexpr int kPanels = 2 * kStage * 2, kResult = TM * LZ * 4;
  __shared__ __align__(128) unsigned char memory[kPanels > kResult ? kPanels : kResult];
  __shared__ int64_t origins[TN];
  S* const panels = reinterpret_cast<S*>(memory);
  float* const Z = reinterpret_cast<float*>(memory);
  for (int64_t work = blockIdx.x; work < blocks.count; work += gridDim.x) {
    const auto [tile, n0, m0] = blocks[work];
    const S* const matrix = q + tile * stride;
    const auto fetch_matrix = [&]<int N>(int64_t k0, S* Q) {
#pragma unroll 2
      for (int u = threadIdx.x * N; u < TM * TK; u += kPatchThreads * N) {
        const int row = transposed ? u / TM : u / TK, column = transposed ? u % TM : u % TK;
        const int64_t i = (transposed ? k0 : m0) + row, j = (transposed ? m0 : k0) + column;
        copy_async<N>(matrix + i * tiles.D + j, i < tiles.D && j < tiles.D,
                      Q + row * (transposed ? LM : LK) + column);
      }
    };
    const auto fetch = [&](int64_t k0, S* stage) {
      X::fetch(tiles, origins, x, k0, stage + kMatrix);
      if (wide)
        fetch_matrix.template operator()<8>(k0, stage);
      else
        fetch_matrix.template operator()<1>(k0, stage);
    };
    locate<TN>(tiles, tiles.origin(tile), n0, origins);
    __syncthreads();
    fetch(0, panels);
    TensorTile<S> z;
    int stage = 0;
    for (int64_t k0 = 0; k0 < tiles.D; k0 += TK, stage = kStage - stage) {
      wait_for_copies();
      __syncthreads();
      if (k0 + TK < tiles.D) fetch(k0 + TK, panels + kStage - stage);
      const S* const Q = panels + stage;
      if (transposed)
        z.template add<TK, true, X::kByPatch>(Q, LM, Q + kMatrix, X::kRow);
      else
        z.template add<TK, false, X::kByPatch>(Q, LK, Q + kMatrix, X::kRow);
    }
    __syncthreads();
    z.store(Z, LZ);
    __syncthreads();
    scatter<P, V, TM, TN, LZ>(tiles, origins, Z, m0, out);
    __syncthreads();
  }
}

}  // namespace osf::cuda
