"""A small pool with pictures, which several files of tests share."""

from pathlib import Path

import pytest

PROMPTS = ("a photo of the digit three", "a photo of the digit seven")
FLAGS = ["data", "--model_id", "tiny", "--num_inference_steps", 3, "--candidates", 2]
FLAGS += ["--reward", "thickness", "--reward", "digit:0.5", "--batch_size", 3]
FLAGS += ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `scale data` makes of 2 prompts, 2 images of each, 3 steps, with its ``FLAGS``."""
    from oneshot_fast.scale import main

    folder = tmp_path_factory.mktemp("data") / "run"
    assert main([*map(str, FLAGS), "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def data_flags() -> list[object]:
    """Flags of the command that ``made`` it, without a folder."""
    return list(FLAGS)
