"""Files of finished and interrupted runs, cut off, zeroed or deleted: made again, or said.

Every kind of file that a command writes is damaged in each of the three ways, some at a time;
those of em's stages, whose commands have their turns, in one.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from samples import PROMPTS

from oneshot_fast.runtime.ledger import NAME, digest

UMASK = os.umask(0o22)
os.umask(UMASK)


def cut(path: Path) -> None:
    """At a random byte; the list of files not at a line's end, which is not promised."""
    data = path.read_bytes()[: random.randrange(path.stat().st_size or 1)]
    path.write_bytes(data.rstrip(b"}\n") if path.name == NAME else data)


WAYS: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "deleted": Path.unlink,
}
TRAINING = "--batch_size 3 --preserve_pool_size 4 --epochs 2 --model_id SMALL"
EM = (
    "--initial_model_id SMALL --assign_steps 2 --assign_batch_size 2 --num_cycles 2 "
    "--train_epochs 1 --train_batch_size 3 --eval_samples 10 --preserve_pool_size 4"
)
# By name: the command, its flags, and the files before which it is looked at as if killed there.
RUNS = {
    "assign": (
        "assign --data_root DATA --num_images 2 --assign_method rotation --lr 0.15 --steps 3 "
        "--batch_size 4 --model_id SMALL --output_dir",
        ["noises/00000004.safetensors"],
    ),
    "optimize": (
        "optimize --prompt_file PROMPTS --reward thickness --method sphere --steps 2 "
        "--batch_size 1 --model_id SMALL --output_dir",
        ["noises/00000001.safetensors"],
    ),
    "sft": (
        f"sft --manifest_path ASSIGNED --keep_checkpoints 1 {TRAINING} --output_dir",
        ["history.jsonl"],
    ),
    "reward": (
        "sft --prompt_file PROMPTS --reward thickness --images_per_prompt 3 --eval_samples 10 "
        f"--lora_rank 2 {TRAINING} --output_dir",
        ["eval/epoch-002.json"],
    ),
    "em": (
        f"em --data_root DATA --heldout_root HELDOUT --assign_fraction 0.5 --num_images 1 {EM} "
        "--work_dir",
        ["cycle-02/sft/history.jsonl"],
    ),
    "em by reward": (
        "em --prompt_file PROMPTS --reward thickness --images_per_prompt 2 --assign_method search "
        f"--assign_candidates 2 {EM} --work_dir",
        ["cycle-02/assign/training/manifest.jsonl"],
    ),
    "evaluate": (
        "evaluate --model_id tiny SMALL --data_root DATA --eval_samples 10 --output_dir",
        ["eval/model-2.json"],
    ),
    "toy": ("toy train --steps 3 --width 8 --eval_samples 20 --work_dir", ["train/eval/base.json"]),
}
# With times in them, made at every start, set aside, or added by the test.
CHANGES = (
    r"(files\.jsonl|report\.html|curves\.png|diagnostics\.json|\.lock|mine\.txt)$|\.damaged|\.old"
)
# What a finished run reads no more is only said to be damaged; in SHARDS is all that was done.
OF_NO_USE = {
    "sft": r"preserve|checkpoint-\d", "reward": r"preserve|eval/", "toy": r"train/classifier",
}  # fmt: skip
SHARDS = r"(assign/|heldout-\w+/|^)history\.jsonl$"
UNREAD = r"\.tmp-|\.lock|tokenizer|scheduler|vae|encoder|report|curves|diagnostics"


@dataclasses.dataclass
class Run:
    """A run of a command: its flags, its folder when it had ended, and as it was on the way."""

    argv: list[str]
    finished: Path
    on_the_way: list[Path]


@pytest.fixture(scope="session")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    small_data: Path,
    small_model: Path,
    small_assigned: Path,
) -> Callable[[str], Run]:
    """Runs by their names in RUNS; each is run once."""
    home, found = tmp_path_factory.mktemp("damage"), dict[str, Run]()
    places = {"DATA": small_data, "HELDOUT": shutil.copytree(small_data, home / "heldout")}
    lines = (small_data / "pairs.jsonl").read_text().splitlines(keepends=True)
    (home / "heldout" / "pairs.jsonl").write_text("".join(lines[:2]))
    places |= {"SMALL": small_model, "ASSIGNED": small_assigned / "manifest.jsonl"}
    places["PROMPTS"] = home / "prompts.txt"
    places["PROMPTS"].write_text("\n".join(PROMPTS))

    def run(name: str) -> Run:
        if name not in found:
            flags, files = RUNS[name]
            argv = [str(places.get(flag, flag)) for flag in flags.split()]
            place = tmp_path_factory.mktemp("run")  # as deep as tmp_path: rows name images from it
            folder, moments = place / "run", {file: place / file for file in files}
            with pytest.MonkeyPatch.context() as patch:
                copy_before(patch, folder, moments)
                often = ["--save_minutes", "0"] if argv[0] in ("sft", "em") else []
                assert main([*argv, str(folder), *often]) == 0
            found[name] = Run(argv, folder, [*moments.values()])
        return found[name]

    return run


def main(argv: list[str]) -> int:
    code: int = importlib.import_module(f"oneshot_fast.{argv[0]}").main(argv[1:])
    return code


def copy_before(patch: pytest.MonkeyPatch, folder: Path, moments: dict[str, Path]) -> None:
    """Copy the folder before a file of it first appears: so a kill at that moment leaves it."""
    for name in ("replace", "rename"):
        real = getattr(Path, name)

        def moved(self: Path, target: Path, real: Any = real) -> Path:
            for file, place in moments.items():
                if target == folder / file and not place.exists():
                    shutil.copytree(folder, place)
            result: Path = real(self, target)
            return result

        patch.setattr(Path, name, moved)


def kinds(folder: Path) -> list[list[Path]]:
    """The files that are read again, those of one kind together; stages of em are of a kind."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        file = str(path.relative_to(folder))
        if path.is_file() and not re.search(UNREAD, file):
            kind = re.sub(r"cycle-\d+/(?=sft|assign)", "", file)
            kind = re.sub(r"heldout-\w+/", "assign/", kind)
            found.setdefault(re.sub(r"[0-9a-f]{12}|\d+", "", kind), []).append(Path(file))
    return [*found.values()]


def groups(folder: Path, turn: int) -> Iterator[dict[Path, str]]:
    """Files that are damaged together, and how: in three turns each kind is in all ways.

    Without the list nothing can be restored, so lists have a group of their own. Files of em's
    stages, whose commands have their turns, are damaged once.
    """
    files = [kind[turn % len(kind)] for kind in kinds(folder)]
    lists = [file for file in files if file.name == "files.jsonl"]
    stages = [file for file in files if re.match("cycle|heldout", str(file)) and file not in lists]
    own = [file for file in files if file not in (*lists, *stages)]
    parts = [own] if turn else [own[::2], [*own[1::2], *stages]]
    for group in (lists, *parts):
        if group:
            yield {file: [*WAYS][(files.index(file) + turn) % 3] for file in group}


def contents(folder: Path) -> dict[str, object]:
    """All that counts of a run's files, times left out."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: content(path) for name, path in files.items() if not re.search(CHANGES, name)}


def content(path: Path) -> object:
    if not path.name.endswith((".json", "history.jsonl")):
        return digest(path)
    text = path.read_text()
    texts = text.splitlines() if path.suffix == ".jsonl" else [text]
    return without_times([json.loads(one) for one in texts])


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if "second" not in k}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def number_said(err: str) -> int:
    """How many damaged files the output names or counts."""
    lists = re.findall(r"is made again: (.*?)(?: and (\d+) more)?$", err, re.M)
    restored = re.findall(r"was damaged or gone; restored|is damaged|anew", err)
    return sum(names.count(", ") + 1 + int(more or 0) for names, more in lists) + len(restored)


def damage_and_repeat(
    run: Run, original: Path, folder: Path, group: dict[Path, str], call: Any
) -> Any:
    """Damage a copy of ``original`` beside the user's files; returns how the command ended."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    for file, way in group.items():
        folder.joinpath(file.with_name("mine.txt")).write_text("mine")
        WAYS[way](folder / file)
    ended = call(run.argv[0], *run.argv[1:], folder)
    assert "Traceback" not in ended.err, (group, ended.err)
    mine = [path.read_text() for path in folder.rglob("mine.txt")]
    assert mine == ["mine"] * len({file.parent for file in group}), group
    return ended


@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("name", RUNS)
def test_files_of_a_finished_run(
    tmp_path: Path, runs: Callable[[str], Run], call: Any, name: str, turn: int
) -> None:
    run, folder = runs(name), tmp_path / "run"
    random.seed(turn)
    unused = f"{OF_NO_USE.get(name, '^$')}|{SHARDS}"
    expected = {k: v for k, v in contents(run.finished).items() if not re.search(unused, k)}
    for group in groups(run.finished, turn):
        ended = damage_and_repeat(run, run.finished, folder, group, call)
        assert ended.code == 0, (group, ended.err)
        whole = [file for file in group if (run.finished / file).stat().st_size]
        assert number_said(ended.err) >= len(whole), (group, ended.err)
        found = contents(folder)
        assert {file: found.get(file) for file in expected} == expected, group


@pytest.mark.parametrize("name", RUNS)
def test_files_of_an_interrupted_run(
    tmp_path: Path, runs: Callable[[str], Run], call: Any, name: str
) -> None:
    run, folder = runs(name), tmp_path / "run"
    random.seed(name)
    unused = f"{OF_NO_USE.get(name, '^$')}|{SHARDS}"
    expected = {k: v for k, v in contents(run.finished).items() if not re.search(unused, k)}
    for turn, moment in enumerate(run.on_the_way):
        _, *parts = groups(moment, turn)  # without lists and run.json it is refused
        for group in ({}, {file: way for part in parts for file, way in part.items()}):
            ended = damage_and_repeat(run, moment, folder, group, call)
            assert ended.code == 0, (group, ended.err)
            found = contents(folder)
            assert {file: found.get(file) for file in expected} == expected, (moment, group)


LOCKED: list[str] = []  # folders that cannot be written
WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}


@sys.addaudithook
def refuse(event: str, args: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(args[2], int) and args[2] & os.O_ACCMODE
    if (writes or event in WRITES) and any(folder in str(args[0]) for folder in LOCKED):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_on_a_drive_that_cannot_be_written(
    runs: Callable[[str], Run], call: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = runs(name)
    monkeypatch.setattr(sys.modules[__name__], "LOCKED", [str(run.finished)])
    ended = call(run.argv[0], *run.argv[1:], run.finished)
    assert ended.code == 0 and ended.out, ended.err
    assert name == "toy" or "not written" in ended.err  # the report
    modes = {oct(path.stat().st_mode & 0o777) for path in run.finished.rglob("*.safetensors")}
    assert modes == {oct(0o666 & ~UMASK)}


def test_a_flipped_bit_of_a_noise_is_found_and_the_shard_named(
    tmp_path: Path,
    small_model: Path,
    small_assigned: Path,
    runs: Callable[[str], Run],
    call: Any,
) -> None:
    folder = shutil.copytree(small_assigned, tmp_path / "assigned")
    shard = folder / "noises" / "00000000.safetensors"
    for place in (60, 700, -5):
        data = bytearray((small_assigned / "noises" / shard.name).read_bytes())
        data[place] ^= 4
        shard.write_bytes(data)
        train = f"--manifest_path {folder}/manifest.jsonl --model_id {small_model} --output_dir"
        ended = call("sft", *train.split(), tmp_path / "sft")
        assert ended.code == 2 and str(shard) in ended.error and "--verify" in ended.error
    run = runs("assign")
    assert call("assign", *run.argv[1:], folder, "--verify").code == 0
    assert shard.read_bytes() == (small_assigned / "noises" / shard.name).read_bytes()


@pytest.mark.parametrize("text", ["[]", "7", "", "\0\1", "[" * 9999], ids=str.__len__)
def test_a_run_json_that_is_none_is_one_line(
    tmp_path: Path, runs: Callable[[str], Run], call: Any, text: str
) -> None:
    run = runs("assign")
    folder = shutil.copytree(run.finished, tmp_path / "run")
    (folder / "run.json").write_text(text)
    (folder / "files.jsonl").unlink()  # which would restore it
    ended = call("assign", *run.argv[1:], folder)
    assert ended.code == 2 and "run.json is damaged" in ended.err
    assert "Traceback" not in ended.err
