"""What a reward is, and the weighted sum of several."""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.checkpoint import checkpoint

from oneshot_fast.data.prompts import warn_of_cut
from oneshot_fast.errors import ModelError, require


@dataclass(frozen=True)
class Setup:
    """Where a reward finds its models, and where and in which type it computes.

    Attributes:
        models_dir: folder with one folder per model, as ``oneshot_fast.download`` makes it.
        device: device of all tensors.
        dtype: type of the networks; heads, cosines and scores are float32.
        shared: models that several rewards use, by folder.
    """

    models_dir: Path
    device: torch.device
    dtype: torch.dtype
    shared: dict[str, Any] = field(default_factory=dict)

    def find(self, model: str, file: str) -> Path:
        """``file`` of ``model``.

        Raises:
            ModelError: If it is missing, with the command that fetches it.
        """
        path = self.models_dir / model / file
        if path.is_file():
            return path
        folder = shlex.quote(str(self.models_dir))
        place = "" if folder == "models" else f" --models_dir {folder}"
        raise ModelError(
            f"{path} is missing; run: python -m oneshot_fast.download --only {model}{place}"
        )


class Reward(nn.Module):
    """Scores images, given their prompts; more is better."""

    name: str
    differentiable: bool = True
    tokenizer: Any = None  # of prompts; None if it reads none, or all of them
    prompt_tokens: int = 0  # that the tokenizer keeps, both ends included
    num_steps: int | None = None  # of the sampler whose estimates it was trained for; None: any
    _told: frozenset[str] = frozenset()  # prompts that were warned of

    @classmethod
    def load(cls, name: str, setup: Setup) -> "Reward":
        """The reward called ``name``; a subclass whose models are files reads them here.

        Raises:
            UserError: If there is no such reward, or a model is missing or damaged.
        """
        reward = cls()
        reward.name = name
        return reward.to(setup.device, setup.dtype)

    def at_step(self, step: int) -> "Reward":
        """What scores the images that a sampler estimates in ``step``, from 0."""
        return self

    def is_truncated(self, prompt: str) -> bool:
        """Whether ``prompt`` is longer than what this reward reads of it."""
        if self.tokenizer is None:
            return False
        return len(self.tokenizer(prompt, verbose=False).input_ids) > self.prompt_tokens

    def warn_of_cut(self, prompts: Iterable[str]) -> None:
        """Say once on stderr how many of these prompts are cut off, and which is the first."""
        limit = f"the {self.prompt_tokens} tokens that reward {self.name} reads"
        self._told = warn_of_cut(prompts, self.is_truncated, self._told, limit)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """What ``forward`` needs of B prompts, [B, ...], computed once for each; else nothing.

        A row never depends on the other prompts.
        """
        return torch.empty(len(prompts), 0)

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        """Scores [B] float32 of images [B, 3, H, W] float, [0, 1] RGB.

        ``features`` [B, ...] are of ``encode``. With a gradient where ``differentiable``.
        """
        raise NotImplementedError


class EmbeddingReward(Reward):
    """Scores the embedding of an image, which rewards with the same ``encoder`` share."""

    encoder: "ImageEncoder"

    def rate(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """Scores, [B] float32, of what the encoder makes of images, [B, D] float32."""
        raise NotImplementedError

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        return self.rate(self.encoder.encode_images(images), features)


class ImageEncoder(nn.Module):
    """What makes embeddings of images."""

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, D] float32, of images [B, 3, H, W] in [0, 1] RGB."""
        raise NotImplementedError


class WeightedRewards(nn.Module):
    """Sum of weight times score over several rewards.

    Every prompt is encoded once, and every batch of images once by each encoder.
    """

    def __init__(
        self, rewards: Sequence[tuple[Reward, float]], *, checkpointing: bool = False
    ) -> None:
        """Combine pairs of reward and weight.

        With ``checkpointing`` each reward is recomputed in the backward pass, so that the
        activations of one at a time are held.

        Raises:
            UserError: If there is none, or a name comes twice.
        """
        super().__init__()
        names = [reward.name for reward, _ in rewards]
        require(bool(names), "no reward is named; give --reward NAME[:WEIGHT]")
        doubled = sorted({name for name in names if names.count(name) > 1})
        require(not doubled, f"reward {', '.join(doubled)} is named twice; name it once")
        self.rewards = nn.ModuleList(reward for reward, _ in rewards)
        self.weights: Mapping[str, float] = {reward.name: weight for reward, weight in rewards}
        self._checkpointing = checkpointing
        self._features: dict[tuple[str, str], Tensor] = {}
        self._at_steps: dict[tuple[Reward, ...], WeightedRewards] = {}

    @property
    def by_name(self) -> dict[str, Reward]:
        """The rewards."""
        return {reward.name: reward for reward in self.rewards if isinstance(reward, Reward)}

    @property
    def differentiable(self) -> bool:
        """Whether all of the rewards are; if not, only a search can use their sum."""
        return all(reward.differentiable for reward in self.rewards)

    def warn_of_cut(self, prompts: Iterable[str]) -> None:
        """Say once for each reward how many of these prompts it cuts off."""
        texts = [*prompts]
        for reward in self.by_name.values():
            reward.warn_of_cut(texts)

    def at_step(self, step: int) -> "WeightedRewards":
        """What scores the images that a sampler estimates in ``step``, from 0."""
        found = tuple(reward.at_step(step) for reward in self.by_name.values())
        if found == tuple(self.by_name.values()):
            return self
        if found not in self._at_steps:
            weighted = [*zip(found, self.weights.values(), strict=True)]
            rewards = WeightedRewards(weighted, checkpointing=self._checkpointing)
            self._at_steps[found] = rewards.eval().requires_grad_(False)
        return self._at_steps[found]

    def check_steps(self, num_steps: int) -> None:
        """Raise UserError for a reward that was trained for a sampler of other steps."""
        for reward in self.by_name.values():
            require(
                reward.num_steps in (None, num_steps),
                f"reward {reward.name} was trained for estimates of {reward.num_steps} steps, and "
                f"the sampler has {num_steps}; name another reward, or give "
                f"--num_inference_steps {reward.num_steps}",
            )

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Weighted sum, [B] float32, of what ``scores`` returns for the same."""
        return self.total(self.scores(images, prompts))

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum, [B] float32, of the dict that ``scores`` returns."""
        return torch.stack([self.weights[name] * score for name, score in scores.items()]).sum(0)

    def scores(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Every reward's own score, [B] float32 by its name, without its weight.

        The images are [B, 3, H, W] float, [0, 1] RGB, with B prompts.

        Raises:
            ValueError: If there are not as many prompts as images.
        """
        if len(images) != len(prompts):
            raise ValueError(f"expected {len(images)} prompts, one per image, got {len(prompts)}")
        embeddings: dict[ImageEncoder, Tensor] = {}
        return {
            name: self.score(reward, images, prompts, embeddings)
            for name, reward in self.by_name.items()
        }

    def score(
        self,
        reward: Reward,
        images: Tensor,
        prompts: Sequence[str],
        embeddings: dict[ImageEncoder, Tensor],
    ) -> Tensor:
        """Scores, [B] float32, of one of the rewards.

        ``embeddings`` are of these images, as far as other rewards needed them; it takes what is
        new.
        """
        features = self.features(reward, prompts)
        if not reward.differentiable:
            with torch.no_grad():
                return reward(images.detach(), features)
        if not isinstance(reward, EmbeddingReward):
            return self._compute(reward, images, features)
        encoder = reward.encoder
        if encoder not in embeddings:
            embeddings[encoder] = self._compute(encoder.encode_images, images)
        return reward.rate(embeddings[encoder], features)

    def _compute(self, network: Callable[..., Tensor], images: Tensor, *more: Any) -> Tensor:
        if self._checkpointing and torch.is_grad_enabled() and images.requires_grad:
            return checkpoint(network, images, *more, use_reentrant=False)
        return network(images, *more)

    @torch.no_grad()
    def features(self, reward: Reward, prompts: Sequence[str]) -> Tensor:
        """``reward.encode(prompts)``, with prompts that came before taken from memory."""
        new = [p for p in dict.fromkeys(prompts) if (reward.name, p) not in self._features]
        if new:
            with unset_fake_temporarily():  # a dry run keeps them for what it then times
                rows = reward.encode(new)
                self._features |= {(reward.name, p): row for p, row in zip(new, rows, strict=True)}
        return torch.stack([self._features[reward.name, prompt] for prompt in prompts])
