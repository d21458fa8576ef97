"""What images are compared by: found on the machine, loaded whole, named as what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reward_folders import write_clip_model

from oneshot_fast.embedded.classifier import load_classifier
from oneshot_fast.errors import UserError
from oneshot_fast.evaluation.features import DINO, load_features
from oneshot_fast.generators.base import Conditioning
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.rewards.base import Setup


@pytest.fixture(scope="module")
def generator():
    return load_generator("tiny", device="cpu")


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path, torch.device("cpu"), torch.float32)


def write_dino(folder: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=56)).eval().save_pretrained(folder)


def test_without_any_network_the_own_vae_is_a_weak_judge(generator, setup) -> None:
    found = load_features(None, generator, setup=setup)
    assert found.is_weak and "weak judge" in found.name and found.fit is None
    images = torch.rand(3, 3, 64, 64)
    latents = torch.stack([generator.encode_image(image) for image in images])
    features = found.of(images)
    assert features.shape == (3, 2 * 4 * 16)
    cell = latents[1, 2, 2:4, 4:6]  # of channel 2: row 1, column 2 of the 4 x 4 cells
    assert features[1, 2 * 16 + 6].item() == pytest.approx(cell.mean().item(), abs=1e-6)
    deviation = cell.std(correction=0).item()
    assert features[1, (4 + 2) * 16 + 6].item() == pytest.approx(deviation, abs=1e-4)
    prompts = [f"a {k} of clubs" for k in range(20)]  # encoded in parts
    assert found.told is not None
    assert torch.allclose(found.told(prompts), generator.encode_prompts(prompts).pooled)


@pytest.mark.parametrize("mask", [None, [[1, 1, 0], [1, 0, 0]]])
def test_without_pooled_embeddings_the_mean_of_the_prompts_tokens_is_told(
    generator, mask: list[list[int]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeds = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    told = Conditioning(embeds, mask=None if mask is None else torch.tensor(mask))
    monkeypatch.setattr(generator, "encode_prompts", lambda prompts: told)
    found = load_features("vae", generator).told
    expected = (
        embeds.mean(1) if mask is None else torch.stack([embeds[0, :2].mean(0), embeds[1, 0]])
    )
    assert found is not None and torch.equal(found(["a", "b"]), expected)


def test_a_classifier_of_the_prompts_goes_first(generator, setup) -> None:
    write_clip_model(setup.models_dir / "CLIP-ViT-L-14", 0)
    classifier = load_classifier()
    found = load_features(None, generator, classifier, setup)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(found.of(images), classifier.features(images)) and not found.is_weak


def test_clip_is_taken_where_it_is_and_tells_how_images_fit(generator, setup) -> None:
    write_clip_model(setup.models_dir / "CLIP-ViT-L-14", 0)
    found = load_features(None, generator, setup=setup)
    assert found.name == "CLIP ViT-L/14" and found.sigma == 10
    features = found.of(torch.rand(2, 3, 40, 32))
    assert torch.allclose(features.norm(dim=1), torch.ones(2))
    assert found.fit is not None and found.fit(features, ["a", "b"]).abs().max() <= 1
    own = load_features(f"clip:{setup.models_dir / 'CLIP-ViT-L-14'}", generator)
    assert torch.equal(own.of(torch.ones(1, 3, 28, 28)), found.of(torch.ones(1, 3, 28, 28)))


def test_dino_is_the_class_token_of_normalised_images(generator, setup) -> None:
    from transformers import Dinov2Model

    write_dino(setup.models_dir / DINO)
    found = load_features(None, generator, setup=setup)
    assert found.name == "DINOv2 ViT-L/14" and found.fit is None and not found.is_weak
    image = F.interpolate(torch.rand(1, 3, 14, 14), (224, 224))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    model = Dinov2Model.from_pretrained(setup.models_dir / DINO).eval()
    pixels = (image - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state[:, 0]
        assert torch.allclose(found.of(image), expected, atol=1e-5)


def test_a_function_of_the_user(generator) -> None:
    found = load_features("python:feature_samples.rows", generator)
    assert found.name == "python:feature_samples.rows"
    assert len(found.of(torch.rand(2, 3, 64, 64))) == 2


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("inception", "there are clip, dinov2"),
        ("clip", r"download --only CLIP-ViT-L-14 --models_dir"),
        ("dinov2", r"download --only DINOv2-L-14"),
        ("python:nowhere.f", "cannot import features"),
    ],
)
def test_what_is_missing_is_said_in_one_line(generator, setup, spec: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        load_features(spec, generator, setup=setup)
    assert "\n" not in str(error.value)
