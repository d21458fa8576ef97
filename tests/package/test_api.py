"""The names of ``import oneshot_fast as osf``: all there, documented, and cheap to import."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import oneshot_fast as osf

ROOT = Path(__file__).parents[2]


def test_lazy_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse((ROOT / "oneshot_fast" / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    lazy = {name: f"oneshot_fast.{module}" for name, module in osf._LAZY.items()}
    eager = {"Any", "TYPE_CHECKING", "RotationAdam", "_C", "ops"}
    assert {name: seen[name] for name in seen.keys() - eager} == lazy
    assert {*osf._LAZY, "ops", "build_info"} <= set(dir(osf))


@pytest.mark.parametrize("name", osf._LAZY)
def test_every_name_is_documented(name: str) -> None:
    found = getattr(osf, name)
    assert found.__module__.startswith("oneshot_fast.")
    documentation = inspect.getdoc(found) or ""
    assert documentation
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")  # its code is run by a test
    assert f"osf.{name}" in "".join(re.findall(r"```python\n(.*?)```", page, re.S))
    if inspect.isfunction(found):
        assert "Raises:" in documentation


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        osf.absent  # noqa: B018


def test_importing_the_package_is_cheap() -> None:
    code = (
        "import sys, time, torch; start = time.perf_counter(); import oneshot_fast as osf;"
        "print(time.perf_counter() - start, dir(osf) and"
        " {'diffusers', 'transformers', 'accelerate', 'matplotlib', 'PIL', 'tyro', 'triton'}"
        " & set(sys.modules))"
    )
    for _ in range(3):  # other processes may slow one down
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds, loaded = ended.stdout.strip().split(maxsplit=1)
        assert loaded == "set()"
        if float(seconds) < 0.3:
            break
    assert float(seconds) < 0.3
