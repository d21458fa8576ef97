"""Pages of em: made from real runs, escaped, and whole without the optional parts."""

import json
import shutil
from pathlib import Path

from html_pages import page

from oneshot_fast.report.em import write_em_report
from oneshot_fast.report.page import number
from oneshot_fast.runtime.files import read_json, write_json


def test_em_report_has_its_sections_in_order(em_run: Path) -> None:
    html = page(em_run)
    assert html.headings == [
        "Is it better?",
        "Quality on random noise",
        "Held-out pairs",
        "Matching loss, cycle by cycle",
        "Assigned examples of cycle 2",
        "Training",
        "Is the assigned noise of cycle 2 still Gaussian?",
        "How it was made",
        "Failures",
    ]
    assert "EM: tiny aligned with" in html.text
    assert len((em_run / "report.html").read_bytes()) < 3_000_000


def test_em_report_shows_the_numbers_of_the_summary(em_run: Path) -> None:
    html, summary = page(em_run), read_json(em_run / "summary.json")
    for name in ("base", "cycle-01", "cycle-02", "direct"):
        assert number(summary["random_noise"][name]["diversity"]) in html.text
    for cycle in summary["cycles"]:
        assert number(cycle["assign"]["best_loss"]) in html.text
        assert number(cycle["sft"]["matched_loss_after"]) in html.text
    base, final = (summary["heldout"][name]["best_loss"] for name in ("base", "final"))
    change = 100 * (final / base - 1)
    assert f"{abs(change):.1f} % {'lower' if change < 0 else 'higher'}" in html.text
    assert "Prompt accuracy" not in html.text  # no classifier knows these images


def test_em_report_embeds_grids_and_images_unchanged(em_run: Path) -> None:
    html = page(em_run)
    grids = [name for name in html.images if name.startswith("samples: ")]
    shown = ["samples: base", "samples: cycle 2 (final)", "samples: direct SFT"]
    assert grids == [*shown, "samples: cycle 1"]  # the last is folded away
    for name, label in (
        ("base", "base"),
        ("cycle-02", "cycle 2 (final)"),
        ("direct", "direct SFT"),
    ):
        assert html.images[f"samples: {label}"] == [(em_run / f"eval/{name}.png").read_bytes()]
    row = json.loads((em_run / "heldout-final/manifest.jsonl").read_text().splitlines()[0])
    final = (em_run / "heldout-final/images" / f"{row['id']}-assigned.png").read_bytes()
    base = (em_run / "heldout-base/images" / f"{row['id']}-assigned.png").read_bytes()
    assert html.images[f"final generator: {row['prompt']}"] == [final]
    assert html.images[f"base generator: {row['prompt']}"] == [base]


def test_prompts_and_reasons_are_escaped(em_run: Path, evil: str) -> None:
    text = (em_run / "report.html").read_text(encoding="utf-8")
    html = page(em_run)
    assert evil in html.text  # as text, not as tags
    assert "&lt;script&gt;" in text
    assert "<b>absent</b>.png" in html.text and "b" not in html.tags


def test_measures_of_a_classifier_are_judged(em_copy: Path) -> None:
    summary = read_json(em_copy / "summary.json")
    noise = summary["random_noise"]
    for name, measures in noise.items():
        measures |= {"accuracy": 0.95, "frechet_distance": 80.0, "diversity": 0.3}
        if name in ("cycle-02", "final"):
            measures |= {"accuracy": 0.88, "frechet_distance": 20.0, "diversity": 0.1}
    summary |= {"real": {"accuracy": 0.991, "diversity": 0.25}, "best_cycle": 1, "verdicts": {}}
    write_json(em_copy / "summary.json", summary)
    write_em_report(em_copy, {})
    text, html = (em_copy / "report.html").read_text(encoding="utf-8"), page(em_copy)
    assert "95.0 %" in html.text and "88.0 %" in html.text and "99.1 %" in html.text
    assert '<td class="bad">-7.0 points</td>' in text
    assert '<td class="good">-75.0 %</td>' in text
    assert '<td class="bad">-66.7 %</td>' in text  # less than half of the real diversity


def test_whether_it_is_better_by_how_much_and_how_sure_comes_first(em_copy: Path) -> None:
    summary = read_json(em_copy / "summary.json")
    worse = {
        "measure": "energy_score",
        "before": 10.0,
        "after": 12.0,
        "error": 0.5,
        "word": "worse",
    }
    recall = {"measure": "recall", "before": 0.5, "after": 0.4, "error": 0.02, "word": "worse"}
    better = worse | {"after": 9.0, "word": "better"}
    summary["verdicts"] = {
        "cycle-01": {"energy_score": better},
        "cycle-02": {"energy_score": worse, "recall": recall},
    }
    spread = {"measure": "prompt_diversity", "before": 4.0, "after": 3.0}
    summary["verdicts"]["cycle-02"] |= {
        "prompt_diversity": spread | {"error": 0.1, "word": "lower"},
        "kid": worse | {"measure": "kid", "error": 5.0, "word": "cannot be told apart"},
    }
    write_json(em_copy / "summary.json", summary | {"best_cycle": 1})
    write_em_report(em_copy, {})
    html = page(em_copy)
    text = (em_copy / "report.html").read_text(encoding="utf-8")
    assert "<td>-25 %</td>" in text and "<td>+2.000, not told apart</td>" in text
    assert '<td class="bad">+20 %</td>' in text
    start = html.text.index("Is it better?")
    first = html.text[start : html.text.index("Quality on random noise")]
    assert (
        "Cycle 1, checkpoint-best, is better than the base: energy score for 2 held-out images "
        "10.00 → 9.000, -10 % (95 % interval -20 to -0 %)." in first
    )
    assert "The final generator is worse than the base: " in first
    assert "+20 % (95 % interval +10 to +30 %)" in first and "worse: recall." in first
    assert "a weak judge" in first and "--features clip" in first
    evil = summary["measured_by"]["prompts"][0]
    for row in ("base", "cycle 1 (best)", "cycle 2 (final)"):  # the same noises, one above another
        assert f"{row}: {evil}" in html.images
    write_json(em_copy / "summary.json", summary | {"best_cycle": 0})
    write_em_report(em_copy, {})
    said = page(em_copy).text
    assert "Is it better? Nothing beat the base by a standard error: checkpoint-" in said


def test_missing_parts_are_left_out(em_copy: Path) -> None:
    summary = read_json(em_copy / "summary.json")
    for name in ("heldout", "real", "best_cycle", "settings", "seconds", "failed"):
        summary.pop(name, None)
    del summary["random_noise"]["direct"]
    write_json(em_copy / "summary.json", summary)
    for name in ("eval", "heldout-base", "heldout-final", "direct", "failures.jsonl"):
        path = em_copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(em_copy / "cycle-02/assign/noises")
    shutil.rmtree(em_copy / "cycle-02/assign/images")
    for cycle in ("cycle-01", "cycle-02"):
        (em_copy / cycle / "sft/history.jsonl").unlink()
    write_em_report(em_copy, {})
    html = page(em_copy)
    assert html.headings == [
        "Is it better?",
        "Quality on random noise",
        "Matching loss, cycle by cycle",
        "How it was made",
        "Failures",
    ]
    assert "No record failed." in html.text and html.images == {}


def test_report_made_again_is_the_same(em_copy: Path) -> None:
    settings = {"initial_model_id": "tiny", "data_root": "photos/squares"}
    write_em_report(em_copy, settings)
    first = (em_copy / "report.html").read_bytes()
    write_em_report(em_copy, settings)
    assert (em_copy / "report.html").read_bytes() == first
