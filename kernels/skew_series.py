"""The series of skew_exp on chip: degrees, scaling and coefficients, for matrices and for tiles."""

import triton
import triton.language as tl

from oneshot_fast.kernels.skew_table import INVERSE_FACTORIALS

# exp(S) is its Taylor series up to S^12 while ||S||_2 <= THETA, see csrc/skew_table.h. Larger S are
# halved `squarings` times.
# Every squaring doubles the distance to orthogonality; after so many it is still a few ulp.
UNPOLISHED = tl.constexpr(2)
# More halvings than any generator with a meaningful phase needs.
MAX_SQUARINGS = tl.constexpr(100)


@triton.jit
def largest_column(m):
    """||M||_1, float32 scalar."""
    return tl.max(tl.sum(tl.abs(m), axis=0)).to(tl.float32)


@triton.jit
def norm_bound(norm1, norm2, norm3):
    """Bound of ||S||_2 from the 1-norms of S, S^2 and S^3.

    S is normal, so each of their roots is one. The margin covers the fast logarithm.
    """
    cube_root = tl.exp2(tl.log2(norm3) * (1.0 / 3.0))
    return 1.0001 * tl.minimum(norm1, tl.minimum(tl.sqrt(norm2), cube_root))


@triton.jit
def squarings_for(bound, THETA: tl.constexpr, MAX: tl.constexpr):
    """Smallest s >= 0 with bound / 2^s <= theta; not finite gives a result that is not finite."""
    ratio = bound / THETA
    ratio = tl.where(ratio > 1.0, ratio, 1.0)
    ratio = tl.where(ratio < 1e38, ratio, 1e38)
    return tl.minimum(tl.ceil(tl.log2(ratio)).to(tl.int32), MAX)


@triton.jit
def half_power(s):
    """2^-s, exact, float32."""
    return ((127 - s) << 23).to(tl.float32, bitcast=True)


@triton.jit
def identity(i, j, D, DTYPE: tl.constexpr):
    """The entries i [m], j [n] of the identity; zero in the padding."""
    return ((i[:, None] == j[None, :]) & (i[:, None] < D)).to(DTYPE)


@triton.jit
def quadratic(one, s, s2, FIRST: tl.constexpr):
    """Terms S^k / (FIRST + k)! for k = 0, 1, 2; exactly I at S = 0 for FIRST = 0."""
    return (
        one * INVERSE_FACTORIALS[FIRST]
        + s * INVERSE_FACTORIALS[FIRST + 1]
        + s2 * INVERSE_FACTORIALS[FIRST + 2]
    )


@triton.jit
def top_terms(one, s, s2, s3):
    """S^k / (9 + k)! for k = 0 .. 3, where Horner's scheme in S^3 starts."""
    return quadratic(one, s, s2, 9) + s3 * INVERSE_FACTORIALS[12]
