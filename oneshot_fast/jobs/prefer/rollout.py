"""Images of one prompt that are drawn and scored, to be compared with each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oneshot_fast.generators.base import Conditioning, Generator
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.jobs.prefer.options import PreferOptions
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.runtime.seeds import derived_seed, gaussian
from oneshot_fast.training.losses.neighbor_grpo import neighbors
from oneshot_fast.training.losses.preference import kl_scales, preferences

_AT_ONCE = 16  # images that are decoded


@dataclass(frozen=True)
class Rollout:
    """Draws groups; what it draws is a function of the seed, the prompt and the weights alone.

    Attributes:
        generator: As it is when it is asked.
        rewards: Scores; they need no gradient.
        options: What is drawn.
        shape: [C, h, w] of a noise.
    """

    generator: Generator
    rewards: WeightedRewards
    options: PreferOptions
    shape: Sequence[int]

    @torch.no_grad()
    def group(self, prompt: str, seed: int) -> dict[str, Tensor]:
        """One group, on the CPU.

        Returns:
            "noise" [N, C, h, w], to be evaluated with a gradient, "rewards" [K] and what the
            objective needs besides: "actions" [K, C, h, w]; or "candidates" [K, C, h, w] and "old"
            [N, C, h, w], the anchors among them; over T steps "samples" [K, T + 1, C, h, w] and
            "scales" [S] of those that draw noise.
        """
        kind, count = self.options.drawing, self.options.group
        if isinstance(self.generator, FewStepGenerator):
            noise = self._draw(seed, "noise", self.options.noises)
            noise = noise.repeat_interleave(count // len(noise), 0)
            told = self._told(prompt, count, seed)
            samples = self.generator.rollout(noise.to(self.generator.device), told)
            found = {"samples": torch.stack(samples, 1)}
            found["scales"] = kl_scales(self.generator, self.shape)
            return self._scored(prompt, samples[-1], noise=noise, **found)
        if kind in ("pairs", "actions"):
            noise = self._draw(seed, "noise", self.options.noises)
            x0 = self._made(prompt, noise, seed)
            around = x0.repeat_interleave(count // len(noise), 0)
            actions = around + self.options.action_std * self._actions(seed, count).to(x0)
            return self._scored(prompt, actions, noise=noise, actions=actions)
        if kind == "samples":
            noise = self._draw(seed, "noise", count)
            return self._scored(prompt, self._made(prompt, noise, seed), noise=noise)
        base, delta = self._draw(seed, "base", 1)[0], self._draw(seed, "noise", count)
        noise = neighbors(base, delta, self.options.neighbor_spread)
        made = self._made(prompt, noise, seed)
        draw = torch.Generator().manual_seed(derived_seed(seed, "anchors"))
        anchors = torch.randperm(count, generator=draw)[: self.options.anchors]
        chosen = {"noise": noise[anchors], "candidates": made, "old": made[anchors.to(made.device)]}
        return self._scored(prompt, made, **chosen)

    def _draw(self, seed: int, name: str, count: int) -> Tensor:
        return gaussian([derived_seed(seed, name, k) for k in range(count)], self.shape)

    def _actions(self, seed: int, count: int) -> Tensor:
        """Noise of the actions, [K, C, h, w], N(0, 1), the same in each block."""
        found, side = self._draw(seed, "action", count), self.options.action_pool
        if side == 1:
            return found
        coarse = found[..., ::side, ::side]
        fine = coarse.repeat_interleave(side, -1).repeat_interleave(side, -2)
        return fine[..., : self.shape[-2], : self.shape[-1]]

    def _made(self, prompt: str, noise: Tensor, seed: int) -> Tensor:
        told = self._told(prompt, len(noise), seed)
        return self.generator.latents(noise.to(self.generator.device), told)

    def _told(self, prompt: str, count: int, seed: int) -> Conditioning:
        seeds = [derived_seed(seed, "later", k) for k in range(count)]
        return self.generator.told([prompt] * count, seeds)

    def _scored(self, prompt: str, latents: Tensor, **found: Tensor) -> dict[str, Tensor]:
        parts = latents.split(_AT_ONCE)
        scores = [self.rewards(self.generator.decode(x), [prompt] * len(x)).cpu() for x in parts]
        return {name: x.cpu() for name, x in found.items()} | {"rewards": torch.cat(scores)}


def compared(groups: Sequence[dict[str, Tensor]], paired: bool) -> dict[str, Tensor]:
    """The groups of a batch, [G, ...] by name, with what each is worth.

    Besides what ``Rollout.group`` gives: "ties" [G], the share of pairs that are one, or 1 for a
    group of equal rewards; where they are ``paired`` the "preference" [G, K / 2] of neighbours and
    "pairs" [G], how many of them that are no ties a group of the batch has on the mean.
    """
    found = {name: torch.stack([group[name] for group in groups]) for name in groups[0]}
    rewards = found["rewards"]
    if paired:
        preference = preferences(rewards.unflatten(1, (-1, 2)))
        told = preference.abs().sum(1)
        found |= {"preference": preference, "pairs": told.mean().expand(len(told))}
        return found | {"ties": 1 - told / preference.shape[1]}
    good = rewards.isfinite()
    highest = rewards.where(good, torch.full_like(rewards, -torch.inf)).amax(1)
    lowest = rewards.where(good, torch.full_like(rewards, torch.inf)).amin(1)
    return found | {"ties": (highest <= lowest).float()}
