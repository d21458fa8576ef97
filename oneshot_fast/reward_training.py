"""Train a one-step generator on rewards: through its single step, or on what a search has found.

With one step the gradient of the reward is exact and short: image, decoder, UNet. This is DRaFT-1
(Clark et al. 2023, arXiv 2309.17400) and AlignProp (Prabhudesai et al. 2023, arXiv 2310.03739)
where the sampler has no other step. A reward that is only raised is over-optimised: images drift
away, grow alike, and other judges like them less. So the distance to the base generator is weighed
(``preserve_weight``), and drift, diversity and an independent judge are measured at every epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oneshot_fast.errors import UserError, require
from oneshot_fast.evaluate import pairwise_diversity
from oneshot_fast.runs import read_metadata, write_jsonl, write_safetensors
from oneshot_fast.seeds import derived_seed, gaussian

if TYPE_CHECKING:
    from oneshot_fast.generator import OneStepGenerator
    from oneshot_fast.rewards import WeightedRewards

_ROWS = 16  # images generated at once where nothing is trained


@dataclass(frozen=True)
class RewardTrainingOptions:
    """How a generator is trained on rewards.

    Attributes:
        epochs: Measurements during training.
        steps: Steps per epoch.
        batch_size: Images per step.
        lr: AdamW's learning rate.
        lora_rank: Train only a LoRA adapter of this rank; 0 trains the whole UNet.
        preserve_weight: Weight of the mean squared latent distance to the base generator.
        max_grad_norm: Gradients are scaled down to this norm.
        pool_size: Noises with their base latents that steps draw from.
        measured: Other noises on which reward, drift and diversity are measured.
        seed: Seed of everything random.
    """

    epochs: int = 10
    steps: int = 20
    batch_size: int = 8
    lr: float = 1e-4
    lora_rank: int = 0
    preserve_weight: float = 0.0
    max_grad_norm: float = 1.0
    pool_size: int = 256
    measured: int = 64
    seed: int = 0

    def check(self) -> None:
        """Raise UserError for values that make no sense."""
        for name in ("epochs", "steps", "batch_size", "pool_size", "measured"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; give at least 1")
        require(0 < self.lr < math.inf, f"lr is {self.lr}; give a positive number")
        require(0 <= self.preserve_weight < math.inf, "preserve_weight must not be negative")


class _Pool:
    """Noises, the prompts they go with, and the base generator's latents of them."""

    def __init__(
        self, generator: OneStepGenerator, prompts: Sequence[str], size: int, seed: int
    ) -> None:
        side = generator.image_size
        seeds = [derived_seed(seed, k) for k in range(size)]
        self.prompts = [prompts[k % len(prompts)] for k in range(size)]
        self.eps = gaussian(seeds, generator.noise_shape(side, side)).to(generator.device)
        self.base = self.latents(generator)

    @torch.no_grad()
    def latents(self, generator: OneStepGenerator) -> Tensor:
        """What ``generator`` makes of all noises, [N, C, h, w] float32."""
        found = []
        for start in range(0, len(self.eps), _ROWS):
            part = slice(start, start + _ROWS)
            found.append(
                generator.latents(self.eps[part], generator.encode_prompts(self.prompts[part]))
            )
        return torch.cat(found)


def train_on_rewards(
    generator: OneStepGenerator,
    rewards: WeightedRewards,
    prompts: Sequence[str],
    options: RewardTrainingOptions,
    *,
    judge: WeightedRewards | None = None,
    on_step: Callable[[int], object] = lambda step: None,
) -> list[dict[str, Any]]:
    """Raise the rewards of random noises' images by training ``generator.unet`` in place.

    Args:
        generator: Its UNet is trained, or gets a LoRA adapter that is; float32 weights.
        rewards: What is raised; differentiable.
        prompts: Steps draw from these.
        options: How.
        judge: Rewards that are measured, too, but not trained on.
        on_step: Called with the number of each finished step.

    Returns:
        A row per epoch, from epoch 0, the base: ``reward``, every reward's mean by name, those of
        the judge as ``judge NAME``, ``drift`` (RMS latent distance to the base), ``diversity``
        (mean pixel distance within a prompt) and ``loss``; all but the last on noises not trained
        on.

    Raises:
        UserError: If an option makes no sense, a reward has no gradient, or the loss is not finite.
    """
    options.check()
    require(rewards.differentiable, "training needs rewards with a gradient; search instead")
    pool = _Pool(generator, prompts, options.pool_size, derived_seed(options.seed, "train"))
    fresh = _Pool(generator, prompts, options.measured, derived_seed(options.seed, "measure"))
    history = [{"epoch": 0, **_measure(generator, rewards, judge, fresh), "loss": None}]
    parameters = _trained(generator, options)
    optimizer = torch.optim.AdamW(parameters, lr=options.lr)
    draw = torch.Generator().manual_seed(derived_seed(options.seed, "order"))
    try:
        for epoch in range(1, options.epochs + 1):
            losses = []
            for step in range(options.steps):
                rows = torch.randperm(len(pool.eps), generator=draw)[: options.batch_size].tolist()
                loss = _loss(generator, rewards, pool, rows, options.preserve_weight)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
                optimizer.step()
                losses.append(loss.detach())
                on_step((epoch - 1) * options.steps + step + 1)
            mean = torch.stack(losses).mean().item()
            if not math.isfinite(mean):
                raise UserError(f"the loss became {mean} in epoch {epoch}; lower lr")
            found = _measure(generator, rewards, judge, fresh)
            history.append({"epoch": epoch, **found, "loss": mean})
    finally:
        generator.unet.requires_grad_(False)
    return history


def _trained(generator: OneStepGenerator, options: RewardTrainingOptions) -> list[Any]:
    """The parameters that are trained, made ready."""
    if options.lora_rank:
        from oneshot_fast.lora import add_adapter

        add_adapter(generator.unet, options.lora_rank, None, options.seed)
    else:
        generator.unet.requires_grad_(True)
    return [parameter for parameter in generator.unet.parameters() if parameter.requires_grad]


def _loss(
    generator: OneStepGenerator,
    rewards: WeightedRewards,
    pool: _Pool,
    rows: list[int],
    preserve_weight: float,
) -> Tensor:
    """Minus the mean reward, and the weighted distance to the base, from one forward pass."""
    prompts = [pool.prompts[k] for k in rows]
    latents = generator.latents(pool.eps[rows], generator.encode_prompts(prompts))
    images = (generator.decode_raw(latents) / 2 + 0.5).clamp(0, 1)
    loss = -rewards(images, prompts).mean()
    if preserve_weight:
        loss = loss + preserve_weight * (latents - pool.base[rows]).square().mean()
    return loss


@torch.no_grad()
def _measure(
    generator: OneStepGenerator,
    rewards: WeightedRewards,
    judge: WeightedRewards | None,
    pool: _Pool,
) -> dict[str, float]:
    latents = pool.latents(generator)
    images = torch.cat([generator.decode(part) for part in latents.split(_ROWS)])
    scores = rewards.scores(images, pool.prompts)
    found = {"reward": rewards.total(scores).mean().item()}
    found |= {name: values.mean().item() for name, values in scores.items()}
    if judge is not None:
        judged = judge.scores(images, pool.prompts)
        found |= {f"judge {name}": values.mean().item() for name, values in judged.items()}
    names = list(dict.fromkeys(pool.prompts))
    labels = torch.tensor([names.index(prompt) for prompt in pool.prompts])
    found["drift"] = (latents - pool.base).square().mean().sqrt().item()
    found["diversity"] = pairwise_diversity(images.cpu(), labels)
    return found


def write_training_pairs(folder: Path) -> int:
    """Pair every base noise of an optimize run with the best image that was found from it.

    Training on these pairs (``sft --manifest_path FOLDER/training/manifest.jsonl``) teaches the
    generator to give at once what the search took its steps for. With ``--method best_of_n`` that
    is best-of-K (RAFT, Dong et al. 2023, arXiv 2304.06767), with a gradient method it amortises the
    optimisation. The optimised noises themselves would teach nothing: the generator already maps
    them to these images.

    Args:
        folder: Finished run folder of ``python -m oneshot_fast.optimize``, its images among it.

    Returns:
        Number of pairs.

    Raises:
        UserError: If there is no run, or it has no images.
    """
    shards = sorted((folder / "noises").glob("*.safetensors"))
    require(bool(shards), f"{folder} holds no optimised noises; run oneshot_fast.optimize first")
    written = []
    for shard in shards:
        rows = read_metadata(shard, "rows")
        rows = [row for row in rows if (folder / row["target_image_path"]).is_file()]
        if not rows:
            continue
        eps = gaussian([row["first_seed"] for row in rows], _noise_shape(shard))
        write_safetensors(folder / "training" / "noises" / shard.name, {"z": eps}, {})
        written += [
            {
                "id": row["id"],
                "prompt": row["prompt"],
                "target_image_path": f"../{row['target_image_path']}",
                "noise_path": f"noises/{shard.name}",
                "noise_index": k,
                "seed": row["first_seed"],
            }
            for k, row in enumerate(rows)
        ]
    require(bool(written), f"{folder} has no images; run with --num_images -1")
    write_jsonl(folder / "training" / "manifest.jsonl", written)
    return len(written)


def _noise_shape(shard: Path) -> list[int]:
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as file:
        return list(file.get_slice("z").get_shape()[1:])
