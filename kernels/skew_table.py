"""Written by tools/series_table.py from csrc/skew_table.h."""

import triton.language as tl

THETA32 = tl.constexpr(1.576)
THETA64 = tl.constexpr(0.337)
# 1 / n!
INVERSE_FACTORIALS = tl.constexpr(
    (
        1 / 1,
        1 / 1,
        1 / 2,
        1 / 6,
        1 / 24,
        1 / 120,
        1 / 720,
        1 / 5040,
        1 / 40320,
        1 / 362880,
        1 / 3628800,
        1 / 39916800,
        1 / 479001600,
    )
)
