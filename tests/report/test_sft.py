"""Pages of sft, made of a cycle of a real em run."""

from pathlib import Path

from html_pages import page

from oneshot_fast.report.page import number
from oneshot_fast.report.sft import write_sft_report
from oneshot_fast.runtime.files import read_json


def test_sft_report(em_copy: Path) -> None:
    folder = em_copy / "cycle-01/sft"
    write_sft_report(folder, {"model_id": "tiny"})
    html, summary = page(folder), read_json(folder / "summary.json")
    assert html.headings == ["Fit to the matched pairs", "Training", "How it was made", "Failures"]
    for name in ("matched_loss_before", "matched_loss_after"):
        assert number(summary[name]) in html.text
