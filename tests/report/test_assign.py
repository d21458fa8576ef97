"""Pages of assign, made of a cycle of a real em run."""

import json
from pathlib import Path

from html_pages import page

from oneshot_fast.report.assign import write_assign_report
from oneshot_fast.report.page import number
from oneshot_fast.runtime.files import read_json, write_jsonl


def test_assign_report(em_copy: Path) -> None:
    folder = em_copy / "cycle-01/assign"
    write_assign_report(folder, {"model_id": "tiny", "data_root": "/somewhere/photos/squares"})
    html, summary = page(folder), read_json(folder / "summary.json")
    assert html.headings[:3] == [
        "Loss",
        "Assigned examples",
        "Is the assigned noise still Gaussian?",
    ]
    assert "Noise assignment: photos/squares on tiny" in html.text
    assert "3 targets seed " in html.text and " device cpu " in html.text
    assert "None" not in html.text.split(" device cpu ")[0]  # the size that was not given
    assert number(summary["best_loss"]) in html.text
    assert "1 failed" in html.text
    row = json.loads((folder / "manifest.jsonl").read_text().splitlines()[0])
    for part in ("target", "base", "assigned"):
        name = "target" if part == "target" else f"{part} noise"
        data = (folder / "images" / f"{row['id']}-{part}.png").read_bytes()
        assert data in html.images[f"{name}: {row['prompt']}"]
    assert (folder / "diagnostics.json").exists()


def test_noise_that_is_no_rotation_is_called_damaged(em_copy: Path) -> None:
    folder = em_copy / "cycle-01/assign"
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    write_jsonl(folder / "manifest.jsonl", [row | {"seed": 1 + row["seed"]} for row in rows])
    write_assign_report(folder, {})
    assert "Damaged: stored noise." in page(folder).text
