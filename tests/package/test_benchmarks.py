"""The op benchmarks: that they run, what they write, and that they refuse ops whose tests fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def bench(*flags):
    command = [
        sys.executable,
        str(BENCHMARKS / "bench_ops.py"),
        "--device",
        "cpu",
        *map(str, flags),
    ]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_a_short_run(tmp_path):
    output, picture = tmp_path / "ops-here.json", tmp_path / "ops.png"
    few = ["--ops", "latent_mse", "--threads", 1, "--seconds", 0.01, "--compile", "none"]
    ended = bench(*few, "--output", output)
    assert ended.returncode == 0, ended.stderr
    results = json.loads(output.read_text())
    assert {record["pass"] for record in results["records"]} == {"forward", "both"}
    for record in results["records"]:
        assert set(record["microseconds"]) == {"ours", "eager", "clone"}
        assert all(0 < low <= mid <= high for low, mid, high in record["microseconds"].values())
    for key in ("device", "commit", "date", "seed", "build"):
        assert results[key] is not None or key == "commit"
    rows = [r for r in output.with_suffix(".md").read_text().splitlines() if "latent_mse" in r]
    assert len(rows) == len(results["records"])

    import plot_ops

    assert plot_ops.main([str(output), "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_ops_with_failing_or_missing_tests_are_refused(tmp_path):
    from compare import judge

    report = tmp_path / "report.xml"
    report.write_text(
        """<testsuites><testsuite>
        <testcase name="test_value[cpu-patch_rotate-((1, 1), 2)-x]"/>
        <testcase name="test_value[cpu-patch_rotate-((2, 1), 2)-x]"><failure/></testcase>
        <testcase name="test_value[cpu-skew_exp-((2, 2),)-x]"/>
        <testcase name="test_value[cuda-pixel_l1-((2, 2),)-x]"><skipped/></testcase>
        </testsuite></testsuites>"""
    )
    failing = judge(["patch_rotate", "skew_exp", "pixel_l1"], report)
    assert set(failing) == {"patch_rotate", "pixel_l1"}
    assert "((2, 1), 2)" in failing["patch_rotate"]


def test_columns_of_a_gpu():
    """By arithmetic: half of the copy bandwidth is reached, and the launch allows no more."""
    from results import columns

    times = {"triton": 10.0, "eager": 40.0, "clone": 5.0}
    record = {
        "op": "patch_rotate",
        "bytes": 10_000_000,
        "microseconds": {name: [t, t, t] for name, t in times.items()},
        "wall_microseconds": {name: [3 * t] * 3 for name, t in times.items()},
        "peak_bytes": dict.fromkeys(times, 2**20),
    }
    results = {"copy_bandwidth": 2e12, "launch": 2.0, "ours": {"patch_rotate": "triton"}}
    found = columns(record, results)
    assert found["eager"] == "4.00" and found["clone"] == "0.50" and found["compile"] == "-"
    assert found["of copy"] == "50%" and found["of floor"] == "50%"
    assert found["cuda, us"] == "-" and found["triton, us"] == "10.00" and found["MiB"] == "1.0"
