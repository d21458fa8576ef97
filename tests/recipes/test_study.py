"""The quick study: all parts run, equal budgets, a table, and a second run does nothing again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oneshot_fast.recipes.study.cells import cells
from oneshot_fast.recipes.study.subjects import SUBJECTS
from oneshot_fast.study import main


@pytest.mark.timeout(600)
def test_the_quick_study_runs_and_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--quick", "--output_dir", str(tmp_path / "study")]
    assert main(argv) == 0
    text = (tmp_path / "study" / "study.md").read_text(encoding="utf-8")
    found = json.loads((tmp_path / "study" / "study.json").read_text())["results"]
    for name in ("digits", "shapes"):
        results = found[name]
        assert set(results["cells"]) == {cell.name for cell in cells(SUBJECTS[name], quick=True)}
        for label, rows in results["cells"].items():
            assert f"| {label} |" in text
            assert rows[0]["nfe"] == pytest.approx(192, abs=6) and rows[0]["drift"] > 0
        assert results["cells"]["search 32"][0]["typicality"]["nearest noises"]["value"] > 0
        curve = results["speeds"]["sphere | auto"]
        assert curve == sorted(curve, reverse=True) and curve[-1] < curve[0]
        for plot in ("quality", "trade"):
            assert (tmp_path / "study" / "plots" / f"{name}-{plot}.png").stat().st_size > 5000
    results = [*(tmp_path / "study").glob("*/results/*.json")]
    made = [path.stat().st_mtime_ns for path in results]
    target = tmp_path / "study" / "digits" / "targets" / "00000.png"
    lost = target.read_bytes()
    target.unlink()  # all are drawn again, or fewer would be trained on
    capsys.readouterr()
    assert main(argv) == 0 and target.read_bytes() == lost
    assert [path.stat().st_mtime_ns for path in results] == made
    assert "sft" not in capsys.readouterr().err
    assert (tmp_path / "study" / "study.md").read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", SUBJECTS)
def test_all_trainings_have_the_same_budget(name: str) -> None:
    found = cells(SUBJECTS[name], quick=False)
    assert len({cell.name for cell in found}) == len(found) > 20
    for cell in found:
        rows = 2 if cell.preserve else 1
        spent = cell.assign_nfe + 3 * rows * cell.cycles * cell.epochs(192)
        assert abs(spent - 192) <= 10, cell.name
