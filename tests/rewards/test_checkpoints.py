"""Checkpoints of rewards: every tensor has its place, and nothing but tensors is read."""

from __future__ import annotations

import functools
import hashlib
import operator
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_folders import write_clip_model, write_models
from reward_samples import (
    BLIP_L,
    SMALL_BLIP,
    SMALL_CLIP,
    VIT_H,
    Layout,
    Model,
    Tensors,
    head_layout,
    head_score,
    imagereward_layout,
    open_clip_layout,
    random_tensors,
)
from safetensors.torch import load_file, save_file

from oneshot_fast.download import SHA256
from oneshot_fast.errors import UserError
from oneshot_fast.rewards import load_rewards
from oneshot_fast.rewards.aesthetic import HEAD_FILE
from oneshot_fast.rewards.weights import linear_head
from oneshot_fast.runtime.tensor_files import read_pickle

# of ImageReward.pt: BLIP's contrastive heads and a buffer, which its score does not use
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


def shallow(model: Model) -> Model:
    """The same with one layer in each tower."""
    image, text = (replace(tower, depth=1) for tower in (model.image, model.text))
    return replace(model, image=image, text=text)


LAYOUTS: dict[str, tuple[str, str, Layout]] = {
    "hpsv2": ("HPSv2", "HPS_v2.1_compressed.pt", open_clip_layout(shallow(SMALL_CLIP))),
    "imagereward": ("ImageReward", "ImageReward.pt", imagereward_layout(shallow(SMALL_BLIP))),
    "aesthetic": ("Aesthetic", HEAD_FILE, head_layout(24)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_of_the_layout_is_needed(tmp_path: Path, name: str) -> None:
    model, file, layout = LAYOUTS[name]
    target = write_models(tmp_path) / model / file

    def fails_with(tensors: Tensors) -> str:
        torch.save(tensors, target)
        with pytest.raises(UserError, match="has another layout") as caught:
            load_rewards([name], models_dir=tmp_path)
        return str(caught.value)

    whole = random_tensors(layout)
    for key in layout:
        if not key.startswith(UNUSED):
            fails_with({k: v for k, v in whole.items() if k != key})
    assert "surplus" in fails_with({**whole, "surplus": torch.zeros(1)})
    some = next(key for key, shape in layout.items() if len(shape) == 2)
    fails_with({**whole, some: torch.zeros(3, 5)})


def test_all_tensors_of_vit_h_have_their_place() -> None:
    from transformers import CLIPModel

    from oneshot_fast.rewards.hpsv2 import config_of, converted

    tensors = on_meta(open_clip_layout(VIT_H))
    assert sum(value.numel() for value in tensors.values()) == 986_109_441  # as open_clip says
    with torch.device("meta"):
        model = CLIPModel(config_of(tensors, 49407))
    assert shapes(model.state_dict()) == shapes(converted(tensors))
    assert model.config.vision_config.num_attention_heads == 16
    assert model.config.text_config.num_attention_heads == 16


def test_all_tensors_of_imagereward_have_their_place() -> None:
    from transformers import BlipTextModel, BlipVisionModel

    from oneshot_fast.rewards.imagereward import configs_of, parts

    tensors = on_meta(imagereward_layout(BLIP_L))
    vision_config, text_config = configs_of(tensors)
    vision, text, head = parts(tensors, Path("ImageReward.pt"))
    with torch.device("meta"):
        vision_model = BlipVisionModel(vision_config)
        text_model = BlipTextModel(text_config, add_pooling_layer=False)
    assert shapes(vision_model.state_dict()) == shapes(vision)
    assert shapes(text_model.state_dict()) == shapes(text)
    assert shapes(head) == {key: tuple(shape) for key, shape in head_layout(768).items()}
    left = tensors.keys() - {key for key in tensors if not key.startswith(UNUSED)}
    assert len(vision) + len(text) + len(head) + len(left) == len(tensors) and len(left) == 5


def on_meta(layout: Layout) -> Tensors:
    return {name: torch.empty(shape, device="meta") for name, shape in layout.items()}


def shapes(tensors: Any) -> Layout:
    return {name: tuple(value.shape) for name, value in tensors.items()}


class Attack:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"layers.0.weight": Attack(tmp_path / "made")}, path)
    with pytest.raises(UserError, match="more than tensors"):
        read_pickle(path)
    assert not (tmp_path / "made").exists()
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="cannot read the tensors"):
        read_pickle(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="expected tensors by name"):
        read_pickle(path)


def test_a_damaged_clip_folder_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "PickScore_v1"
    write_clip_model(folder, 0)
    weights = load_file(folder / "model.safetensors")
    missing = {k: v for k, v in weights.items() if k != "visual_projection.weight"}
    save_file(missing, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="no visual_projection"):
        load_rewards(["pickscore"], models_dir=tmp_path)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot read"):
        load_rewards(["pickscore"], models_dir=tmp_path)


def test_the_published_aesthetic_head() -> None:
    default = Path(__file__).with_name("data") / HEAD_FILE
    path = Path(os.environ.get("ONESHOT_FAST_AESTHETIC_HEAD", default))
    if not path.is_file():
        pytest.skip(f"no {HEAD_FILE}; name it in ONESHOT_FAST_AESTHETIC_HEAD")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[HEAD_FILE]
    tensors = read_pickle(path)
    embeddings = torch.nn.functional.normalize(torch.randn(64, 768, dtype=torch.float64), dim=1)
    expected = head_score({k: v.double() for k, v in tensors.items()}, "", embeddings)
    scores = linear_head(tensors, path)(embeddings.float())[:, 0]
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-4)
    # no layer bends: the rating is w.x + b, whose extremes on the unit sphere are b -+ |w|
    matrices = [tensors[f"layers.{n}.weight"].double() for n in (0, 2, 4, 6, 7)]
    w = functools.reduce(operator.matmul, reversed(matrices))
    b = head_score({k: v.double() for k, v in tensors.items()}, "", torch.zeros(1, 768).double())
    torch.testing.assert_close(embeddings @ w[0] + b, expected)
    assert 5 < b.item() < 5.5 and 17 < w.norm().item() < 19
