"""Reports: made from real runs, self-contained, escaped, and whole without the optional parts."""

import base64
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from oneshot_fast.report.assign import write_assign_report
from oneshot_fast.report.em import write_em_report
from oneshot_fast.report.page import number, percent, picture
from oneshot_fast.report.sft import write_sft_report
from oneshot_fast.runtime.files import read_json, write_json, write_jsonl

EVIL = "<script>alert('x')</script> & \"photo\""
_VOID = {"meta", "img", "br", "link", "input", "hr"}


class Html(HTMLParser):
    """Checks that tags are balanced; collects tags, links, headings, images and visible text."""

    def __init__(self, text: str) -> None:
        """Parse ``text``."""
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.headings: list[str] = []
        self.images: dict[str, list[bytes]] = {}
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag and its links."""
        self.tags.add(tag)
        values = {name: value or "" for name, value in attrs}
        self.links += [values[name] for name in ("src", "href", "xlink:href") if name in values]
        if tag == "img":
            data = base64.b64decode(values["src"].split(",", 1)[1])
            self.images.setdefault(values["alt"], []).append(data)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag that closes itself, as in SVG."""
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        """Check the balance."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect text."""
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if "style" not in self.open:
            self.words.append(data)


def page(folder: Path) -> Html:
    """The report in ``folder``, which needs nothing from outside."""
    html = Html((folder / "report.html").read_text(encoding="utf-8"))
    assert "script" not in html.tags
    assert all(link.startswith(("data:image/", "#")) for link in html.links)
    for images in html.images.values():
        for data in images:
            Image.open(io.BytesIO(data)).verify()
    return html


def write_pairs(root: Path, prompts: list[str]) -> Path:
    """A data set of coloured 64 x 64 squares."""
    root.mkdir()
    for k in range(len(prompts)):
        Image.new("RGB", (64, 64), (40 * k, 90, 200)).save(root / f"{k}.png")
    write_jsonl(
        root / "pairs.jsonl",
        [{"prompt": prompt, "image": f"{k}.png"} for k, prompt in enumerate(prompts)],
    )
    return root


@pytest.fixture(scope="module")
def em_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small em run on data that no classifier knows; tests must not change it."""
    from oneshot_fast.em import main

    root = tmp_path_factory.mktemp("em")
    train = write_pairs(root / "squares", [EVIL, "a square", "a square"])
    with (train / "pairs.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": EVIL, "image": "<b>absent</b>.png"}) + "\n")
    heldout = write_pairs(root / "heldout", ["a held-out square", EVIL])
    flags = (
        f"--work_dir {root / 'run'} --data_root {train} --heldout_root {heldout} "
        "--initial_model_id tiny --num_cycles 2 --assign_steps 2 --train_epochs 2 "
        "--train_lr 1e-4 --preserve_pool_size 4 --eval_samples 10 --compare_direct"
    )
    assert main(flags.split()) == 1  # one record fails
    return root / "run"


@pytest.fixture
def em_copy(tmp_path: Path, em_run: Path) -> Path:
    """A copy of the em run's files that its report is made of."""
    return shutil.copytree(em_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))


def test_em_report_has_its_sections_in_order(em_run: Path) -> None:
    html = page(em_run)
    assert html.headings == [
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


def test_prompts_and_reasons_are_escaped(em_run: Path) -> None:
    text = (em_run / "report.html").read_text(encoding="utf-8")
    html = page(em_run)
    assert EVIL in html.text  # as text, not as tags
    assert "&lt;script&gt;" in text
    assert "<b>absent</b>.png" in html.text and "b" not in html.tags


def test_measures_of_a_classifier_are_judged(em_copy: Path) -> None:
    summary = read_json(em_copy / "summary.json")
    noise = summary["random_noise"]
    for name, measures in noise.items():
        measures |= {"accuracy": 0.95, "frechet_distance": 80.0, "diversity": 0.3}
        if name in ("cycle-02", "final"):
            measures |= {"accuracy": 0.88, "frechet_distance": 20.0, "diversity": 0.1}
    summary |= {"real": {"accuracy": 0.991, "diversity": 0.25}, "best_cycle": 1}
    write_json(em_copy / "summary.json", summary)
    write_em_report(em_copy, {})
    text, html = (em_copy / "report.html").read_text(encoding="utf-8"), page(em_copy)
    assert "95.0 %" in html.text and "88.0 %" in html.text and "99.1 %" in html.text
    assert '<td class="bad">-7.0 points</td>' in text
    assert '<td class="good">-75.0 %</td>' in text
    assert '<td class="bad">-66.7 %</td>' in text  # less than half of the real diversity
    assert "checkpoint-best is cycle 1" in html.text


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


def test_sft_report(em_copy: Path) -> None:
    folder = em_copy / "cycle-01/sft"
    write_sft_report(folder, {"model_id": "tiny"})
    html, summary = page(folder), read_json(folder / "summary.json")
    assert html.headings == ["Fit to the matched pairs", "Training", "How it was made", "Failures"]
    for name in ("matched_loss_before", "matched_loss_after"):
        assert number(summary[name]) in html.text


@pytest.mark.parametrize("values", [1, 256])  # a flat image has few bytes, noise has many
def test_large_images_are_embedded_small(tmp_path: Path, values: int) -> None:
    noise = torch.randint(0, values, (512, 512, 3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "large.png")
    shown = picture(tmp_path / "large.png", 192)
    data = base64.b64decode(shown.uri.split(",", 1)[1])
    assert Image.open(io.BytesIO(data)).size == (192, 192)
    assert len(data) < 50_000 and not shown.pixelated


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (1234567.0, "1,234,567"), (232.7075, "232.7"), (7.0369, "7.037"),
        (-0.04356, "-0.04356"), (5.36e-7, "5.4e-07"), (float("nan"), "nan"),
    ],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_percent() -> None:
    assert percent(0.5, 2.0) == "-75.0 %" and percent(3.0, 2.0) == "+50.0 %"
    assert percent(1.0, 0.0) == ""
