"""What every benchmark says of itself: the machine, the build, the commit."""

import argparse
import json
import math
import platform
import re
import shutil
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import oneshot_fast

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def print_table(about: str, make: Callable[[], str]) -> None:
    """Print the Markdown that ``make`` gives, and write it to --output; --help says ``about``."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    warnings.simplefilter("ignore")
    text = make()
    print(text)
    if output is not None:
        output.write_text(text, encoding="utf-8")


def environment(device: str, seed: int) -> dict[str, Any]:
    """What the numbers hold for.

    Args:
        device: "cpu" or "cuda".
        seed: Of the inputs.
    """
    about = {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": seed,
        "build": oneshot_fast.build_info(),
    }
    return about | ({"driver": driver()} if device == "cuda" else {})


def processor() -> str:
    """Name of the processor as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def commit() -> str | None:
    """This commit, "-dirty" where files differ from it; None outside of a repository."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None


def driver() -> str | None:
    """Version of the NVIDIA driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return lines[0].strip() if lines else None


def run_job(
    description: str | None,
    defaults: dict[str, int],
    measure: Callable[..., Any],
    markdown: Callable[[dict[str, Any]], str],
    argv: list[str] | None,
) -> int:
    """Command line of a benchmark of a job.

    Args:
        description: For ``--help``.
        defaults: Arguments of ``measure`` that are flags.
        measure: Gives the results.
        markdown: Writes what is published of settings and results.
        argv: The flags; ``--output`` is the JSON file, which gets a table as Markdown beside it.
    """
    parser = argparse.ArgumentParser(description=description)
    for name, value in {**defaults, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found = {
        "device": processor(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "settings": {k: v for k, v in vars(args).items() if k != "output"},
        "results": measure(**{name: getattr(args, name) for name in defaults}),
    }
    print(markdown(found))
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        args.output.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
    return 0


def mean_and_error(values: Sequence[float]) -> str:
    """Mean and its standard error, as a cell of a table."""
    mean = statistics.fmean(values)
    digits = 2 if abs(mean) >= 5 else 3
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def slug(name: str) -> str:
    """``name`` as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
