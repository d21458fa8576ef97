"""A small em run, from whose folder the pages are made."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from oneshot_fast.runtime.files import write_jsonl

EVIL = "<script>alert('x')</script> & \"photo\""


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


@pytest.fixture(scope="session")
def em_run(tmp_path_factory: pytest.TempPathFactory, drawn: Any) -> Path:
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
    with drawn():
        assert main(flags.split()) == 1  # one record fails
    return root / "run"


@pytest.fixture
def em_copy(tmp_path: Path, em_run: Path) -> Path:
    """A copy of the em run's files that its report is made of."""
    return shutil.copytree(em_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))


@pytest.fixture
def evil() -> str:
    """A prompt of that run that must be escaped."""
    return EVIL
