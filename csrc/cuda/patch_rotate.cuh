#pragma once
#include "patches.cuh"
#include "tensor_tile.cuh"

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
    __syncthreads();
    for (int u = threadIdx.x; u < D * D; u += kPatchThreads) {
      const int row = u / D, column = u % D;
      matrix[transposed ? column * LD + row : row * LD + column] = widen(q[tile * stride + u]);
    }
    __syncthreads();
    if (n >= tiles.patches) continue;
    const int64_t first = tiles.origin(tile) + tiles.patch(n);
    T patch[R][D];
#pragma unroll
    for (int row = 0; row < C * P; ++row)
#pragma unroll
      for (int e = 0; e < kRow; e += A) {
        const auto run = Pack<S, A>::load(x + first + tiles.grid.row(row / P, row % P) + e);
#pragma unroll
        for (int i = 0; i < A; ++i) patch[(e + i) / P][row * P + (e + i) % P] = widen(run.value[i]);
      }
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

// float16 and bfloat16, D >= 64: Z = Q X on tensor cores, 64 x 64 of it per block, k in steps
// of 32. Shared memory: Q as [m][k] and X as a panel [k][n], then Z in float32 as a panel [m][n]. A
// warp computes 32 x 32 of Z in 2 x 2 fragments.
template <class S, int P, int V>
__global__ void __launch_bounds__(kPatchThreads, 1)
    rotate_wmma(Tiles tiles, RotateBlocks<64, 64> blocks,
                const S* __restrict__ x,  // [B, C, H, W]
                const S* __restrict__ q,  // [tiles, D, D], `stride` elements apart
                int64_t stride, bool transposed,
                S* __restrict__ out) {  // [B, C, H, W]
  constexpr int TM = 64, TN = 64, TK = 32, LK = TK + 8, LN = TN + 8, LZ = TN + 4;
  constexpr int kPanels = (TM * LK + TK * LN) * 2, kResult = TM * LZ * 4;
  __shared__ __align__(128) unsigned char memory[kPanels > kResult ? kPanels : kResult];
  __shared__ int64_t origins[TN];
  S* const Q = reinterpret_cast<S*>(memory);
  S* const X = Q + TM * LK;
  float* const Z = reinterpret_cast<float*>(memory);
  for (int64_t work = blockIdx.x; work < blocks.count; work += gridDim.x) {
    const auto [tile, n0, m0] = blocks[work];
    const S* const matrix = q + tile * stride;
    locate<TN>(tiles, tiles.origin(tile), n0, origins);
    TensorTile<S> z;
    for (int64_t k0 = 0; k0 < tiles.D; k0 += TK) {
      __syncthreads();
      gather<P, V, TK, TN, LN>(tiles, origins, x, k0, X);
#pragma unroll 4
      for (int u = threadIdx.x; u < TM * TK; u += kPatchThreads) {
        const int k = transposed ? u / TM : u % TK, i = transposed ? u % TM : u / TK;
        const bool inside = k0 + k < tiles.D && m0 + i < tiles.D;
        const int64_t at = transposed ? (k0 + k) * tiles.D + m0 + i : (m0 + i) * tiles.D + k0 + k;
        Q[i * LK + k] = inside ? matrix[at] : convert<S>(0.f);
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < TK; k += 16) z.template add<false>(Q + k, LK, X + k * LN, LN);
    }
    __syncthreads();
    z.store(Z, LZ);
    __syncthreads();
    scatter<P, V, TM, TN, LZ>(tiles, origins, Z, m0, out);
    __syncthreads();
  }
}

}  // namespace osf::cuda
