"""The packaged classifier of digits."""

from __future__ import annotations

import pytest
import torch.nn.functional as F

from oneshot_fast.embedded import digits as dataset
from oneshot_fast.embedded.classifier import DigitClassifier, load_classifier
from oneshot_fast.evaluation.measures import frechet_distance, prompt_accuracy


@pytest.fixture(scope="module")
def classifier() -> DigitClassifier:
    return load_classifier()


def test_classifier_knows_the_digits_of_writers_it_has_not_seen(classifier):
    digits, labels = dataset.load_digits("heldout")
    for style in (dataset.BASE_STYLE, dataset.TARGET_STYLE):
        assert prompt_accuracy(classifier(dataset.render(digits, style)), labels) >= 0.97


def test_classifier_features_tell_the_styles_apart(classifier):
    pairs = {split: digits for split, (digits, _) in dataset.choose_pairs().items()}
    target = classifier.features(dataset.render(pairs["heldout"], dataset.TARGET_STYLE))
    same = classifier.features(dataset.render(pairs["train"], dataset.TARGET_STYLE))
    base = classifier.features(dataset.render(pairs["train"], dataset.BASE_STYLE))
    assert frechet_distance(base, target) > 3 * frechet_distance(same, target)


@pytest.mark.parametrize("side", [32, 96])
def test_classifier_takes_images_of_other_sides(classifier, side):
    digits, labels = dataset.load_digits("heldout")
    images = F.interpolate(dataset.render(digits, dataset.BASE_STYLE), (side, side), mode="area")
    assert prompt_accuracy(classifier(images), labels) >= 0.95
