"""The op benchmarks: that they run, what they write, and that they refuse ops whose tests fail."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks
import oneshot_fast
from benchmarks.jobs import time_to_loss
from benchmarks.ops import plot
from benchmarks.ops.compare import judge
from benchmarks.ops.results import columns

ROOT = Path(__file__).parents[2]


def test_every_script_imports_what_there_is():
    found = [module.name for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")]
    assert len([importlib.import_module(name) for name in found]) > 20


@pytest.mark.slow
@pytest.mark.usefixtures("plots")
def test_a_short_run(tmp_path):
    output, picture = tmp_path / "ops-here.json", tmp_path / "ops.png"
    few = ["--ops", "latent_mse", "--threads", 1, "--seconds", 0.01, "--compile", "none"]
    command = [sys.executable, "-m", "benchmarks.ops.bench", "--device", "cpu", *map(str, few)]
    ended = subprocess.run([*command, "--output", output], cwd=ROOT, capture_output=True, text=True)
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

    assert plot.main([str(output), "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_variants_of_a_case_are_one_group_of_pytest_benchmark(tmp_path):
    command = [sys.executable, "-m", "pytest", "benchmarks/ops", "-p", "no:cacheprovider"]
    command += ["-k", "latent_mse and forward and not compile", "--benchmark-only"]
    command += ["--benchmark-max-time", "0.01", "--benchmark-json", tmp_path / "speed.json"]
    # it measures nothing in a worker of xdist, as which it would take itself
    here = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    ended = subprocess.run(command, cwd=ROOT, env=here, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
    results = json.loads((tmp_path / "speed.json").read_text())
    groups = {}
    for row in results["benchmarks"]:
        assert row["stats"]["median"] > 0
        groups.setdefault(row["group"], []).append(row["params"]["name"])
    assert list(groups.values()) == 2 * [["ours", "eager"]]
    assert results["machine_info"]["oneshot_fast"]["build"] == oneshot_fast.build_info()


def test_ops_with_failing_or_missing_tests_are_refused(tmp_path):
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


@pytest.mark.slow
def test_time_to_equal_loss(tmp_path):
    output = tmp_path / "found.json"
    short = ["--targets", "2", "--steps", "2", "--rounds", "1", "--output", str(output)]
    assert time_to_loss.main(short) == 0
    results = json.loads(output.read_text())["results"]
    for row in results["rows"].values():
        assert row["loss"] == results["lr"][str(row["lr"])]
        assert "faster" not in row or row["ours_loss"] <= row["loss"]
    assert output.with_suffix(".md").read_text().count("learning rate") == 2
