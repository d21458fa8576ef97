"""Times, counts and bytes as people say them."""


def duration(seconds: float) -> str:
    """A time in two or three digits, as people say it."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    for unit, length, limit in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 72)):
        if seconds < limit * length:
            value = seconds / length
            return f"{value:.{1 if value < 10 else 0}f} {unit}"
    return f"{seconds / 86400:.1f} days"


def decimals(value: float | None) -> str:
    """A number with four decimals; None is what JSON has in place of NaN and infinities."""
    return "not finite" if value is None else f"{value:.4f}"


def count_text(value: int) -> str:
    """A large number as people say it."""
    return f"{value / 1e6:.1f} million" if value >= 1e6 else f"{value / 1e3:.1f} thousand"


def size_text(value: int) -> str:
    """Bytes as people say them."""
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= length:
            return f"{value / length:.{1 if value < 100 * length else 0}f} {unit}"
    return f"{value} bytes"
