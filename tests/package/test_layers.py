"""The layout: what lies at the top, and that the contracts on imports (lint-imports) are whole."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "assign", "distill", "download", "em", "evaluate", "lora", "optimize", "prefer", "reinforce",
    "sample", "scale", "sft", "study", "theory", "tiny", "toy",
}  # fmt: skip


def test_the_top_of_the_package_holds_commands_alone():
    files = {path.stem for path in (ROOT / "oneshot_fast").glob("*.py")}
    assert files == COMMANDS | {"__init__", "cli", "errors"}


def test_the_contracts_on_imports_have_no_exceptions():
    read = pytest.importorskip("importlinter.api").read_configuration
    found = read(str(ROOT / "pyproject.toml"))
    assert found["session_options"]["root_packages"] == ["oneshot_fast", "benchmarks"]
    by_name = {contract["name"]: contract for contract in found["contracts_options"]}
    assert {"oneshot_fast.**", "benchmarks.**"} <= set(
        by_name["no circles among files"]["ancestors"]
    )
    for contract in found["contracts_options"]:
        assert "ignore_imports" not in contract and "exhaustive_ignores" not in contract
        assert contract["type"] != "layers" or contract["exhaustive"]
