"""The evaluate command: two models on the same noises, pages and pictures, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from html_pages import page
from PIL import Image

from oneshot_fast.errors import UserError
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.jobs.evaluate.run import EvaluateRun

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def worse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded generator with noise on its weights."""
    generator, folder = load_generator("tiny"), tmp_path_factory.mktemp("models") / "worse"
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in generator.denoiser.parameters():
            weight.mul_(1 + 0.1 * torch.randn(weight.shape, generator=draw))
    generator.save(folder)
    return folder


def flags(folder: Path, data: Path, *models: object) -> list[object]:
    return [
        "--model_id", "tiny", *models, "--data_root", data, "--output_dir", folder,
        "--eval_samples", 40,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, worse: Path) -> tuple[Path, Path]:
    """A finished run on images of tiny's own style, one of which is missing; and its data."""
    from oneshot_fast.evaluate import main

    root = tmp_path_factory.mktemp("evaluate")
    tiny, data = load_generator("tiny"), root / "digits"
    data.mkdir()
    prompts = [f"a handwritten digit {word}" for word in ("one", "two", "three", "four")] * 5
    lines = []
    for k, (prompt, image) in enumerate(zip(prompts, tiny.generate(prompts, seed=7), strict=True)):
        image.save(data / f"{k}.png")
        lines.append(json.dumps({"prompt": prompt, "image": f"{k}.png"}))
    lines.append(json.dumps({"prompt": prompts[0], "image": "absent.png"}))
    (data / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert main([str(flag) for flag in flags(root / "run", data, worse)]) == 1
    return root / "run", data


def test_models_are_measured_on_the_same_noises(evaluated: tuple[Path, Path], worse: Path) -> None:
    folder, _ = evaluated
    summary = json.loads((folder / "summary.json").read_text())
    assert [*summary["models"]] == ["tiny", str(worse)] and summary["failed"] == 1
    assert "absent.png" in (folder / "failures.jsonl").read_text()
    measured, said = summary["models"][str(worse)], summary["verdicts"][str(worse)]
    assert said["energy_score"]["word"] == said["frechet_distance"]["word"] == "worse"
    assert (
        said["energy_score"]["after"]
        == measured["energy_score"]
        > summary["models"]["tiny"]["energy_score"]
    )
    assert measured["errors"]["precision"] >= 0 and measured["drift"] > 0
    assert summary["measured_by"]["real"] == 20 and not summary["measured_by"]["is_weak"]
    assert summary["real"]["errors"]["prompt_diversity"] > 0


def test_the_page_answers_first_and_the_picture_has_a_row_per_model(
    evaluated: tuple[Path, Path], worse: Path
) -> None:
    folder, _ = evaluated
    html = page(folder)
    assert html.headings[:2] == ["Which is better?", f"Measures: {worse.parent.name}/worse"]
    start = html.text.index("Which is better?")
    assert (
        "is worse than the base: energy score for 20 held-out images"
        in html.text[start : start + 250]
    )
    assert "95 % interval" in html.text and "Energy score ↓ lower is better" in html.text
    assert len(html.images["tiny: a handwritten digit one"]) == 2  # of the first eight noises
    with Image.open(folder / "comparison.png") as image:
        assert image.size == (8 * 64, 2 * 64)


def test_a_repeated_command_measures_nothing_and_what_is_lost_is_made_again(
    evaluated: tuple[Path, Path], worse: Path, call: Call, tmp_path: Path
) -> None:
    folder, data = evaluated
    copy = shutil.copytree(folder, tmp_path / "run")
    kept = {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors")}
    ended = call("evaluate", *flags(copy, data, worse))
    assert ended.code == 1 and "worse than the base" in ended.out and "-> " in ended.out
    assert kept == {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors")}
    before = json.loads((copy / "eval/model-2.json").read_text())
    (copy / "eval/model-2.safetensors").unlink()
    assert call("evaluate", *flags(copy, data, worse)).code == 1
    assert json.loads((copy / "eval/model-2.json").read_text()) == before
    ended = call("evaluate", *flags(copy, data))
    assert ended.code == 2 and "other settings (models" in ended.err


def test_the_dry_run_writes_nothing(data: Path, worse: Path, call: Call, tmp_path: Path) -> None:
    ended = call("evaluate", *flags(tmp_path / "run", data, worse), "--dry_run")
    assert ended.code == 0 and not (tmp_path / "run").exists()
    assert "in all, for 2 models of 40 images each: " in ended.out
    assert "features: the classifier of these prompts" in ended.out


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--eval_samples 9", "eval_samples must be at least 10"),
        ("--features fid", "no features 'fid'; there are clip, dinov2"),
        ("--model_id tiny tiny", "model tiny is named twice"),
        ("--judge nobody", "no reward 'nobody'"),
        ("--data_root /nowhere", "/nowhere: no such folder"),
    ],
)
def test_bad_flags(data: Path, call: Call, tmp_path: Path, flag: str, said: str) -> None:
    ended = call("evaluate", *flags(tmp_path / "run", data), *flag.split())
    assert ended.code == 2 and said in ended.err and not (tmp_path / "run").exists()


def test_models_of_other_noises_are_refused(tiny: Any, data: Path, tmp_path: Path) -> None:
    class Other(type(tiny)):
        def noise_shape(self, height: int, width: int) -> tuple[int, int, int]:
            return 4, 2, 2

    other = Other.__new__(Other)
    other.__dict__ = tiny.__dict__
    run = EvaluateRun({"a": tiny, "b": other}, [], tmp_path / "run")
    with pytest.raises(UserError, match="cannot be compared on the same noises; evaluate them"):
        run.run()


def test_models_whose_names_end_alike_are_told_apart(
    evaluated: tuple[Path, Path], worse: Path, tmp_path: Path, call: Call
) -> None:
    same = tmp_path / worse.parent.name / worse.name
    shutil.copytree(worse, same)
    ended = call("evaluate", *flags(tmp_path / "run", evaluated[1], worse, same))
    assert ended.code == 1, ended.err
    page = (tmp_path / "run" / "report.html").read_text()
    for model in (worse, same):
        assert str(model) in ended.out and f"Measures: {model}" in page
