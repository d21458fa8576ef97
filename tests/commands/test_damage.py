"""Files of finished runs, cut off, zeroed or deleted: the repeated command makes them again."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oneshot_fast.runtime.ledger import digest

WAYS: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "deleted": Path.unlink,
}
# With times in them, for people, of no use after a training; and what was set aside.
CHANGES = (
    r"(files|history)\.jsonl$|summary\.json$|report\.html$|\.lock$|\.png$|preserve|\.damaged|\.old/"
)


def flags(command: str, folder: Path, small_data: Path, assigned: Path) -> list[object]:
    common: list[object] = ["--model_id", "tiny", "--batch_size", 4, "--output_dir", folder]
    if command == "assign":
        options = [
            "--num_images",
            "2",
            "--assign_method",
            "rotation",
            "--lr",
            "0.15",
            "--steps",
            "3",
        ]
        return [*common, *options, "--data_root", small_data]
    return [*common, "--epochs", 1, "--manifest_path", assigned / "manifest.jsonl"]


@pytest.fixture(scope="session")
def trained_once(
    tmp_path_factory: pytest.TempPathFactory, small_data: Path, assigned: Path
) -> Path:
    from oneshot_fast.sft import main

    folder = tmp_path_factory.mktemp("damage") / "sft"
    assert main([str(flag) for flag in flags("sft", folder, small_data, assigned)]) == 0
    return folder


def kinds(folder: Path) -> dict[str, Path]:
    """One file of each kind that the run wrote and reads again, by its name without numbers."""
    left_out = "lock|report|tokenizer|scheduler|vae|encoder|curves|diagnostics"
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {re.sub("[0-9a-f]{8,}", "", str(f)): f for f in found if not re.search(left_out, str(f))}


def contents(folder: Path) -> dict[str, str]:
    names = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: digest(path) for name, path in names.items() if not re.search(CHANGES, name)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("command", ["assign", "sft"])
def test_every_kind_of_file_is_made_again(
    tmp_path: Path, small_data: Path, assigned: Path, trained_once: Path, call: Any,
    command: str, way: str,
) -> None:  # fmt: skip
    original = assigned if command == "assign" else trained_once
    folder = shutil.copytree(original, tmp_path / "run")
    argv = flags(command, folder, small_data, assigned)
    for file in kinds(original).values():
        mine = folder / file.with_name("mine.txt")
        mine.write_text("mine")
        size = (folder / file).stat().st_size
        WAYS[way](folder / file)
        ended = call(command, *argv)
        assert ended.code == 0 and "Traceback" not in ended.err, (file, ended.err)
        assert not size or re.search("damaged|not as this run", ended.err), file  # it is said
        found = contents(folder)
        assert {name: found.get(name) for name in contents(original)} == contents(original), file
        kept = [*folder.rglob("mine.txt")]
        assert kept and kept[0].read_text() == "mine", file
        for path in kept:
            path.unlink()


def test_a_flipped_bit_of_a_noise_is_found_and_the_shard_named(
    tmp_path: Path, small_data: Path, assigned: Path, call: Any
) -> None:
    folder = shutil.copytree(assigned, tmp_path / "assigned")
    shard = folder / "noises" / "00000000.safetensors"
    for place in (60, 700, -5):
        data = bytearray((assigned / "noises" / shard.name).read_bytes())
        data[place] ^= 4
        shard.write_bytes(data)
        ended = call("sft", *flags("sft", tmp_path / "sft", small_data, folder))
        assert ended.code == 2 and str(shard) in ended.error and "--verify" in ended.error
    assert call("assign", *flags("assign", folder, small_data, folder), "--verify").code == 0
    assert shard.read_bytes() == (assigned / "noises" / shard.name).read_bytes()


@pytest.mark.parametrize("text", ["[]", "7", "", "\0\1", "[" * 9999], ids=str.__len__)
def test_a_run_json_that_is_none_is_one_line(
    tmp_path: Path, small_data: Path, assigned: Path, call: Any, text: str
) -> None:
    folder = shutil.copytree(assigned, tmp_path / "run")
    (folder / "run.json").write_text(text)
    (folder / "files.jsonl").unlink()  # which would restore it
    ended = call("assign", *flags("assign", folder, small_data, assigned))
    assert ended.code == 2 and "run.json is damaged" in ended.err
    assert "Traceback" not in ended.err
