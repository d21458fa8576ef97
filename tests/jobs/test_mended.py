"""A record named in failures.jsonl is put right and the command repeated: it is simply done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from samples import NOISE, noises_of, rows_of
from shard_samples import samples, tar

Call = Callable[..., Any]


@pytest.fixture
def one_step(small_model: Path) -> list[object]:
    """Flags of a short assignment."""
    return ["--model_id", small_model, *["--steps", "1", "--num_images", "0", "--batch_size", "4"]]


def images(data: Path) -> list[Path]:
    return sorted((data / "images").iterdir())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint-final/unet/diffusion_pytorch_model.safetensors")


def test_assign(data: Path, tmp_path: Path, one_step: list[object], call: Call) -> None:
    missing, broken = images(data)[1:3]
    kept = missing.read_bytes(), broken.read_bytes()
    missing.unlink()
    broken.write_bytes(b"no image")
    run, whole = ["--data_root", data, "--output_dir", tmp_path / "run", *one_step], tmp_path / "w"
    assert call("assign", *run).code == 1
    failed = [row["image"] for row in rows_of(tmp_path / "run" / "failures.jsonl")]
    assert sorted(failed) == [f"images/{path.name}" for path in (missing, broken)]
    settings = (tmp_path / "run" / "run.json").read_bytes()
    missing.write_bytes(kept[0])
    assert call("assign", *run).code == 1
    broken.write_bytes(kept[1])
    assert call("assign", *run).code == 0
    assert (tmp_path / "run" / "run.json").read_bytes() == settings
    assert rows_of(tmp_path / "run" / "failures.jsonl") == []
    assert call("assign", "--data_root", data, "--output_dir", whole, *one_step).code == 0
    one, other = noises_of(tmp_path / "run"), noises_of(whole)
    assert one.keys() == other.keys()
    for name, z in one.items():
        torch.testing.assert_close(z, other[name], rtol=0, atol=NOISE)
    indices = [[row["index"] for row in rows_of(x / "manifest.jsonl")] for x in (whole, run[3])]
    assert indices[0] == indices[1]
    missing.unlink()  # what is done stays done
    assert call("assign", *run).code == 0
    assert noises_of(tmp_path / "run").keys() == other.keys()


def test_assign_of_shards(tmp_path: Path, one_step: list[object], call: Call) -> None:
    data, run = tmp_path / "data", ["--data_root", tmp_path / "data", *one_step]
    data.mkdir()
    whole = samples(0, 6)
    (data / "0.tar").write_bytes(tar(*whole[:2], *whole[3:]))  # one image is missing
    (data / "1.tar").write_bytes(tar(*samples(6, 9))[:-9000])  # cut off
    run += ["--output_dir", tmp_path / "run"]
    assert call("assign", *run).code == 1
    (data / "0.tar").write_bytes(tar(*whole))  # packed anew: other places
    (data / "1.tar").write_bytes(tar(*samples(6, 9)))
    ended = call("assign", *run)
    assert ended.code == 0, ended.err
    rows = rows_of(tmp_path / "run" / "manifest.jsonl")
    assert sorted(row["prompt"] for row in rows) == [f"grey {n}" for n in range(9)]
    for row in rows:
        path, _, place = row["target_image_path"].partition("#")
        offset, length = map(int, place.split("+"))
        body = ((tmp_path / "run" / path).resolve()).read_bytes()[offset : offset + length]
        assert body == dict(whole + samples(6, 9))[f"{int(row['prompt'][5:]):06d}.png"]
    before = (tmp_path / "run" / "manifest.jsonl").read_bytes()
    assert call("assign", *run).code == 0
    assert (tmp_path / "run" / "manifest.jsonl").read_bytes() == before
    (data / "1.tar").write_bytes(tar(*samples(10, 12)))  # other samples
    assert "no longer in the data set" in call("assign", *run).err


def test_sft(
    small_model: Path, small_assigned: Path, small_data: Path, tmp_path: Path, call: Call
) -> None:
    shutil.copytree(small_data, tmp_path / "data")
    source = shutil.copytree(small_assigned, tmp_path / "assigned")
    rows = rows_of(source / "manifest.jsonl")
    for row in rows:
        row["target_image_path"] = f"../data/images/{Path(row['target_image_path']).name}"
    (source / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--manifest_path", source / "manifest.jsonl", "--model_id", small_model, "--epochs", 1]
    flags += ["--batch_size", 4, "--preserve_pool_size", 4, "--lr", 1e-4]
    assert call("sft", *flags, "--output_dir", tmp_path / "whole").code == 0
    missing = images(tmp_path / "data")[2]
    kept = missing.read_bytes()
    missing.unlink()
    run = [*flags, "--output_dir", tmp_path / "run"]
    assert call("sft", *run).code == 1
    (failure,) = rows_of(tmp_path / "run" / "failures.jsonl")
    assert missing.name in failure["image"]
    before = weights(tmp_path / "run")
    assert call("sft", *run).code == 1
    missing.write_bytes(kept)
    ended = call("sft", *run)
    assert ended.code == 0 and "trained anew" in ended.err
    after, expected = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert rows_of(tmp_path / "run" / "failures.jsonl") == []


def test_em(small_model: Path, data: Path, tmp_path: Path, call: Call) -> None:
    flags = ["--data_root", data, "--initial_model_id", small_model, "--num_cycles", 2]
    flags += ["--eval_samples", 10, "--assign_steps", 1, "--train_epochs", 1]
    flags += ["--preserve_pool_size", 4, "--num_images", 0]
    assert call("em", *flags, "--work_dir", tmp_path / "whole").code == 0
    missing = images(data)[2]
    kept = missing.read_bytes()
    missing.unlink()
    run = [*flags, "--work_dir", tmp_path / "run"]
    assert call("em", *run).code == 1
    missing.write_bytes(kept)
    ended = call("em", *run)
    assert ended.code == 0, ended.err
    assert "[cycle-01/sft] made anew" in ended.err
    one, other = (weights(tmp_path / name) for name in ("run", "whole"))
    for name, weight in other.items():
        torch.testing.assert_close(one[name], weight, rtol=0, atol=1e-4)
    first, second = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "whole")
    )
    for name, measured in second["random_noise"].items():
        drift = first["random_noise"][name]["drift"]
        assert drift == pytest.approx(measured["drift"], abs=1e-3)


def break_line(data: Path, k: int) -> bytes:
    """Damage a line of the list; returns the whole list."""
    path = data / "pairs.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines()
    lines[k] = lines[k][:-1]
    path.write_bytes(b"\n".join(lines))
    return whole


def test_assign_of_a_mended_line(
    data: Path, tmp_path: Path, one_step: list[object], call: Call
) -> None:
    whole = break_line(data, 1)
    rows = [json.loads(line) for line in whole.splitlines()]
    (data / "broken.png").write_bytes(b"no image")
    wrong = [rows[0], rows[1], rows[2] | {"image": "broken.png"}, rows[3] | {"image": "none.png"}]
    lines = [json.dumps(row) for row in wrong + rows[4:]]
    lines[1] = lines[1][:-1]
    (data / "pairs.jsonl").write_text("\n".join(lines))
    run, other = ["--data_root", data, *one_step], tmp_path / "w"
    assert call("assign", *run, "--output_dir", tmp_path / "run").code == 1
    failed = [row["line"] for row in rows_of(tmp_path / "run" / "failures.jsonl")]
    assert sorted(failed) == [2, 3, 4]  # a broken line, no image, no such file
    done = rows_of(tmp_path / "run" / "manifest.jsonl")
    (data / "pairs.jsonl").write_bytes(whole)
    assert call("assign", *run, "--output_dir", tmp_path / "run").code == 0
    after = rows_of(tmp_path / "run" / "manifest.jsonl")
    assert [row for row in after if row["index"] not in (1, 2, 3)] == done
    assert call("assign", *run, "--output_dir", other).code == 0
    assert [row["id"] for row in after] == [row["id"] for row in rows_of(other / "manifest.jsonl")]
    # what has a noise must stay where it is
    for changed in ([rows[1], rows[0], *rows[2:]], [rows[0] | {"prompt": "a digit"}, *rows[1:]]):
        (data / "pairs.jsonl").write_text("\n".join(map(json.dumps, changed)))
        said = call("assign", *run, "--output_dir", tmp_path / "run").error
        assert "no longer in the data set" in said
    (data / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows[:-1])))
    assert "samples: 6 then, 5 now" in call("assign", *run, "--output_dir", tmp_path / "run").error


def test_sft_of_a_mended_line(
    small_model: Path, small_assigned: Path, tmp_path: Path, call: Call
) -> None:
    source = shutil.copytree(small_assigned, tmp_path / "assigned") / "manifest.jsonl"
    rows = rows_of(source)
    for row in rows:
        row["target_image_path"] = str((small_assigned / row["target_image_path"]).resolve())
    lines = [json.dumps(row) for row in rows]

    def write(*lines: str) -> None:
        source.write_text("\n".join(lines))

    wrong = json.dumps(rows[2] | {"noise_path": "noises/none.safetensors"})
    write(lines[0], lines[1][:-1], wrong, *lines[3:])
    flags = ["--manifest_path", source, "--model_id", small_model, "--epochs", 1, "--batch_size", 4]
    flags += ["--preserve_pool_size", 4, "--lr", 1e-4, "--output_dir"]
    assert call("sft", *flags, tmp_path / "run").code == 1
    assert [row["line"] for row in rows_of(tmp_path / "run" / "failures.jsonl")] == [2, 3]
    write(*lines)
    ended = call("sft", *flags, tmp_path / "run")
    assert ended.code == 0 and "trained anew" in ended.err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["failed_lines"] == []
    assert call("sft", *flags, tmp_path / "whole").code == 0
    one, other = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)
    write(lines[0], json.dumps(rows[1] | {"prompt": "a digit"}), *lines[2:])
    assert "other settings (data:" in call("sft", *flags, tmp_path / "run").error


def test_em_of_a_mended_line(small_model: Path, data: Path, tmp_path: Path, call: Call) -> None:
    whole = break_line(data, 2)
    flags = ["--data_root", data, "--heldout_root", data, "--initial_model_id", small_model]
    flags += ["--num_cycles", 1, "--eval_samples", 10, "--assign_steps", 1, "--train_epochs", 1]
    flags += ["--preserve_pool_size", 4, "--num_images", 0, "--preserve_latent_weight", 0.5]
    assert call("em", *flags, "--work_dir", tmp_path / "run").code == 1
    (data / "pairs.jsonl").write_bytes(whole)
    ended = call("em", *flags, "--work_dir", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert "[cycle-01/sft] made anew" in ended.err and "assign] made anew" not in ended.err
    assert call("em", *flags, "--work_dir", tmp_path / "whole").code == 0
    one, other = (weights(tmp_path / name) for name in ("run", "whole"))
    for name, weight in other.items():
        torch.testing.assert_close(one[name], weight, rtol=0, atol=1e-4)
    pools = [load_file(tmp_path / name / "preserve.safetensors") for name in ("run", "whole")]
    assert torch.equal(pools[0]["latents"], pools[1]["latents"])
    rows = [json.loads(line) for line in whole.splitlines()]
    (data / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows[::-1])))
    said = call("em", *flags, "--work_dir", tmp_path / "run").err
    assert "no longer in the data set" in said and "[eval/base]" not in said
