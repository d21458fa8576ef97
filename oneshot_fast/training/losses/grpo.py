"""Reinforcement of a few-step generator: SubGRPO, the last step's reward, and a matching term.

    A_i = sum over rewards of w (r_i - mean of the prompt) / (std of all + 1e-4), made mean 0 and
          std 1 over all images, clamped to [-5, 5], and 0 where a prompt's rewards are equal
    policy:  mean max(-A p, -A clamp(p, 1 - c, 1 + c)),  p = exp(lp - lp_old)  in nats, of some of
             the steps that draw noise; in the others all images of a prompt share theirs
    final:   mean relu(margin - r) of the last step, which draws nothing, through the decoder
    match:   the student's term of losses/dmd.py at clean samples

RTDMD (arXiv 2605.26108) after GRPO (Shao et al. 2024, arXiv 2402.03300). Its log-probabilities are
means of squares: ours are nats, so that a clip means the same for any size of latents. Where a
rollout serves one update, p is 1 as the gradient is taken, and nothing is clipped; where it serves
several, lp_old is what the first of them found, by the same passes of the same rows.
"""

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.training.batch import Batch
from oneshot_fast.training.losses.dmd import StudentLoss
from oneshot_fast.training.losses.preserve import Preserve

_SMALL, _MOST = 1e-4, 5.0
_ROUNDING = 4  # of the rewards' type: what equal images may be apart by


def advantages(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], prompts: Sequence[str]
) -> Tensor:
    """How much better each image is than the others of its prompt, [N].

    Args:
        rewards: Of N images, [N] each, by name.
        weights: Of the rewards.
        prompts: Of the images.
    """
    first = next(iter(rewards.values()))
    names = torch.tensor([prompts.index(prompt) for prompt in prompts])
    groups = [names == name for name in names.unique()]
    total = torch.zeros(len(names), dtype=torch.float64)
    for name, values in rewards.items():
        exact, least = values.cpu().double(), _ROUNDING * torch.finfo(values.dtype).eps
        apart = torch.zeros_like(exact)
        for group in groups:
            own = exact[group]
            if own.max() - own.min() > least * own.abs().max():
                apart[group] = own - own.mean()
        total += weights[name] * apart / (exact.std(correction=0) + _SMALL)
    normal = (total - total.mean()) / (total.std(correction=0) + _SMALL)
    return torch.where(total == 0, 0.0, normal).clamp(-_MOST, _MOST).to(first)


Bounds = tuple[float, float]  # of the logarithm of a ratio of likelihoods


def clip_bounds(clip: float, nats: float = 1.0) -> Bounds:
    """What a log-ratio is clipped to where the ratio is to be within 1 - ``clip`` and 1 + ``clip``.

    Args:
        clip: How far from 1.
        nats: In one unit of the log-probabilities whose ratio that is, see ``nats_of_mean``.
    """
    return nats * math.log1p(-clip) if clip < 1 else -math.inf, nats * math.log1p(clip)


def nats_of_mean(std: float, elements: int) -> float:
    """Nats in one of RTDMD's log-probabilities, which are means of squares.

    Args:
        std: Of what the step draws.
        elements: Of a sample.

    Raises:
        ValueError: If the step draws nothing, and so has no likelihood.
    """
    if std == 0:
        raise ValueError("a step that draws nothing has no likelihood to clip")
    return elements / (2 * std**2)


def policy_loss(now: Tensor, old: Tensor, advantage: Tensor, bounds: Bounds) -> Tensor:
    """PPO's clipped objective of log-probabilities [N] in nats, a scalar."""
    further = now - old
    clipped = further.clamp(*bounds)
    return torch.maximum(-advantage * further.exp(), -advantage * clipped.exp()).mean()


def is_clipped(now: Tensor, old: Tensor, advantage: Tensor, bounds: Bounds) -> Tensor:
    """Where ``policy_loss`` has no gradient as the policy has gone far enough, [N] of bool."""
    further, (low, high) = now - old, bounds
    return torch.where(advantage > 0, further > high, (advantage < 0) & (further < low))


def chosen_steps(steps: int, count: int, seed: int, epoch: int) -> list[int]:
    """``count`` of ``steps`` noisy steps, or all, which learn in an epoch; as RTDMD draws them."""
    draw = random.Random(seed + 100_000 * epoch + 104_729)
    return sorted(draw.sample(range(steps), min(count, steps)))


def original_seed(prompt: str, step: int, epoch: int) -> int:
    """Of the noise that a prompt's images share in a step, as RTDMD's code has it."""
    hashed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")
    return (hashed + 10_007 * step + 100_000 * epoch) % 2**31


@dataclass(frozen=True)
class ReinforceLoss:
    """Of a rollout's rows: what led to which sample, and how good it turned out.

    ``rows.extra`` has "steps", the numbers of the steps that learn, "before" and "after", their
    samples [B, S, C, h, w], "old", their log-probabilities [B, S], which the first pass writes
    where they are NaN, "last", what the last step starts from [B, C, h, w], "advantage" [B], and
    "texts".

    Attributes:
        rewards: Of the last step.
        policy_weight: Of the policy's loss.
        final_weight: Of the last step's reward.
        final_margin: What that reward is raised to; infinite: minus the reward is lowered.
        match_weight: Of the matching term.
        match: That term; None: there is none.
        preserve: Holds on to the base; None: there is none.
        clip: Of the policy's ratio.
        clips_means: Whether that is of RTDMD's likelihoods, see ``nats_of_mean``.
    """

    rewards: WeightedRewards
    policy_weight: float
    final_weight: float
    final_margin: float
    match_weight: float
    match: StudentLoss | None
    preserve: Preserve | None
    clip: float
    clips_means: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """See ``Loss``."""
        return tuple(
            name
            for name, is_on in (
                ("policy", self.policy_weight > 0),
                ("final", self.final_weight > 0),
                ("match", self.match is not None),
                ("preserve", self.preserve is not None),
            )
            if is_on
        )

    @property
    def measures(self) -> tuple[str, ...]:
        """The part of the ratios that the clip keeps from learning, see ``Loss``."""
        return ("clipped",) if self.policy_weight > 0 else ()

    def __call__(self, model: FewStepGenerator, batch: Batch) -> dict[str, Tensor]:
        """See ``Loss``."""
        losses = dict[str, Tensor]()
        if self.preserve is not None and "preserve" in batch:
            kept = batch["preserve"]
            made = model.predict(kept.noise, kept.conditioning)
            losses["preserve"] = self.preserve(model, made, kept)
        if "rollout" not in batch:
            return losses
        rows = batch["rollout"]
        told, extra = rows.conditioning, rows.extra
        if self.policy_weight:
            found, clipped, advantage = [], [], extra["advantage"]
            for place, k in enumerate(extra["steps"][0]):
                made_of = model.transition(k, extra["before"][:, place], told)
                now = made_of.log_probability(extra["after"][:, place])
                old = extra["old"][:, place]
                old.copy_(torch.where(old.isnan(), now.detach(), old))  # kept in the rollout's rows
                of_mean = nats_of_mean(made_of.std, made_of.mean[0].numel())
                bounds = clip_bounds(self.clip, of_mean if self.clips_means else 1.0)
                found.append(policy_loss(now, old, advantage, bounds))
                clipped.append(is_clipped(now.detach(), old, advantage, bounds))
            losses["policy"] = self.policy_weight * torch.stack(found).mean()
            losses["clipped"] = torch.stack(clipped).float().mean()
        if not self.final_weight and self.match is None:
            return losses
        x0 = model.next_sample(model.num_inference_steps - 1, extra["last"], told)
        if self.final_weight:
            reward = self.rewards(model.images(x0), extra["texts"])
            has_end = math.isfinite(self.final_margin)
            short = (self.final_margin - reward).relu() if has_end else -reward
            losses["final"] = self.final_weight * short.mean()
        if self.match is not None:
            levels = self.match.levels
            clean = levels.of_step(len(levels.timesteps) - 1, len(x0), x0)
            losses["match"] = self.match_weight * self.match.match(x0, clean, 0.0, rows)
        return losses
