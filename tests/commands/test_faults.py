"""Kills, interrupts, full disks, rivals: the same command then ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

TIMINGS = {"seconds", "images_per_second", "steps_per_second"}
COMMANDS = ("assign", "sft", "em")
Flags = Callable[[str, Path], list[object]]


@pytest.fixture(scope="module")
def flags(small_data: Path, small_model: Path, small_assigned: Path) -> Flags:
    """The flags of a small run of each command."""
    steps = "--assign_steps 2 --assign_batch_size 2 --num_cycles 2 --train_epochs 1 --num_images 1"
    fixed = {
        "assign": f"--data_root {small_data} --steps 8 --batch_size 1 --num_images 0 --output_root",
        "sft": f"--manifest_path {small_assigned}/manifest.jsonl --epochs 2 --batch_size 2 "
        "--lr 1e-4 --preserve_pool_size 4 --save_minutes 0 --output_dir",
        "em": f"--heldout_root {small_data} --max_samples 4 --eval_samples 10 {steps} "
        "--preserve_pool_size 4 --save_minutes 0 --work_dir",
    }

    def build(command: str, folder: Path) -> list[object]:
        name = "--initial_model_id" if command == "em" else "--model_id"
        return [name, small_model, *fixed[command].split(), folder]

    return build


def without_timings(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_timings(v) for k, v in value.items() if k not in TIMINGS}
    return [without_timings(v) for v in value] if isinstance(value, list) else value


def outcome(folder: Path) -> dict[str, Any]:
    """Everything a run leaves, by path: bytes, or JSON without timings; links by their target."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = os.readlink(path)
        elif (
            path.name not in (".lock", "files.jsonl", "report.html", "history.jsonl")
            and path.is_file()
        ):
            is_json = path.name in ("summary.json", "diagnostics.json")
            content = json.loads(path.read_text()) if is_json else path.read_bytes()
            found[str(path.relative_to(folder))] = without_timings(content)
    return found


def check_valid(folder: Path) -> None:
    """Whatever has its final name is whole, and a manifest's complete lines have their noise."""
    for path in folder.rglob("*"):
        if any(part.startswith((".tmp-", ".train", ".heldout")) for part in path.parts):
            continue
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.name == "manifest.jsonl":
            for line in path.read_bytes().split(b"\n")[:-1]:
                row = json.loads(line)
                with safe_open(path.with_name("noises") / Path(row["noise_path"]).name, "pt") as f:
                    rows = json.loads(f.metadata()["rows"])
                assert rows[row["noise_index"]] == row


@pytest.fixture(scope="module")
def references(
    forks: Any, flags: Flags, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[dict[str, Any], int, float]]:
    """Outcome, changes to the file system and seconds of each command without a fault."""
    kept: dict[str, tuple[dict[str, Any], int, float]] = {}

    def reference(command: str) -> tuple[dict[str, Any], int, float]:
        if command not in kept:
            folder = tmp_path_factory.mktemp(f"reference-{command}") / "run"
            started = time.monotonic()
            changes = forks.changes(command, flags(command, folder), folder)
            kept[command] = outcome(folder), changes, time.monotonic() - started
        return kept[command]

    return reference


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where a run goes; at the end, nothing temporary may be left there."""
    yield tmp_path / "run"
    left = [path for path in (tmp_path / "run").rglob(".*") if path.name != ".lock"]
    assert not left


def finish(forks: Any, flags: Flags, command: str, folder: Path, expected: dict[str, Any]) -> None:
    """The same command again completes the run, equal to the uninterrupted one bit by bit."""
    ended = forks.run(command, flags(command, folder), folder)
    assert ended.code == 0, ended.err
    found = outcome(folder)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if found[name] != expected[name]]


@pytest.mark.parametrize("command", COMMANDS)
def test_kills_at_random_moments(
    forks: Any, flags: Flags, references: Any, folder: Path, command: str
) -> None:
    expected, changes, seconds = references(command)
    draw, kills, kept = random.Random(command), 0, {}
    for k in range(4):
        if k % 3 == 2:  # at any time, not only where files change
            started = forks.start(command, flags(command, folder), folder)
            time.sleep(draw.uniform(0.1, 0.5) * seconds)
            os.killpg(started[0], signal.SIGKILL)
            ended = forks.wait(started)
        else:
            at = draw.randint(1, changes // 3)
            ended = forks.run(command, flags(command, folder), folder, at=at)
        assert ended.code in (0, -signal.SIGKILL), ended.err
        if ended.code == 0:  # finished already: kills go on in a new run
            shutil.rmtree(folder)
            kept.clear()
            continue
        kills += 1
        check_valid(folder)
        for path in folder.glob("**/noises/0*"):  # what was finished is not done again
            assert kept.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    assert kills >= 3
    finish(forks, flags, command, folder, expected)


def killed_ten_times(folder: Path) -> list[str]:
    """Where a training of three epochs is killed, each time further on."""
    written = f"os.rename {folder}/.tmp-"
    return [
        "run.json",
        "eval/.tmp-base.json",
        f"{written}state.safetensors",  # the first, which then has no name yet
        "history.jsonl",  # once there is a state
        "epoch-002.png",
        f"{written}state.safetensors",  # in place of the first
        "epoch-003.safetensors",
        ".tmp-checkpoint-final/unet",
        f"{written}checkpoint-final",
        "report.html",
    ]


@pytest.mark.parametrize("command", ["distill", "reinforce"])
def test_ten_kills(
    forks: Any, small_model: Path, prompts: Path, folder: Path, command: str
) -> None:
    flags = f"--prompt_file {prompts} --eval_samples 10 --lr 1e-3 --save_minutes 0 --epochs 3 "
    flags += {
        "distill": f"--teacher {small_model} --num_inference_steps 2 --batch_size 2 --ttur 2 "
        "--images_per_prompt 1 --lora_rank 2",
        "reinforce": f"--model_id {small_model} --teacher {small_model} --match_weight 0.1 "
        "--num_inference_steps 3 --cps_eta 0.9 --reward thickness --final_reward_weight 0.1 "
        "--batch_size 4 --images_per_prompt 2 --steps_per_epoch 1",
    }[command]
    whole, found = folder.with_name("whole"), []
    assert forks.run(command, [*flags.split(), "--output_dir", whole], whole).code == 0
    argv = [*flags.split(), "--output_dir", folder]
    for at in killed_ten_times(folder):
        assert forks.run(command, argv, folder, at=at).code == -signal.SIGKILL, at
        check_valid(folder)
    ended = forks.run(command, argv, folder)
    assert ended.code == 0, ended.err
    for run in (whole, folder):
        rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
        found.append((outcome(run), rows))
        assert len(rows) == 3
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("command", "number", "by"),
    [
        *((command, signal.SIGINT, "") for command in COMMANDS),
        ("assign", signal.SIGTERM, " by SIGTERM"),
        ("sft", signal.SIGHUP, " by SIGHUP"),
    ],
)
def test_interrupts(
    forks: Any, flags: Flags, references: Any, folder: Path, command: str, number: int, by: str
) -> None:
    expected, changes, _ = references(command)
    ended = forks.run(
        command, flags(command, folder), folder, at=int(0.6 * changes), signal_number=number
    )
    assert ended.code == 128 + number and "Traceback" not in ended.err
    assert ended.err.splitlines()[-1].startswith(f"interrupted{by}: everything finished is kept")
    check_valid(folder)
    finish(forks, flags, command, folder, expected)


@pytest.mark.parametrize(
    ("command", "limit", "reached"),
    [
        ("assign", 200, "."),
        ("assign", 3500, "noises"),
        ("sft", 100_000, "preserve.safetensors"),
        ("sft", 300_000, "preserve.safetensors"),
        ("em", 400_000, "cycle-01/assign/summary.json"),
    ],
)
def test_a_full_disk(
    forks: Any, flags: Flags, references: Any, folder: Path, command: str, limit: int, reached: str
) -> None:
    expected, *_ = references(command)
    # With a state at every step, the disk would be full before there is a checkpoint to write.
    argv = [*flags(command, folder), *(["--save_minutes", 9] if limit == 300_000 else [])]
    ended = forks.run(command, argv, folder, limit=limit)
    assert ended.code == 3 and "Traceback" not in ended.err
    last = ended.err.splitlines()[-1]
    assert last.startswith("error: no space left to write") and "repeat the command" in last
    assert (folder / reached).exists() and not (folder / "summary.json").exists()
    assert not list(folder.rglob(".tmp-*"))
    check_valid(folder)
    for path in folder.rglob("manifest.jsonl"):
        assert path.read_bytes()[-1:] in (b"\n", b"")
    finish(forks, flags, command, folder, expected)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_process_is_refused(
    forks: Any, flags: Flags, tmp_path: Path, call: Any, command: str
) -> None:
    folder = tmp_path / "run"  # not the fixture's: the killed process may leave something
    long = {"assign": "--steps", "sft": "--epochs", "em": "--assign_steps"}[command]
    argv = [*flags(command, folder), long, 100_000]
    first = forks.start(command, argv, folder)
    for _ in range(3000):
        time.sleep(0.02 if not (folder / "run.json").exists() else 0)
    second = call(command, *argv)
    os.killpg(first[0], signal.SIGKILL)
    assert forks.wait(first).code == -signal.SIGKILL
    assert second.code == 2 and "is in use by another process" in second.error


def test_an_interrupted_overwrite_never_mixes_runs(
    forks: Any, flags: Flags, references: Any, folder: Path
) -> None:
    expected, *_ = references("sft")
    assert forks.run("sft", [*flags("sft", folder), "--seed", 5], folder).code == 0
    for at in (2, 4, 8):  # while the old files are removed one by one
        killed = forks.run("sft", [*flags("sft", folder), "--overwrite"], folder, at=at)
        assert killed.code == -signal.SIGKILL
    refused = forks.run("sft", flags("sft", folder), folder)
    if refused.code == 2:  # the old run is still known, so it is not mixed with the new one
        assert "seed: 5 then, 0 now" in refused.error
        assert forks.run("sft", [*flags("sft", folder), "--overwrite"], folder).code == 0
    finish(forks, flags, "sft", folder, expected)
