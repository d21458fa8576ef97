"""Several processes on one job give what one process gives, and lose nothing when one is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from oneshot_fast.processes import claims, gathered, is_main

EM = (
    "--num_cycles 1 --assign_steps 2 --assign_batch_size 2 --train_epochs 1 --eval_samples 10 "
    "--max_samples 10 --num_images 0"
)


def start(processes: int, command: str, *flags: object) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--nproc_per_node", str(processes), "-m"]
    return subprocess.Popen(
        [*launcher, f"oneshot_fast.{command}", *map(str, flags)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(processes: int, command: str, *flags: object) -> str:
    job = start(processes, command, *flags)
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 0, out[-4000:]
    return out


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def results(folder: Path) -> list[tuple[object, ...]]:
    """What was found for each target, and its noise, in the order of the manifest."""
    found = []
    for row in rows(folder):
        with safe_open(folder / str(row["noise_path"]), framework="pt") as file:
            z = file.get_slice("z")[row["noise_index"]]
        found.append((row["id"], row["index"], row["losses"], z.tolist()))
    return found


def test_one_process_is_the_main_one():
    assert is_main()
    assert gathered([1, 2]) == [1, 2]
    numbers = claims("job")
    assert [next(numbers) for _ in range(3)] == [0, 1, 2]


@pytest.mark.slow
def test_em_with_two_processes_equals_one(tmp_path):
    flags = EM.split()
    run(1, "em", "--work_dir", tmp_path / "one", *flags)
    out = run(2, "em", "--work_dir", tmp_path / "two", *flags)
    assert out.count("report: ") == 1  # one of them speaks
    cycle = Path("cycle-01") / "assign"
    assert results(tmp_path / "two" / cycle) == results(tmp_path / "one" / cycle)
    one, two = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "two"))
    assert two["random_noise"]["base"] == one["random_noise"]["base"]
    for key in ("matched_loss_before", "matched_loss_after"):
        assert two["cycles"][0]["sft"][key] == pytest.approx(one["cycles"][0]["sft"][key], rel=1e-4)
    assert "no result" not in run(1, "em", "--work_dir", tmp_path / "two", *flags)  # goes on alone


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(tmp_path, small_data):
    flags = f"--data_root {small_data} --model_id tiny --num_images 0 --batch_size 1"
    steps = ("--steps", 150)
    run(1, "assign", *flags.split(), *steps, "--output_root", tmp_path / "one")
    job = start(3, "assign", *flags.split(), *steps, "--output_root", tmp_path / "many")
    noises = tmp_path / "many" / "noises"
    deadline = time.monotonic() + 120
    while not list(noises.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    out, _ = job.communicate(timeout=300)
    assert job.returncode != 0, out
    left = len(list(noises.glob("*.safetensors")))
    assert 0 < left < len(rows(tmp_path / "one"))
    run(2, "assign", *flags.split(), *steps, "--output_root", tmp_path / "many")
    assert results(tmp_path / "many") == results(tmp_path / "one")
    assert json.loads((tmp_path / "many" / "summary.json").read_text())["samples"] == 6
