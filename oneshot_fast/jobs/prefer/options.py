"""How a generator is trained on preferences: the objective, and what it draws and compares."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tyro.conf import UseAppendAction

from oneshot_fast.data.options import Manifests, SizeOptions
from oneshot_fast.errors import require
from oneshot_fast.rewards.options import JudgeModels, MeasureOptions
from oneshot_fast.training.losses.d3po import d3po
from oneshot_fast.training.losses.dpo import GroupDPO, PairDPO
from oneshot_fast.training.losses.drpo import DrPO
from oneshot_fast.training.losses.neighbor_grpo import NeighborGRPO
from oneshot_fast.training.losses.preference import (
    Actions,
    CleanLatents,
    NoisedPairs,
    Objective,
    Policy,
    PreferenceLoss,
    Steps,
)
from oneshot_fast.training.losses.preserve import Preserve
from oneshot_fast.training.losses.pso import PSO, Clip, original_pso
from oneshot_fast.training.losses.rebel import REBEL
from oneshot_fast.training.losses.rlcm import RLCM
from oneshot_fast.training.options import TrainOptions

Name = Literal["pso", "d3po", "rlcm", "rebel", "neighbor_grpo", "drpo", "dpo"]
# flags of an objective, and of no other
_OF = {
    "pso": ("beta", "clip", "clip_form", "original_scale", "action_std", "action_pool"),
    "d3po": ("beta", "clip", "clip_form", "action_std", "action_pool"),
    "rlcm": ("action_std", "action_pool"),
    "rebel": ("eta", "original_scale", "action_std", "action_pool"),
    "neighbor_grpo": ("neighbor_spread", "anchors", "temperature"),
    "drpo": ("features", "positives", "reference_weight"),
    "dpo": ("beta",),
}
_OWN = {flag for flags in _OF.values() for flag in flags}
# where the distance to the base is weighed if nothing is said
_KL = {"rlcm": 0.2, "rebel": 0.2, "neighbor_grpo": 0.2, "drpo": 1.0}
_PAIRED = ("pso", "d3po")
# flags of given pairs of images, and of images that are drawn
_PAIRS = ("pair_noise", "pair_space", "loser_weight", "winner_weight")
_DRAWN = ("group", "groups_per_prompt", *sorted(_OWN - {"beta"}))
# of half the difference of distances for dpo, of all of it for pso, as published
_PAIR_BETA = {"dpo": 100.0, "pso": 50.0}


@dataclass(frozen=True)
class PreferOptions(TrainOptions):
    """How the generator is trained."""

    objective: Name = "pso"
    """pso: pairs of actions around one clean latent; rlcm (PPO), rebel: groups of them; d3po: pso
    as published for many steps; neighbor_grpo: images of neighbouring noises; drpo: drift of
    features towards the better half; dpo: distance to the better and the worse half."""
    group: int = 16
    """Images of a prompt that are compared with each other."""
    epochs: int = 10
    """Passes over new groups of each prompt; with --pairs, over the pairs."""
    groups_per_prompt: int = 4
    """Groups of each prompt in an epoch, of new random noises."""
    batch_size: int = 4
    """Groups per step; with --pairs, pairs per step."""
    lr: float = 3e-5
    """AdamW's learning rate."""
    preserve_latent_weight: float = 0.0
    """Weight of the latent distance to the base generator on random noise, against drift."""
    preserve_pixel_weight: float = 0.0
    """The same in pixels ([0, 1] RGB); 0 never decodes."""
    kl_weight: float | None = None
    """Weight of the distance of the step's own images to the base generator's: for pso, d3po, rlcm
    and rebel the KL divergence of what they draw in nats, by default 0 for pso and d3po and 0.2 for
    the others; for neighbor_grpo, drpo, dpo and --pairs the mean square of clean latents, by
    default 0.2 for neighbor_grpo, 1 for drpo and else 0."""
    max_drift: float = 0.5
    """The training ends when the clean latents of a step are so far from the base generator's (RMS,
    in deviations of latents); inf never ends it."""
    beta: float | None = None
    """pso, d3po: how much the loss makes of a log-ratio, by default 0.1, and 50 for pso with
    --original_scale; dpo: of a squared distance of clean latents, by default 30. With --pairs dpo
    and pso: of such a one, by default 100 and 50."""
    clip: float | None = None
    """pso: bound of the log-ratio to the base in nats, by default 25; d3po, and pso with
    --original_scale: of the ratio of means, by default 0.1."""
    clip_form: Clip | None = None
    """pso, d3po: "ppo", by default for pso, clips only what would be rewarded for going further;
    "original", by default for d3po and for pso with --original_scale, all."""
    original_scale: bool = False
    """pso, rebel: take beta, clip and eta as the papers do, of log-probabilities that are means
    over the latent's elements instead of sums."""
    action_std: float = 0.3
    """One step: an action is a clean latent with noise added, so that its likelihood is known; here
    is that noise's deviation, in deviations of latents."""
    action_pool: int = 1
    """Draw that noise once for each block of so many latent pixels a side and channel: the fewer
    numbers decide, the more a reward says of each."""
    eta: float = 1.0
    """rebel: advantage per nat."""
    neighbor_spread: float = 0.3
    """neighbor_grpo: share of a neighbour's noise that is its own."""
    anchors: int = 4
    """neighbor_grpo: how many of a group's images are evaluated with a gradient."""
    temperature: float | Literal["auto"] = "auto"
    """neighbor_grpo: of the choice among neighbours, in squared deviations; auto: the group's mean
    squared distance."""
    features: str | None = None
    """drpo: what images are compared by, with a gradient: clip, dinov2, python:module.function, see
    evaluate --help, or latents; by default what is there of the prompts' classifier, CLIP, DINOv2,
    latents."""
    positives: int | None = None
    """drpo: how many of the best draw, and of the worst push; by default half of the group."""
    reference_weight: float = 0.0
    """drpo: weight of a term that draws features to those of the base generator's images; 0.2 as
    published."""
    pair_noise: Literal["assigned", "random"] = "assigned"
    """With --pairs: train better and worse image on the noise that was assigned to each, or
    (baseline) both on the same new random noise at every step."""
    pair_space: Literal["eps", "x0"] = "eps"
    """With --pairs, of several steps: each batch trains one of them, on the images' noised latents.
    eps: by how wrong the noise, or a flow's velocity, is, as published; x0: the clean latents. The
    first step begins with noise alone, as one step does, and always takes the clean latents."""
    loser_weight: float = 1.0
    """With --pairs: factor of the worse image's part; less than 1 pushes less from it."""
    winner_weight: float = 5.0
    """With --pairs: weight of the better image's own squared distance, which may grow as long as
    the worse one's grows more; 0 as published."""

    def check(self) -> None:
        super().check()
        require(
            self.lora_from is None,
            "--lora_from has no place here, where the base is the network without its adapter: "
            "merge it by --lora",
        )
        name = self.objective
        for field in fields(self):
            if field.name in _OWN and field.name not in _OF[name]:
                require(
                    getattr(self, field.name) == field.default,
                    f"--{field.name} has no effect on --objective {name}; leave it out",
                )
        for flag in ("clip", "max_drift"):
            value = getattr(self, flag)
            require(value is None or value > 0, f"{flag} is {value}; give a positive number")
        for flag in ("beta", "action_std", "eta", "neighbor_spread"):
            value = getattr(self, flag)
            good = value is None or 0 < value < math.inf
            require(good, f"{flag} is {value}; give a finite positive number")
        for flag in ("kl_weight", "reference_weight"):
            value = getattr(self, flag)
            good = value is None or 0 <= value < math.inf
            require(good, f"{flag} is {value}; give a finite number, 0 or more")
        require(
            self.temperature == "auto" or 0 < self.temperature < math.inf,
            f"temperature is {self.temperature}; give a finite positive number, or auto",
        )
        require(self.neighbor_spread <= 1, "neighbor_spread is a share; give at most 1")
        self._check_numbers()

    def _check_numbers(self) -> None:
        group = self.group
        require(group >= 2, f"group is {group}; preferences need at least 2 images of a prompt")
        for flag in ("groups_per_prompt", "action_pool", "anchors"):
            require(getattr(self, flag) >= 1, f"{flag} must be at least 1")
        require(
            group % 2 == 0 or self.objective not in (*_PAIRED, "dpo"),
            f"group is {group}; {self.objective} compares pairs: give an even number",
        )
        require(
            self.anchors <= group or self.objective != "neighbor_grpo",
            f"anchors is {self.anchors}, of a group of {group}; give at most as many",
        )
        chosen = self.positives
        require(
            chosen is None or 1 <= chosen <= group // 2,
            f"positives is {chosen}; as many of the worst are needed: give at most half of the "
            f"group of {group}",
        )
        require(
            self.clip is None or self.clip < 1 or not self._on_means,
            f"clip is {self.clip}; of ratios of means give less than 1",
        )

    def check_drawn(self) -> None:
        """Raise UserError for values that make no sense on images that are drawn."""
        for flag in _PAIRS:
            require(
                getattr(self, flag) == getattr(PreferOptions, flag),
                f"--{flag} has no effect without --pairs; give --pairs, too",
            )
        self.check()

    def check_pairs(self) -> None:
        """Raise UserError for values that make no sense on given pairs of images."""
        name = self.objective
        require(
            name in _PAIR_BETA,
            f"--objective {name} draws its own images; with --pairs give dpo or pso",
        )
        for flag in _DRAWN:
            require(
                getattr(self, flag) == getattr(PreferOptions, flag),
                f"--{flag} has no effect with --pairs, whose images are given; leave it out",
            )
        for flag in ("loser_weight", "winner_weight"):
            value = getattr(self, flag)
            require(0 <= value < math.inf, f"{flag} is {value}; give a finite number, 0 or more")
        self.check()

    def pair_loss(self, several: bool = False) -> PreferenceLoss:
        """What is lowered on given pairs, at one step or at one of several."""
        beta = _PAIR_BETA[self.objective] if self.beta is None else self.beta
        beta = beta if self.objective == "dpo" else 2 * beta
        objective = PairDPO(beta, self.loser_weight, self.winner_weight)
        preserve = Preserve(self.preserve_latent_weight, self.preserve_pixel_weight)
        weight = self.kl_weight or 0.0
        policy = NoisedPairs() if several else CleanLatents()
        return PreferenceLoss(objective, policy, weight, preserve, sampled=False)

    @property
    def _on_means(self) -> bool:
        return self.original_scale or self.objective == "d3po"

    @property
    def drawing(self) -> Literal["pairs", "actions", "neighbors", "samples"]:
        """What the images of a group are.

        Two, or all of them, around one clean latent; of neighbouring noises; of independent ones.
        """
        if self.objective in _PAIRED:
            return "pairs"
        if self.objective in ("rlcm", "rebel"):
            return "actions"
        return "neighbors" if self.objective == "neighbor_grpo" else "samples"

    @property
    def noises(self) -> int:
        """How many of a group are evaluated with a gradient."""
        of = {"pairs": self.group // 2, "actions": 1, "neighbors": self.anchors}
        return of.get(self.drawing, self.group)

    def drawn(self, shape: Sequence[int]) -> int:
        """How many numbers are drawn for a latent [C, h, w] in a step that draws noise."""
        channels, *sides = shape
        return channels * math.prod(-(-side // self.action_pool) for side in sides)

    def check_steps(self, draws_noise: bool) -> None:
        """Raise UserError for what makes no sense over several steps.

        Args:
            draws_noise: Whether those before the last one draw some.
        """
        name = self.objective
        require(
            self.drawing in ("pairs", "actions"),
            f"--objective {name} is of one step; leave --num_inference_steps out, or give pso, "
            "d3po, rlcm or rebel",
        )
        require(
            draws_noise,
            "a step that draws no noise has no likelihood: give --cps_eta, or a scheduler that "
            "draws; or leave --num_inference_steps out: one step has actions around its image",
        )
        for flag in ("action_std", "action_pool"):
            require(
                getattr(self, flag) == getattr(PreferOptions, flag),
                f"--{flag} has no effect on several steps, which draw noise themselves; leave it "
                "out",
            )

    def loss(
        self,
        size: int,
        features: Callable[[Tensor], Tensor] | None = None,
        several: bool = False,
    ) -> PreferenceLoss:
        """What is lowered.

        Args:
            size: How many numbers a step draws, see ``drawn``.
            features: For drpo: [B, F] of clean latents [B, C, h, w].
            several: Of several steps, each with a likelihood of its own.
        """
        acts = self.drawing in ("pairs", "actions")
        policy: Policy = Actions(self.action_std, self.action_pool) if acts else CleanLatents()
        if several:
            policy = Steps()
        weight = _KL.get(self.objective, 0.0) if self.kl_weight is None else self.kl_weight
        preserve = Preserve(self.preserve_latent_weight, self.preserve_pixel_weight)
        return PreferenceLoss(self._objective(size, features), policy, weight, preserve)

    def _objective(self, size: int, features: Callable[[Tensor], Tensor] | None) -> Objective:
        name = self.objective
        if name in _PAIRED:
            found = d3po(size) if name == "d3po" else original_pso(size)
            found = found if self._on_means else PSO()
            given: dict[str, Any] = {"beta": self.beta, "clip": self.clip, "form": self.clip_form}
            return replace(found, **{k: v for k, v in given.items() if v is not None})
        if name == "rlcm":
            return RLCM()
        if name == "rebel":
            return REBEL(self.eta, 1 / size if self.original_scale else 1.0)
        if name == "neighbor_grpo":
            return NeighborGRPO(self.temperature)
        if name == "dpo":
            return GroupDPO() if self.beta is None else GroupDPO(self.beta)
        half = self.group // 2 if self.positives is None else self.positives
        return DrPO(features or _flat, half, self.reference_weight)


def _flat(latents: Tensor) -> Tensor:
    return torch.flatten(latents, 1)


@dataclass(frozen=True)
class PreferData(MeasureOptions, SizeOptions, JudgeModels):
    """Which images are compared, by what, and what is measured."""

    reward: UseAppendAction[tuple[str, ...]] = ()
    """NAME[:WEIGHT], such as clip:0.01, or python:module.function[:WEIGHT]; may be given several
    times: images are compared by the weighted sum. No gradient is needed."""
    pairs: Path | None = None
    """Instead of drawn images: JSON lines {"prompt", "image", "rejected"[, "weight"]}, a better and
    a worse image each, with paths relative to the file, or a .parquet file of Pick-a-Pic; for
    --objective dpo and pso."""
    manifest_path: Manifests = ()
    """With --pairs: manifest.jsonl of assign with the noises of their images; may be several, such
    as of assign --image_field image and --image_field rejected."""
    prompt_file: Path | None = None
    """Prompts: .txt with one per line, .tsv or .csv with a header, or .jsonl."""
    prompt_field: str | None = None
    """Column or field of prompt_file; by default the first of prompt, text and caption."""

    @property
    def names(self) -> list[str]:
        """How rewards and judges were named and computed, for a run's settings."""
        judges = [f"judge {name}" for name in self.judge]
        return [*self.reward, f"computed in {self.reward_dtype}", *judges]
