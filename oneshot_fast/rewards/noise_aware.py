"""A reward trained for what a sampler estimates on its way, in a folder of `scale train_reward`.

Noise-aware fine-tuning as in TTSnap (arXiv 2511.22242): from the estimate of an early step a
network tells the base reward of the image that the step leads to.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oneshot_fast.embedded.classifier import NUM_FEATURES, load_classifier
from oneshot_fast.embedded.digits import IMAGE_SIZE
from oneshot_fast.errors import ModelError, UserError, refused
from oneshot_fast.rewards import CONFIG, load_reward
from oneshot_fast.rewards.base import Reward, Setup
from oneshot_fast.rewards.preprocess import resize
from oneshot_fast.rewards.thickness import paper_distance, stroke_width
from oneshot_fast.runtime.files import read_json, read_safetensors

CLASSIFIER, THRESHOLDS = "classifier", "thresholds"
_CUTS = (0.1, 0.3, 0.5, 0.7, 0.9)  # in units of the ink's distance to the paper
_SOFTNESS = 0.06
_BLACK = math.sqrt(3)  # distance of black ink to white paper


class ClassifierScore(Reward):
    """One number from the body of the packaged classifier of digits; prompts are not read.

    For rewards that have no weights of their own, such as formulas. It begins as the mean.
    """

    name = CLASSIFIER
    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        """Take the classifier's features, and a head that is zero."""
        super().__init__()
        self.body = load_classifier().body
        self.head = nn.Linear(NUM_FEATURES, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        found = self.head(self.body(2 * resize(images.float(), IMAGE_SIZE) - 1))[:, 0]
        return self.mean + self.deviation * found


class ThresholdScore(Reward):
    """``thickness`` of an estimate, corrected by what it is once every grey is decided.

    An estimate is grey where its image is undecided, and its paper is uneven. With w the stroke
    width, d the ink's distance to the paper (of all pixels' the 97th percentile) and w_t the width
    of the image in which what is farther than t d is ink, softly, the score is

        log w + sum_t a_t log(w_t / w) + b (d - sqrt 3) + c,

    exponentiated. It begins as w; prompts are not read.
    """

    name = THRESHOLDS
    cuts: Tensor

    def __init__(self) -> None:
        """Take a head that is zero."""
        super().__init__()
        self.head = nn.Linear(len(_CUTS) + 1, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("cuts", torch.tensor(_CUTS)[:, None, None], persistent=False)

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        distance = paper_distance(images)
        flat = distance.flatten(1)
        ink = flat.kthvalue(math.ceil(0.97 * flat.shape[1]), 1, keepdim=True).values
        relative = (distance / ink[:, :, None])[:, None]
        width = stroke_width(distance)[:, None]
        at_cuts = stroke_width(((relative - self.cuts) / _SOFTNESS).sigmoid())
        found = torch.cat(((at_cuts / width).log(), ink - _BLACK), 1)
        return (width * self.head(found).exp())[:, 0]


NETWORKS: dict[str, Callable[[], Reward]] = {
    CLASSIFIER: ClassifierScore,
    THRESHOLDS: ThresholdScore,
}


def network_of(name: str, setup: Setup) -> Reward:
    """A network to train, in evaluation mode: nothing in it is drawn, such as dropout.

    Args:
        name: Of a reward that has weights, or of ``NETWORKS``.
        setup: Where its models are; float32 to train it.

    Raises:
        UserError: If there is no such reward, or it has no weights.
    """
    alone = Setup(setup.models_dir, setup.device, setup.dtype)  # shares no encoder
    made = NETWORKS.get(name)
    network = load_reward(name, alone) if made is None else made().to(setup.device)
    if isinstance(network, NoiseAwareReward):
        raise UserError(f"{name} was trained already; name the reward that it began as")
    if not any(True for _ in network.parameters()):
        raise UserError(f"reward {name} has no weights to train; give --network {CLASSIFIER}")
    return network.eval().requires_grad_(False)


class NoiseAwareReward(Reward):
    """Networks of one reward for the steps of a sampler, read as they are asked for.

    Steps without a network have the base reward: it was not trained for them, or none was better.
    Images of which no step is told have the network of the latest one.
    """

    def __init__(self, name: str, config: dict[str, Any], setup: Setup) -> None:
        """Describe what is in the folder ``name``, by its ``config``."""
        super().__init__()
        self.name, self._config, self._setup = name, config, setup
        self.num_steps = int(config["num_steps"])
        self._files = {int(step): str(file) for step, file in config["files"].items()}
        self._read: dict[str, Reward] = {}
        self.last = self.at_step(max(self._files, default=-1))
        self.tokenizer, self.prompt_tokens = self.last.tokenizer, self.last.prompt_tokens
        self.differentiable = self.last.differentiable

    @classmethod
    def load(cls, name: str, setup: Setup) -> "NoiseAwareReward":
        path = Path(name) / CONFIG
        if not path.is_file():
            raise ModelError(f"{name} holds no reward of `scale train_reward`: no {CONFIG}")
        with refused(ModelError, f"{path} has another layout: "):
            return cls(name, read_json(path), setup)

    def at_step(self, step: int) -> Reward:
        file = self._files.get(step, "")
        if file not in self._read:
            self._read[file] = self._load(file) if file else self._base()
        return self._read[file]

    def _base(self) -> Reward:
        found = load_reward(self._config["reward"], self._setup)
        found.name = self.name
        return found.eval().requires_grad_(False)

    def _load(self, file: str) -> Reward:
        path, network = Path(self.name) / file, network_of(self._config["network"], self._setup)
        if not path.is_file():
            raise ModelError(f"{path} is missing; repeat the `scale train_reward` that made it")
        with refused(ModelError, f"{path} does not fit {self._config['network']}: "):
            network.load_state_dict(read_safetensors(path))
        network.name = self.name
        return network

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return self.last.encode(prompts)

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        return self.last(images, features)
