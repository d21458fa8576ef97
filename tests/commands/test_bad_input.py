"""Bad flags, data and folders: one line that says what to do, exit code 2, and nothing harmed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Call = Callable[..., Any]

BAD_FLAGS = {
    "assign": {
        "--steps abc": "--steps: invalid literal.*'abc'.*--help",
        "--no_such_flag 1": "--no_such_flag",
        "--resize_mode stretch": "stretch.*crop.*squash",
        "--steps 0": "steps is 0; give at least 1",
        "--lr 0": "lr is 0.0; give a positive number",
        "--lr nan": "lr is nan",
        "--drift_reg_weight inf": "finite and not negative",
        "--latent_loss_weight -1": "finite and not negative",
        "--latent_loss_weight 0": "nothing to match",
        "--batch_size 0": "batch_size is 0",
        "--patch_size 3": r"patch_size 3 does not divide the 8 x 8 latent; use one of \[1, 2, 4, 8",
        "--patch_size 0": "patch_size 0 does not divide",
        "--rotation_groups 3": r"rotation_groups 3 does not divide .*\[1, 2, 4\]",
        "--resolution 65": "resolution 65 is not a positive multiple of 8",
        "--resolution 0": "resolution 0 is not",
        "--max_samples 0": "max_samples is 0",
        "--start_index 6": "start_index is 6, but .* has 6 records",
        "--prompt_field caption": "no line has the field 'caption'; set --prompt_field",
        "--device nowhere": "cannot use device nowhere",
        "--prompt a": "not both",
        "--model_id nowhere/at_all": "hub did not give it",
        "--model_config /nowhere": "model_config is for a .safetensors file, which tiny is not",
    },
    "em": {
        "--num_cycles 0": "num_cycles must be at least 1",
        "--eval_samples 9": "eval_samples must be at least 10",
        "--assign_steps 0": "steps is 0",
        "--assign_batch_size 0": "batch_size is 0",
        "--patch_size 3": "patch_size 3 does not divide",
        "--train_lr -1": "lr is -1.0",
        "--train_batch_size 0": "batch_size is 0",
        "--heldout_root /nowhere": "/nowhere: no such folder",
    },
    "sft": {
        "--epochs 0": "epochs is 0",
        "--batch_size 0": "batch_size is 0",
        "--lr inf": "lr is inf",
        "--preserve_batch_size 0": "preserve_batch_size must be at least 1",
        "--preserve_latent_weight nan": "finite and not negative",
        "--noise other": "other.*matched.*random",
        "--manifest_path /nowhere": "/nowhere: no such manifest file",
        "--latent_loss_weight 0": "nothing to learn",
        "--manifest_path /nowhere/*.jsonl": "no file fits this pattern",
        "--lr_num_cycles 2": "no effect without --lr_scheduler cosine_with_restarts",
        "--validation_prompt x": "no effect without --validation_steps",
        "--caption_dropout 1.5": "caption_dropout is 1.5; give a probability, 0 to 1",
    },
}
LONG = f"--output_dir {{0}}/run --prompt {'a' * 70_000}"
CASES = [(command, flag) for command, flags in BAD_FLAGS.items() for flag in flags]


def flags_of(command: str, data: Path, assigned: Path, folder: Path) -> list[object]:
    model = ["--model_id", "tiny"]
    return {
        "assign": [
            "--data_root", data, "--output_root", folder, *model, "--assign_method", "rotation",
            "--lr", 0.15,
        ],
        "sft": ["--manifest_path", assigned / "manifest.jsonl", "--output_dir", folder, *model],
        "em": [
            "--data_root", data, "--work_dir", folder, "--initial_model_id", "tiny",
            "--assign_method", "rotation",
        ],
    }[command]  # fmt: skip


@pytest.mark.parametrize(("command", "flag"), CASES, ids=[" ".join(case) for case in CASES])
def test_bad_flags(
    small_data: Path, assigned: Path, tmp_path: Path, call: Call, command: str, flag: str
) -> None:
    folder = tmp_path / "run"
    ended = call(command, *flags_of(command, small_data, assigned, folder), *flag.split())
    assert ended.code == 2 and re.search(BAD_FLAGS[command][flag], ended.error)
    assert not folder.exists()  # refused before any work


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("assign", "", "give --output_dir DIR"),
        ("assign", "--output_dir {0}/run", "give --data_root DIR, or both --prompt"),
        ("assign", "--output_dir {0}/run --prompt a", "give --data_root DIR, or both --prompt"),
        ("assign", "--output_dir {0}/run --prompt a --target_image_path {0}/x", "no such image"),
        ("assign", "--output_dir {0}/run --data_root {0}/empty", "no pairs.jsonl"),
        ("assign", "--output_dir {0}/run --data_root {0}/blank", "is empty; write one JSON"),
        ("assign", "--output_dir {0}/run --data_root {0}/bad", "no usable line, 1 failed.*line 1"),
        ("sft", "--output_dir {0}/run", "give --manifest_path FILE"),
        ("sft", "--output_dir {0}/run --manifest_path {0}/blank/pairs.jsonl", "is empty"),
        ("em", "--work_dir {0}/run --data_root {0}/bad", "no usable line, 1 failed.*line 1"),
        ("assign", f"{LONG} --target_image_path {{0}}/bad/pairs.jsonl", "70,000 bytes, more than"),
        ("optimize", f"{LONG} --reward thickness", "'--prompt' has 70,000 bytes, more than 64 kB"),
    ],
    ids=lambda text: text[:60],
)
def test_missing_or_empty_input(
    tmp_path: Path, call: Call, command: str, flags: str, message: str
) -> None:
    for name, text in (("blank", "\n \n"), ("bad", "{\n"), ("empty", None)):
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "pairs.jsonl").write_text(text)
    ended = call(command, *flags.format(tmp_path).split())
    assert ended.code == 2 and re.search(message, ended.error)
    assert not (tmp_path / "run").exists()


def test_no_usable_image_at_all(data: Path, tmp_path: Path, call: Call) -> None:
    for path in (data / "images").iterdir():
        path.write_bytes(b"")
    ended = call("assign", *flags_of("assign", data, data, tmp_path / "run"))
    assert ended.code == 2 and "no target could be assigned" in ended.err.splitlines()[-1]
    assert len((tmp_path / "run" / "failures.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("command", BAD_FLAGS)
@pytest.mark.parametrize("place", ["{0}/file", "{0}/file/run", "/proc/none/run", "{0}/locked/run"])
def test_a_folder_that_cannot_be_written(
    small_data: Path, assigned: Path, tmp_path: Path, call: Call, command: str, place: str
) -> None:
    if "locked" in place and os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir(mode=0o500)
    folder = Path(place.format(tmp_path))
    flags = flags_of(command, small_data, assigned, folder)
    if command == "em":
        flags = flags[2:]  # the embedded default writes its data there first
    ended = call(command, *flags)
    assert ended.code == 2 and "check the path and its permissions" in ended.error


def edit_line(data: Path) -> None:
    lines = (data / "pairs.jsonl").read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), "prompt": "another digit"})
    (data / "pairs.jsonl").write_text("\n".join(lines))


def append_line(data: Path) -> None:
    first = (data / "pairs.jsonl").read_text().splitlines()[0]
    with (data / "pairs.jsonl").open("a") as file:
        file.write(first + "\n")


def replace_image(data: Path) -> None:
    path = min((data / "images").iterdir())
    kept = path.stat()
    Image.new("RGB", (64, 64), "red").save(path)
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))  # as a copy that keeps times


CHANGES: dict[str, tuple[Callable[[Path], None] | None, list[str], str]] = {
    "flag": (None, ["--lr", "0.5"], r"lr: 0\.15 then, 0\.5 now"),
    "seed": (None, ["--seed", "3"], "seed: 0 then, 3 now"),
    "fewer": (None, ["--max_samples", "3"], "samples: 6 then, 3 now"),
    "edited line": (edit_line, [], "1 samples with noises are no longer in the data set"),
    "appended line": (append_line, [], "samples: 6 then, 7 now"),
    "replaced image": (replace_image, [], r"000_zero\.png changed after its noise"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_assignment_is_refused_and_overwritten_on_request(
    assigned: Path, data: Path, tmp_path: Path, call: Call, name: str
) -> None:
    change, extra, message = CHANGES[name]
    run = shutil.copytree(assigned, tmp_path / "run")
    before = (run / "manifest.jsonl").read_bytes()
    flags = [*flags_of("assign", data, data, run), "--steps", 3, "--num_images", 0]
    if change:
        change(data)
    ended = call("assign", *flags, *extra)
    assert ended.code == 2 and re.search(message, ended.error) and "--overwrite" in ended.error
    assert (run / "manifest.jsonl").read_bytes() == before
    if name in ("flag", "replaced image"):
        assert call("assign", *flags, *extra, "--overwrite").code == 0
        assert (run / "manifest.jsonl").read_bytes() != before
        assert not (run / "images").exists()
        assert call("assign", *flags, *extra).code == 0


def test_a_changed_training_is_refused(
    assigned: Path, data: Path, tmp_path: Path, call: Call, forks: Any
) -> None:
    run = shutil.copytree(assigned, tmp_path / "assigned")
    rows = [json.loads(line) for line in (run / "manifest.jsonl").read_text().splitlines()]
    for row in rows:
        row["target_image_path"] = f"../data/images/{Path(row['target_image_path']).name}"

    def write(*changed: dict[str, Any]) -> None:
        (run / "manifest.jsonl").write_text("\n".join(map(json.dumps, changed)) + "\n")

    write(*rows)
    flags = [*flags_of("sft", data, run, tmp_path / "sft"), "--save_minutes", 0, "--epochs", 2]
    flags += ["--preserve_pool_size", 4]
    assert forks.run("sft", flags, tmp_path / "sft", at="checkpoint-best").code == -9
    assert (tmp_path / "sft" / "state.safetensors").exists()
    edited = [{**rows[0], "prompt": "another digit"}, *rows[1:]]
    swapped = [{**rows[0], "noise_index": 1}, {**rows[1], "noise_index": 0}, *rows[2:]]
    for changed, message in (
        (edited, r"\(data: "), (swapped, r"\(data: "), (rows[1:], "samples: 6 then, 5 now"),
    ):  # fmt: skip
        write(*changed)
        ended = call("sft", *flags)
        assert ended.code == 2 and re.search(message, ended.error)
    write(*rows)
    assert re.search("lr: 1e-05 then, 0.001 now", call("sft", *flags, "--lr", "1e-3").error)
    kept = {path: path.read_bytes() for path in (data / "images").iterdir()}
    replace_image(data)
    assert re.search("6 pairs were there .* 5 of them now", call("sft", *flags).error)
    for path, content in kept.items():
        path.write_bytes(content)
    assert call("sft", *flags).code == 0


def test_a_changed_em_run_is_refused(
    assigned: Path, data: Path, tmp_path: Path, call: Call, forks: Any
) -> None:
    folder = tmp_path / "em"
    flags = [*flags_of("em", data, data, folder), "--eval_samples", 10, "--assign_steps", 1]
    flags += ["--preserve_pool_size", 4, "--num_cycles", 1, "--train_epochs", 1]
    assert forks.run("em", flags, folder, at="cycle-01/sft").code == -9
    ended = call("em", *flags, "--train_lr", "0.5")
    assert ended.code == 2 and "train_lr: 0.0001 then, 0.5 now" in ended.error
    replace_image(data)
    ended = call("em", *flags)
    assert ended.code == 2 and "000_zero.png changed after its noise" in ended.err.splitlines()[-1]
    assert call("em", *flags, "--overwrite").code == 0


def test_foreign_files_are_left_alone(data: Path, call: Call) -> None:
    ended = call("assign", *flags_of("assign", data, data, data), "--overwrite")
    assert ended.code == 2 and "holds images, which no run of ours wrote" in ended.error
    assert len(list((data / "images").iterdir())) == 6


def test_a_fresh_process_says_the_same_and_no_more(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "oneshot_fast.assign", "--model_id", str(tmp_path), "--prompt", "a",
         "--target_image_path", __file__, "--output_dir", str(tmp_path / "run")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(r"error: cannot use model .*no model_index\.json[^\n]*\n", result.stderr)
