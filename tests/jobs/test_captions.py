"""Several captions per image, and none: which one is assigned, and trained on in which epoch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from samples import rows_of
from shard_samples import parquet, png, tar, write

from oneshot_fast.data.manifests import MatchedPair, read_manifest
from oneshot_fast.data.sources import open_pairs
from oneshot_fast.errors import UserError
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.run import SftRun
from oneshot_fast.training.trainer import Trainer

Call = Callable[..., Any]
OF_EACH = 3


@pytest.fixture
def listed(data: Path) -> Path:
    """The small data set with three captions for each image but the last."""
    rows = rows_of(data / "pairs.jsonl")
    for row in rows[:-1]:
        row["prompt"] = [
            row["prompt"],
            *(f"{row['prompt']} in {ink} ink" for ink in ("red", "blue")),
        ]
    (data / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


Assign = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def assign(small_model: Path, listed: Path, call: Call) -> Assign:
    """Assigns in a folder; returns the manifest's rows."""

    def run(folder: Path, *more: object) -> list[dict[str, Any]]:
        flags = ["--model_id", small_model, "--steps", 1, "--num_images", 0, *more]
        ended = call("assign", "--data_root", listed, "--output_dir", folder, *flags)
        assert ended.code == 0, ended.err
        return rows_of(folder / "manifest.jsonl")

    return run


def test_assign_draws_one_by_the_seed_and_says_which(
    listed: Path, tmp_path: Path, assign: Assign
) -> None:
    lines = rows_of(listed / "pairs.jsonl")
    rows = [assign(tmp_path / str(k), "--seed", k) for k in range(2)]
    for found in rows:
        assert [row["prompts"] for row in found[:-1]] == [line["prompt"] for line in lines[:-1]]
        assert all(row["prompt"] in row["prompts"] for row in found[:-1])
        assert found[-1]["prompt"] == lines[-1]["prompt"] and "prompts" not in found[-1]
    assert len({row["prompt"] for found in rows for row in found}) > len(lines)
    again = assign(tmp_path / "again", "--seed", 1, "--batch_size", 2)
    assert [row["prompt"] for row in again] == [row["prompt"] for row in rows[1]]
    pairs, failures = read_manifest(tmp_path / "1" / "manifest.jsonl")
    assert not failures and [pair.prompt for pair in pairs] == [row["prompt"] for row in rows[1]]
    assert pairs[0].prompts == tuple(lines[0]["prompt"]) and pairs[-1].prompts == ()


def test_all_forms_of_shards_have_them(tmp_path: Path) -> None:
    texts = ["a cat", "one cat"]
    body = json.dumps({"caption": texts}).encode()
    write(tmp_path / "tar" / "0.tar", tar(("0.png", png(1)), ("0.json", body)))
    write(
        tmp_path / "parquet" / "0.parquet", parquet([{"image": {"bytes": png(1)}, "text": texts}])
    )
    for name in ("tar", "parquet"):
        (record,) = open_pairs(tmp_path / name)
        assert record.prompts == tuple(texts) and record.prompt == "a cat"


def train(
    model: Path,
    folder: Path,
    pairs: list[MatchedPair],
    seen: list[list[str]] | None = None,
    **options: Any,
) -> Generator:
    """Train; ``seen`` takes the prompts of every step."""
    cache = options.pop("cache", None)
    generator = load_generator(model, master_weights=True)
    if cache:
        generator.use_cache(cache)
    small = SftOptions(epochs=4, batch_size=4, lr=1e-4, preserve_pool_size=4, **options)
    run = SftRun(generator, pairs, folder, small, seed=1, save_minutes=0, offload_encoders=True)
    encode, batch = generator.encode_prompts, run.batch

    def watched(rows: list[int], step: int) -> Any:
        told: list[list[str]] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generator, "encode_prompts", lambda x: told.append([*x]) or encode(x))
            made = batch(rows, step)
        if seen is not None:
            seen.append(told[0])
        return made

    run.batch = watched  # type: ignore[method-assign]
    run.run()
    return generator


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint-final/unet/diffusion_pytorch_model.safetensors")


def test_sft_draws_one_per_epoch(
    small_model: Path, tmp_path: Path, assign: Assign, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropout = 0.4
    assign(tmp_path / "assigned")
    pairs, _ = read_manifest(tmp_path / "assigned" / "manifest.jsonl")
    seen: list[list[str]] = []
    train(
        small_model,
        tmp_path / "whole",
        pairs,
        seen,
        caption_dropout=dropout,
        cache=tmp_path / "cache",
    )
    told = rows_of(tmp_path / "whole" / "captions.jsonl")
    assert [row["epoch"] for row in told] == [1, 2, 3, 4]
    texts = {pair.id: pair.prompts or (pair.prompt,) for pair in pairs}
    for epoch, row in enumerate(told):
        drawn = ["" if k < 0 else texts[name][k] for name, k in row["captions"].items()]
        assert sorted(drawn) == sorted(seen[2 * epoch] + seen[2 * epoch + 1])
    numbers = [tuple(row["captions"].values()) for row in told]
    assert len({*numbers}) == 4  # of other epochs, other ones
    dropped = sum(number < 0 for row in numbers for number in row)
    assert 4 <= dropped <= 15  # of 24
    assert {number for row in numbers for number in row} == {-1, 0, 1, 2}

    update = Trainer.update

    def dying(self: Trainer) -> None:
        if self.step == 5:
            raise KeyboardInterrupt
        update(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "update", dying)
        train(small_model, tmp_path / "parts", pairs, caption_dropout=dropout)
    train(small_model, tmp_path / "parts", pairs, caption_dropout=dropout, cache=tmp_path / "cache")
    one, two = (weights(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    told, again = ((tmp_path / x / "captions.jsonl").read_bytes() for x in ("whole", "parts"))
    assert told == again


def test_dropout_of_all_or_of_nothing(
    small_model: Path, small_assigned: Path, tmp_path: Path, call: Call
) -> None:
    pairs, _ = read_manifest(small_assigned / "manifest.jsonl")
    seen: list[list[str]] = []
    train(small_model, tmp_path / "all", pairs, seen, caption_dropout=1.0)
    assert {text for step in seen for text in step} == {""}
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match=r"caption_dropout is .*; give a probability"):
            SftOptions(caption_dropout=wrong).check()
    prompts = tmp_path / "p.txt"
    prompts.write_text("a digit")
    flags = ["--model_id", "tiny", "--output_dir", tmp_path / "r", "--caption_dropout", 0.1]
    said = call("sft", *flags, "--reward", "thickness", "--prompt_file", prompts).error
    assert "leave caption_dropout out" in said


def test_em_takes_both(small_model: Path, listed: Path, tmp_path: Path, call: Call) -> None:
    flags = ["--data_root", listed, "--initial_model_id", small_model, "--num_cycles", 2]
    flags += ["--eval_samples", 10, "--assign_steps", 1, "--train_epochs", 1, "--num_images", 0]
    flags += ["--preserve_pool_size", 4, "--caption_dropout", 0.5, "--work_dir", tmp_path / "em"]
    ended = call("em", *flags)
    assert ended.code == 0, ended.err
    rows = [rows_of(tmp_path / f"em/cycle-0{k}/sft/captions.jsonl") for k in (1, 2)]
    assert all(-1 in found[0]["captions"].values() for found in rows)
    prompts = [
        [row["prompt"] for row in rows_of(tmp_path / f"em/cycle-0{k}/assign/manifest.jsonl")]
        for k in (1, 2)
    ]
    assert prompts[0] != prompts[1]  # each cycle draws anew
