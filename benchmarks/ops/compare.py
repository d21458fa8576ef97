"""Before and beside the measurements: the ops' tests, and the package at another commit."""

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import ROOT
from benchmarks.ops.results import OURS, labels

TESTS = [ROOT / "tests" / "ops" / name for name in ("test_ops.py", "test_rotation_step.py")]


def failing_ops(names: list[str], device: str) -> dict[str, str]:
    """Ops whose tests of values and gradients fail, and why; none of them may be reported.

    The tests are those of contiguous float32 tensors.
    """
    backends = "cpu" if device == "cpu" else "(cuda or triton)"
    chosen = f"(test_value_and_gradients or test_values) and contiguous and float32 and {backends}"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider"]
        command += [*map(str, TESTS), "-k", f"{chosen} and ({' or '.join(names)})"]
        ended = subprocess.run(
            [*command, f"--junit-xml={report}"], cwd=ROOT, capture_output=True, text=True
        )
        if not report.exists():
            why = f"its tests do not run: {(ended.stdout + ended.stderr).strip()[-500:]}"
            return dict.fromkeys(names, why)
        return judge(names, report)


def judge(names: list[str], report: Path) -> dict[str, str]:
    """Read pytest's report: why each op of ``names`` that did not pass did not."""
    failing: dict[str, str] = {}
    passed: set[str] = set()
    for case in ElementTree.parse(report).iter("testcase"):
        test = case.get("name", "")
        tags = {child.tag for child in case}
        for name in names:
            of_it = case.get("classname", "").endswith(f"test_{name}")
            if not (of_it or f"-{name}-" in test):
                continue
            if tags & {"failure", "error"}:
                failing.setdefault(name, f"{test} fails")
            elif "skipped" not in tags:
                passed.add(name)
    none = {name: "no test of it ran" for name in names if name not in passed | failing.keys()}
    return failing | none


@contextmanager
def built(revision: str) -> Iterator[Path]:
    """A checkout of ``revision`` in a temporary folder, its extension built in place."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            subprocess.run(build, cwd=tree, check=True, stdout=subprocess.DEVNULL)
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def measure(tree: Path, config: Any, output: Path) -> list[dict[str, Any]]:
    """Records of this benchmark in a process that imports the package from ``tree``.

    It runs in the folder of ``output``, which has these benchmarks and no package.
    """
    folder = output.parent
    if not (folder / "benchmarks").exists():
        (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    flags = [*("--ops", *config.ops), "--device", config.device, "--no-tests"]
    flags += ["--seconds", str(config.seconds / config.rounds), "--compile", "none"]
    flags += ["--budget", str(config.budget / config.rounds / 2), "--cases", config.cases]
    flags += ["--threads", *map(str, config.threads), "--seed", str(config.seed)]
    flags += ["--dtypes", *config.dtypes] if config.dtypes else []
    env = {**os.environ, "PYTHONPATH": str(tree)}
    where = [sys.executable, "-c", "import oneshot_fast; print(oneshot_fast.__file__)"]
    package = subprocess.check_output(where, cwd=folder, env=env, text=True).strip()
    if not Path(package).resolve().is_relative_to(tree.resolve()):
        raise RuntimeError(f"this would measure {package} instead of {tree}")
    subprocess.run(
        [sys.executable, "-m", "benchmarks.ops.bench", *flags, "--output", str(output)],
        cwd=folder,
        env=env,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return json.loads(output.read_text())["records"]


def compare(config: Any, revision: str) -> None:
    """Measure this commit and ``revision`` in turn; print our times and their ratios."""
    runs: dict[str, list[list[dict[str, Any]]]] = {"current": [], "base": []}
    with built(revision) as base, tempfile.TemporaryDirectory() as folder:
        for i in range(config.rounds):
            for name, tree in (("current", ROOT), ("base", base)):
                print(f"round {i + 1} of {config.rounds}: {name}", flush=True)
                runs[name].append(measure(tree, config, Path(folder) / f"{name}{i}.json"))
    current, before = (ours_by_case(runs[name]) for name in ("current", "base"))
    print(f"{'case':<64}{'now, us':>10}{'base, us':>10}{'base/now':>10}")
    for case, times in current.items():
        for variant, now in times.items():
            there = before.get(case, {})
            then = there.get(variant, there.get("ours"))
            shown = f"{then:>10.1f}{then / now:>10.2f}" if then else f"{'-':>10}{'-':>10}"
            print(f"{case + ' ' + variant:<64}{now:>10.1f}{shown}")


def ours_by_case(rounds: list[list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds of our variants' medians, in microseconds, by case."""
    times: dict[str, dict[str, list[float]]] = {}
    for record in (record for records in rounds for record in records):
        case = " ".join([record["op"], record["case"], *labels(record).values()])
        for variant in OURS:
            if variant in record["microseconds"]:
                found = times.setdefault(case, {}).setdefault(variant, [])
                found.append(record["microseconds"][variant][1])
    return {case: {v: median(found) for v, found in by.items()} for case, by in times.items()}
