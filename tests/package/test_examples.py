"""The examples and the code in the documentation do what they say."""

import importlib.util
import re
from pathlib import Path

import pytest

from oneshot_fast.data.images import load_image

ROOT = Path(__file__).parents[2]


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_noise_rotation():
    losses, error = example("noise_rotation").main(steps=20)
    assert losses[-1] < 0.3 * losses[0]
    assert error < losses[-2]  # the pipeline makes of the noise what the loop saw


def test_parametrize():
    errors, defect = example("parametrize").main(steps=150)
    assert errors[-1] < 0.02 * errors[0]
    assert defect < 1e-5


def test_peft_oft():
    pytest.importorskip("peft")
    losses, medians = example("peft_oft").main(width=64, block_size=16, rounds=2)
    assert losses["cayley"] == pytest.approx(losses["peft"], rel=1e-5)
    assert losses["skew_exp"] == pytest.approx(losses["peft"], rel=0.05)
    assert set(medians) == {"peft", "cayley", "skew_exp"}


def test_fused_losses():
    losses = example("fused_losses").main(steps=60)
    assert losses[-1] < 0.2 * losses[0]


def test_optimise_then_pipeline(tmp_path):
    summary, saved, made = example("optimise_then_pipeline").main(folder=tmp_path / "run", steps=6)
    assert summary["best_reward"] > summary["initial_reward"]
    # the pipeline makes of the noise what the search saw
    difference = load_image(saved, 64, 64) - load_image(made, 64, 64)
    assert difference.abs().max() < 2.5 / 255


@pytest.mark.usefixtures("plots")
def test_reward_training(tmp_path):
    runs = example("reward_training").main(
        tmp_path / "picture.png",
        tmp_path / "runs",
        epochs=2,
        images_per_prompt=2,
        eval_samples=10,
        preserve=(0.0, 30.0),
    )
    free, held = runs.values()
    assert free[-1]["thickness"] > free[0]["thickness"] + 0.5
    assert held[-1]["drift"] < free[-1]["drift"]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_quickstart(tmp_path):
    found, summary = example("quickstart").main(tmp_path, steps=6, cycles=1, epochs=2, samples=10)
    assert found.z.shape == (3, 4, 8, 8)
    assert summary["cycles"][0]["sft"]["matched_loss_after"] < found.losses[0].mean()
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")


def test_every_example_is_tested():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {n.removeprefix("test_") for n in globals() if n[5:] in names}


@pytest.mark.parametrize("page", ["README.md", "docs/api.md", "docs/ops.md"])
def test_code_in_the_documentation_runs(page, tmp_path, monkeypatch):
    """The blocks of a page are one program, in order."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks), page, "exec"), {})
