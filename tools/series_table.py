"""Write Triton's table of the series of exp(S), kernels/skew_table.py, from csrc/skew_table.h."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER, TABLE = ROOT / "csrc" / "skew_table.h", ROOT / "kernels" / "skew_table.py"
NUMBER = r"[\d.e+-]+"
# Triton's series, up to S^12
POWERS, LEVELS = 3, 2


def table() -> str:
    """The text of the table."""
    header = HEADER.read_text()
    scheme = rf"\{{{POWERS}, {LEVELS}, \d+, ({NUMBER}), ({NUMBER})\}}"
    found = re.search(scheme, header)
    assert found, f"{HEADER} has no scheme of {POWERS} powers in {LEVELS} levels"
    factorials = re.findall(r"T\(1\.(?: / (\d+))?\)", header)
    lines = [
        f'"""Written by tools/{Path(__file__).name} from csrc/{HEADER.name}."""',
        "",
        "import triton.language as tl",
        "",
        f"THETA32 = tl.constexpr({float(found[1])})",
        f"THETA64 = tl.constexpr({float(found[2])})",
    ]
    degree = 2 * POWERS * LEVELS
    lines += ["# 1 / n!", "INVERSE_FACTORIALS = tl.constexpr(", "    ("]
    lines += [f"        1 / {value or 1}," for value in factorials[: degree + 1]]
    return "\n".join([*lines, "    )", ")"]) + "\n"


def main() -> int:
    """Write it."""
    TABLE.write_text(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
