"""What features tell of the prompt: `evaluation.probe`, and as a part of the measures."""

import torch
from torch import Tensor

from oneshot_fast.evaluation.distances import replicates, verdicts
from oneshot_fast.evaluation.features import Features
from oneshot_fast.evaluation.probe import PromptProbe
from oneshot_fast.evaluation.random_noise import RandomNoiseMeasure
from oneshot_fast.generators.loading import load_generator

CLASSES, WIDTH = 4, 8
TOLD = torch.randn(CLASSES, 6, generator=torch.Generator().manual_seed(1))


def drawn(labels: Tensor, seed: int, shown: float = 1.0) -> Tensor:
    """Features of images of these classes: a little of the class among much that is free."""
    draw = torch.Generator().manual_seed(seed)
    free = 8 * torch.randn(len(labels), WIDTH, generator=draw)
    free[:, :CLASSES] *= 0.05
    return free + shown * torch.eye(CLASSES, WIDTH)[labels]


LABELS = torch.arange(48) % CLASSES


def test_images_it_has_not_seen_are_told_by_their_prompts() -> None:
    probe, new = PromptProbe(drawn(LABELS, 0), TOLD[LABELS]), drawn(LABELS, 5)
    right = probe.fit(new, TOLD[LABELS])
    wrong = probe.fit(new, TOLD[(LABELS + 1) % CLASSES])
    assert right.shape == (48,) and right.mean() > 0.7
    assert (right > wrong).double().mean() > 0.9
    assert probe(new).shape == (48, WIDTH + 6) and probe(new).dtype == torch.float64


def test_real_images_are_told_by_the_others_alone() -> None:
    features, told = drawn(LABELS, 0), TOLD[LABELS]
    probe = PromptProbe(features, told)
    x = features.double() - features.double().mean(0)
    x, y = x / features.double().std(0), told.double() - told.double().mean(0)
    weight = 0.1 * x.square().sum(1).mean()
    fitted = x @ x.T @ torch.linalg.inv(x @ x.T + weight * torch.eye(48).double()) @ y
    others = torch.arange(48) != 7
    kernel = x[others] @ x[others].T + weight * torch.eye(47).double()
    expected = x[7] @ x[others].T @ torch.linalg.inv(kernel) @ y[others]
    scale = fitted.var(0).sum().sqrt()
    assert torch.allclose(probe.real[7, WIDTH:] * scale, expected, atol=1e-9)
    own = features.double() / features.double().var(0).sum().sqrt()
    assert torch.allclose(probe.real[:, :WIDTH], own)
    assert not torch.allclose(probe.real[7], probe(features)[7], atol=0.01)


def test_with_it_the_energy_score_sees_images_that_show_their_prompt() -> None:
    labels = torch.arange(300) % CLASSES
    vague, clear, real = drawn(labels, 3, 0), drawn(labels, 4), drawn(LABELS, 0)
    probe = PromptProbe(real, TOLD[LABELS])

    def certainty(before: Tensor, after: Tensor, held_out: Tensor) -> float:
        both = (replicates(x, labels, held_out, LABELS, seed=0) for x in (before, after))
        found = verdicts(*both)["energy_score"]
        return found.gain / found.error

    plain = certainty(vague, clear, real)
    probed = certainty(probe(vague), probe(clear), probe.real)
    assert abs(plain) < 1.96 < probed


def test_features_that_never_differ_tell_nothing() -> None:
    features = torch.ones(8, 3)
    probe = PromptProbe(features, TOLD[torch.arange(8) % CLASSES])
    assert probe(features).isfinite().all() and probe.real.isfinite().all()
    assert probe.fit(features, TOLD[torch.zeros(8, dtype=torch.long)]).abs().max() == 0


def test_a_measure_has_alignment_where_prompts_differ(tmp_path) -> None:
    def told(prompts) -> Tensor:
        return torch.stack([TOLD[int(prompt[-1])] for prompt in prompts])

    features = Features("means", lambda images: images.mean((2, 3)), told=told)
    real = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for prompts in (["a 0", "a 1"] * 4, ["a 0"] * 8):
        measure = RandomNoiseMeasure(
            prompts, (4, 8, 8), samples=12, seed=1, features=features, real=real,
            real_prompts=prompts,
        )  # fmt: skip
        found = measure.measure(
            load_generator("tiny", device="cpu"), tmp_path / f"{len(set(prompts))}" / "base"
        )
        differ = len(set(prompts)) > 1
        assert ("alignment" in found) == differ == ("alignment" in found["errors"])
        assert measure.real is not None and measure.real.shape == (8, 9 if differ else 3)
