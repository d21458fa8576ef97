"""Measures of images by their features against held-out real ones', and how sure they are.

All are functions of feature arrays, in fp64. Each takes weights, how often an image counts in each
of R samples: a row of ones is the plain measure, ``resamples`` gives rows of a bootstrap over
images (Efron 1979). Two generators measured with the same rows, on the same noises, are compared in
pairs: what the draw of noises and real images does to both drops out of the difference.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

HEADLINE = "energy_score"  # it decides: a proper score, for any number of images from two on
LOWER_IS_BETTER = ("energy_score", "frechet_distance", "kid", "mmd")
NEITHER = ("prompt_diversity",)  # that of real images is the best
RESAMPLES = 200
_MANY = 8  # images of a prompt
CMMD_SIGMA = 10.0
_SURE = 1.96  # standard errors: 95 % of a normal distribution


def resamples(count: int, seed: int, rows: int = RESAMPLES) -> Tensor:
    """Weights [1 + rows, count]: ones, then how often each image is drawn, ``count`` at a time."""
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (rows, count), generator=draw)
    weights = torch.zeros(rows, count, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return torch.cat((torch.ones(1, count, dtype=torch.float64), weights))


def prompt_resamples(labels: Tensor, real_labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Weights of generated [1 + R, N] and of real images [1 + R, M], for measures of each prompt.

    Where a prompt has many images, they are drawn for each prompt by itself, and the real ones all
    together. Where it has few, whose pairs a draw would mostly lose, whole prompts are drawn.

    Args:
        labels: Number of the prompt of each generated image, [N], from 0.
        real_labels: Of each real one, [M]; -1: none of these.
        seed: Of the draws.
    """
    prompts = int(labels.max()) + 1
    if len(labels) < _MANY * prompts:
        drawn = resamples(prompts, seed)
        return drawn[:, labels], drawn[:, real_labels.clamp_min(0)] * (real_labels >= 0)
    weights = torch.ones(1 + RESAMPLES, len(labels), dtype=torch.float64)
    for prompt in range(prompts):
        members = labels == prompt
        weights[:, members] = resamples(int(members.sum()), seed + prompt)
    return weights, resamples(len(real_labels), seed - 1)


def frechet(a: Tensor, b: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Squared Frechet distances [R] between Gaussians fitted to features a [N, F] and b [M, F].

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), Dowson and Landau 1982, as used for the
    FID (arXiv:1706.08500). tr((C_a C_b)^(1/2)) is the sum of the singular values of L_a^T L_b with
    C = L L^T, and the centred features are such an L: singular covariances (fewer samples than
    features) need no regularisation. Biased upwards, the more the fewer images there are.

    Args:
        a: Features of one set.
        b: Of the other.
        u: Weights [R, N] of the first, see ``resamples``.
        v: Weights [R, M].
    """
    pairs = zip(u, v, strict=True)
    return torch.stack([_frechet(*_fitted(a, x), *_fitted(b, y)) for x, y in pairs])


def _fitted(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [F], and L^T [min(N, F), F] at most with L L^T the covariance."""
    drawn, often = features[weights > 0], weights[weights > 0]
    mean = often @ drawn / often.sum()
    root = (often / (often.sum() - 1)).sqrt()[:, None] * (drawn - mean)
    return mean, torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root


def _frechet(mean_a: Tensor, root_a: Tensor, mean_b: Tensor, root_b: Tensor) -> Tensor:
    overlap = torch.linalg.svdvals(root_a @ root_b.T).sum()
    apart = (mean_a - mean_b).square().sum()
    return apart + root_a.square().sum() + root_b.square().sum() - 2 * overlap


def kid(a: Tensor, b: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Kernel inception distances [R] (Binkowski et al. 2018, arXiv:1801.01401), unbiased.

    The squared MMD of the kernel (x.y / F + 1)^3 on features of any network; arguments as of
    ``frechet``.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / a.shape[1] + 1) ** 3

    return _squared_mmd(kernel, a, b, u, v)


def mmd(a: Tensor, b: Tensor, u: Tensor, v: Tensor, sigma: float = CMMD_SIGMA) -> Tensor:
    """1000 times the squared MMDs [R] of the kernel exp(-|x - y|^2 / (2 sigma^2)), unbiased.

    On CLIP's unit embeddings, with sigma 10, it is the CMMD (Jayasumana et al. 2024,
    arXiv:2401.09603; there with the biased estimator, and with ViT-L/14 at 336 pixels). Other
    arguments as of ``frechet``.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return _distances(x, y).square().div(-2 * sigma**2).exp()

    return 1000 * _squared_mmd(kernel, a, b, u, v)


def median_distance(b: Tensor) -> float:
    """Median of the pairwise distances of features [M, F]: a kernel's width.

    The heuristic of Gretton et al. 2012 (JMLR 13), for features of unknown size; 1 where all are
    alike.
    """
    return torch.pdist(b.double()).median().item() or 1.0


def _squared_mmd(
    kernel: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, u: Tensor, v: Tensor
) -> Tensor:
    """Unbiased squared MMDs [R] (Gretton et al. 2012, JMLR 13, eq. 3).

    No image is paired with itself, nor with a copy that a bootstrap has drawn of it.
    """
    between = _mean(u @ kernel(a, b), v) / u.sum(1)
    return _within(kernel(a, a), u) + _within(kernel(b, b), v) - 2 * between


def _within(kernel: Tensor, weights: Tensor) -> Tensor:
    """Means [R] of a symmetric matrix [N, N] over pairs of different images."""
    squares = weights.square()
    total = ((weights @ kernel) * weights).sum(1) - squares @ kernel.diagonal()
    return total / (weights.sum(1).square() - squares.sum(1))


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted means [R] of [N] or [R, N]."""
    return (values * weights).sum(1) / weights.sum(1)


def energy_score(
    a: Tensor, labels_a: Tensor, b: Tensor, labels_b: Tensor, u: Tensor, v: Tensor
) -> Tensor:
    """Mean energy scores [R] of images of a prompt for a real image of it, lower is better.

    E|x - y| - E|x - x'| / 2 with x, x' generated and y real, all of one prompt: a strictly proper
    score (Gneiting and Raftery 2007, eq. 22), unbiased for any number of images from two on. Of
    real images y alike it is lowest for the distribution that they are drawn from, so it sees what
    does not fit the prompt, and what lacks spread.

    Args:
        a: Features [N, F] of generated images.
        labels_a: Number of the prompt of each, [N].
        b: Features [M, F] of real images.
        labels_b: Number of the prompt of each, [M]; those without two generated images of it do not
            count.
        u: Weights [R, N] of the first, see ``resamples``.
        v: Weights [R, M].

    Returns:
        The scores, NaN where no real image counts.
    """
    of = (labels_a[:, None] == torch.arange(int(labels_a.max()) + 1)).double()  # [N, P]
    at = labels_b.clamp_min(0)
    drawn = u @ of  # [R, P]
    across = u @ (_distances(a, b) * of[:, at]) / drawn[:, at]
    alike = _distances(a, a) * (of @ of.T)
    within = ((u @ alike) * u) @ of / (drawn.square() - u.square() @ of)
    score = (across - within[:, at] / 2).where(labels_b >= 0, torch.nan)
    return torch.nansum(score * v, 1) / (v * score.isfinite()).sum(1)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def neighbours(a: Tensor, b: Tensor, k: int = 5) -> dict[str, Tensor]:
    """How generated images a [N, F] and real ones b [M, F] lie among each other, image by image.

    A ball around each image reaches its ``k``-th nearest neighbour in its own set. Precision, [N]:
    whether an image lies in a ball of the real ones; recall, [M]: a real one in a ball of the
    generated ones (Kynkaanniemi et al. 2019, arXiv:1904.06991, there k = 3). Density, [N]: in how
    many balls of the real ones, over k; coverage, [M]: whether a real one's ball holds a generated
    one (Naeem et al. 2020, arXiv:2002.09797). Their means over images are the measures.
    """
    between = _distances(a, b)
    in_real = between <= _radii(b, k)
    return {
        "precision": in_real.any(1).double(),
        "recall": (between <= _radii(a, k)[:, None]).any(0).double(),
        "density": in_real.double().sum(1) / min(k, len(b) - 1),
        "coverage": in_real.any(0).double(),
    }


def _radii(features: Tensor, k: int) -> Tensor:
    within = _distances(features, features)
    return within.kthvalue(min(k, len(features) - 1) + 1).values  # the nearest is itself


def prompt_diversity(a: Tensor, labels: Tensor, u: Tensor) -> Tensor:
    """Mean distances [R] of features a [N, F] over pairs of images with the same label, of [N].

    NaN where there is no such pair.
    """
    same = (labels[:, None] == labels).double()
    total = _within(_distances(a, a) * same, u)
    return total / _within(same, u)


def replicates(
    made: Tensor,
    labels: Tensor,
    real: Tensor | None,
    real_labels: Tensor | None = None,
    *,
    seed: int,
    per_image: Mapping[str, Tensor] | None = None,
    sigma: float | None = None,
) -> dict[str, Tensor]:
    """All measures, each [1 + RESAMPLES] fp64: the value, then those of a bootstrap over images.

    Args:
        made: Features of a generator's images, [N, F].
        labels: Number of the prompt of each, [N].
        real: Features of held-out real images, [M, F], M >= 2; None leaves the distances out.
        real_labels: Numbers of their prompts among those of ``labels``, [M], -1 for none of them;
            None leaves the energy score out.
        seed: Of the bootstrap: equal seeds and sizes draw the same images.
        per_image: More that is known of each image, [N] by name, such as rewards; their means.
        sigma: Width of the kernel of ``mmd``; by default the ``median_distance`` of ``real``.
    """
    a = made.double()
    u = resamples(len(a), seed)
    found = {"prompt_diversity": prompt_diversity(a, labels, u)}
    found |= {name: _mean(values.double(), u) for name, values in (per_image or {}).items()}
    if real is None:
        return found
    b = real.double()
    v = resamples(len(b), seed + 1)
    if real_labels is not None and len(real_labels):
        drawn = prompt_resamples(labels, real_labels, seed + 2)
        found["energy_score"] = energy_score(a, labels, b, real_labels, *drawn)
    found |= {"frechet_distance": frechet(a, b, u, v), "kid": kid(a, b, u, v)}
    found["mmd"] = mmd(a, b, u, v, sigma or median_distance(b))
    for name, values in neighbours(a, b).items():
        found[name] = _mean(values, u if name in _OF_MADE else v)
    return found


_OF_MADE = ("precision", "density")


@dataclass(frozen=True)
class Verdict:
    """Whether one generator is better than another by one measure, in pairs.

    Attributes:
        measure: Its name.
        before: Of the first generator.
        after: Of the second.
        error: Standard error of the difference, by bootstrap.
    """

    measure: str
    before: float
    after: float
    error: float

    @property
    def gain(self) -> float:
        """How much better the second is; negative: worse."""
        change = self.after - self.before
        return -change if self.measure in LOWER_IS_BETTER else change

    @property
    def word(self) -> str:
        """Better or worse (higher or lower) beyond the 95 % interval, or "cannot be told apart"."""
        if not abs(self.gain) > _SURE * self.error:
            return "cannot be told apart"
        if self.measure in NEITHER:
            return "higher" if self.gain > 0 else "lower"
        return "better" if self.gain > 0 else "worse"

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of after - before."""
        change = self.after - self.before
        return change - _SURE * self.error, change + _SURE * self.error


def verdicts(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Verdict]:
    """By every measure of both, of two ``replicates`` with the same seed and sizes."""
    found = {
        name: Verdict(name, x[0].item(), after[name][0].item(), error_of(after[name] - x))
        for name, x in before.items()
        if name in after
    }
    return {k: v for k, v in found.items() if math.isfinite(v.gain) and math.isfinite(v.error)}


def error_of(values: Tensor) -> float:
    """Standard error of one of ``replicates``, NaN if it has none.

    A bootstrap of very few images may have drawn one alone, and no pair: it does not count.
    """
    drawn = values[1:][values[1:].isfinite()]
    return drawn.std().item() if len(drawn) > 1 else math.nan


def best_of(verdicts: Sequence[Verdict | None]) -> int:
    """Which generator, from 1, is the best; 0: the base, which none has beaten.

    Verdicts are of each against the base; None where it cannot be measured. A gain within one
    standard error may be luck, and beats nothing.
    """
    beaten = {k: v.gain for k, v in enumerate(verdicts, 1) if v is not None and v.gain > v.error}
    return max(beaten, key=lambda k: beaten[k], default=0)


def said(found: Mapping[str, Verdict]) -> dict[str, dict[str, Any]]:
    """Verdicts as JSON values, for a summary."""
    return {name: {**asdict(verdict), "word": verdict.word} for name, verdict in found.items()}
