"""The quick study: all parts run, equal budgets, a table, and a second run does nothing again."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.recipes.student import distilled
from oneshot_fast.recipes.study import few_step, outcome, run
from oneshot_fast.recipes.study.cells import cells
from oneshot_fast.recipes.study.few_step import DiffusionLoss
from oneshot_fast.recipes.study.outcome import BESIDE, ROWS, outcome_table
from oneshot_fast.recipes.study.subjects import SUBJECTS
from oneshot_fast.runtime.seeds import derived_seed
from oneshot_fast.study import main
from oneshot_fast.training.batch import Batch, Rows

FEW = {"samples": 20}
LOSS = "diffusion loss at the sampler's timesteps"


@pytest.fixture
def quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow generators, and a tenth of the samples that --quick draws."""
    for name, recipe in SUBJECTS.items():  # letters have a recipe of their own
        monkeypatch.setitem(SUBJECTS, name, dataclasses.replace(recipe, width=8))
    for module, name in ((run, "study"), (outcome, "outcomes"), (few_step, "few_step")):
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, partial(lambda f, *a, **k: f(*a, **k | FEW), whole))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("plots", "quicker")
def test_the_quick_study_runs_and_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--quick", "--datasets", "shapes", "--output_dir", str(tmp_path / "study")]
    assert main(argv) == 0
    text = (tmp_path / "study" / "study.md").read_text(encoding="utf-8")
    found = json.loads((tmp_path / "study" / "study.json").read_text())["results"]
    assert found.keys() == {"shapes"}
    results = found["shapes"]
    assert set(results["cells"]) == {cell.name for cell in cells(SUBJECTS["shapes"], quick=True)}
    for label, rows in results["cells"].items():
        assert f"| {label} |" in text
        assert rows[0]["nfe"] == pytest.approx(192, abs=6) and rows[0]["drift"] > 0
    assert results["cells"]["search 32"][0]["typicality"]["nearest noises"]["value"] > 0
    curve = results["speeds"]["sphere | auto"]
    assert curve == sorted(curve, reverse=True) and curve[-1] < curve[0]
    for plot in ("quality", "trade"):
        assert (tmp_path / "study" / "plots" / f"shapes-{plot}.png").stat().st_size > 5000
    kept = [*(tmp_path / "study").glob("*/results/*.json")]
    made = [path.stat().st_mtime_ns for path in kept]
    target = tmp_path / "study" / "shapes" / "targets" / "00000.png"
    lost = target.read_bytes()
    target.unlink()  # all are drawn again, or fewer would be trained on
    capsys.readouterr()
    assert main(argv) == 0 and target.read_bytes() == lost
    assert [path.stat().st_mtime_ns for path in kept] == made
    assert "sft" not in capsys.readouterr().err
    assert (tmp_path / "study" / "study.md").read_text(encoding="utf-8") == text


@pytest.mark.slow
@pytest.mark.usefixtures("quicker")
def test_whole_runs_are_judged_by_a_classifier_that_nothing_was_chosen_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # of those that are em with other options, one
    those = ("em, best of 32", "em, usual rotation", "direct SFT")
    beside = {name: BESIDE[name] for name in (*those, "self-training")}
    monkeypatch.setattr(outcome, "BESIDE", beside)
    argv = ["--quick", "--outcome", "--datasets", "digits", "--output_dir", str(tmp_path)]
    assert main(argv) == 0
    found = json.loads((tmp_path / "outcome.json").read_text())["results"]["digits"]
    text = (tmp_path / "outcome.md").read_text()
    assert found["rows"].keys() == {**ROWS, **beside}.keys()
    for name, (row,) in found["rows"].items():
        change = 100 * (row["frechet_distance"] / found["base"]["frechet_distance"] - 1)
        assert f"| {name} | {change:+.0f} % | {change:+.0f} % |" in text
    assert found["rows"]["em, its defaults"][0]["recipe"]["trials"]
    assert not [*(tmp_path / "digits" / "work").iterdir()]
    kept = [*(tmp_path / "digits" / "outcome").iterdir()]
    made = [path.stat().st_mtime_ns for path in kept]
    assert main(argv) == 0 and made == [path.stat().st_mtime_ns for path in kept]


def test_flags_without_an_effect_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data_seeds", "2", "--output_dir", str(tmp_path)]) == 2
    assert "--data_seeds has no effect without --outcome" in capsys.readouterr().err
    assert main(["--quick", "--seeds", "2", "--output_dir", str(tmp_path)]) == 2
    assert "--seeds has no effect with --quick" in capsys.readouterr().err
    assert main(["--outcome", "--budget", "200", "--output_dir", str(tmp_path)]) == 2
    assert "--budget has no effect with --outcome" in capsys.readouterr().err
    assert main(["--few_step", "--datasets", "digits", "--output_dir", str(tmp_path)]) == 2
    assert "--datasets has no effect with --few_step" in capsys.readouterr().err
    assert main(["--few_step", "--outcome", "--output_dir", str(tmp_path)]) == 2
    assert "give one of --outcome and --few_step" in capsys.readouterr().err


def test_the_diffusion_loss_is_that_of_diffusers_training() -> None:
    generator: Any = load_generator("tiny-teacher", device="cpu")
    generator = FewStepGenerator.over(generator, 4)
    noise, latents = torch.randn(2, 3, 4, 8, 8)
    told = generator.told(["a handwritten digit one"] * 3, [4, 5, 6])
    loss = DiffusionLoss([249, 999])
    found = loss(generator, Batch(matching=Rows(noise, told, {"latents": latents})))["matching"]
    drawn = [[249, 999][derived_seed(k, "timestep") % 2] for k in (4, 5, 6)]
    assert len({*drawn}) == 2
    scheduler = DDPMScheduler.from_config(generator.pipe.scheduler.config)
    t = torch.tensor(drawn)
    added = {"text_embeds": told.pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 3)}
    x = scheduler.add_noise(latents, noise, t)
    output = generator.pipe.unet(x, t, told.embeds, added_cond_kwargs=added).sample
    assert found.item() == pytest.approx((output - noise).square().mean().item(), rel=1e-5)


@pytest.mark.usefixtures("quicker")
def test_the_few_step_study_runs_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_step, "SUBJECTS", {few_step.STUDENT: (1, (1e-3,))})
    monkeypatch.setattr(few_step, "distilled", lambda *of: "tiny")
    rows = {name: few_step.ROWS[name] for name in ("matched, through the loop", LOSS)}
    monkeypatch.setattr(few_step, "ROWS", rows)
    argv = ["--few_step", "--quick", "--output_dir", str(tmp_path)]
    assert main(argv) == 0
    found = json.loads((tmp_path / "few_step.json").read_text())["results"]["student"]
    text = (tmp_path / "few_step.md").read_text()
    for name, (row,) in found["rows"].items():
        assert row["updates"] == 3 and row["lr"] == 1e-3
        assert f"| {name} | 3 | {row['evaluations']} | {row['lr']:g} |" in text
    (base,), (targets,) = found["base"], found["targets"]
    assert base["frechet_distance"] > 2 * targets["frechet_distance"] > 0
    with Image.open(tmp_path / "student" / "samples.png") as picture:
        assert picture.size == (640, 64 * (1 + len(rows)))
    kept = [*(tmp_path / "student" / "results").glob("*.json")]
    made = [path.stat().st_mtime_ns for path in kept]
    assert main(argv) == 0 and made == [path.stat().st_mtime_ns for path in kept]


def test_a_student_is_distilled_once(tmp_path: Path) -> None:
    (first, made), (again, kept) = (
        (folder, (folder / "model_index.json").stat().st_mtime_ns)
        for folder in (distilled(1, 1, 10, tmp_path) for _ in range(2))
    )
    assert first == again and made == kept
    one, other = (load_generator(name).denoiser.parameters() for name in (first, "tiny-teacher"))
    assert not all(map(torch.equal, one, other))


def test_tables_have_intervals_over_all_runs_and_the_worst() -> None:
    base = {"frechet_distance": 10.0, "accuracy": 0.5, "diversity": 0.2}
    runs = [
        {**base, "frechet_distance": x, "best_cycle": k, "data_seed": k % 2}
        for k, x in enumerate((7.0, 8.5, 9.0, 9.5))
    ]
    table = outcome_table({"accuracy": 0.9, "diversity": 0.3}, base, {"em": runs})
    assert table[2] == "| real images | | | 0.900 | 0.300 | |"
    *_, row = table
    assert row == "| em | -15 ± 64 % | -5 % | +0.000 ± 0.000 | +0.000 ± 0.000 | 1 of 4 |"


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_all_trainings_have_the_same_budget(name: str) -> None:
    found = cells(SUBJECTS[name], quick=False)
    assert len({cell.name for cell in found}) == len(found) > 20
    for cell in found:
        rows = 2 if cell.preserve else 1
        spent = cell.assign_nfe + 3 * rows * cell.cycles * cell.epochs(192)
        assert abs(spent - 192) <= 10, cell.name
