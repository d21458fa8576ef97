"""RTDMD's YAML files of inference (https://github.com/Harahan/RTDMD, configs/inference)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from oneshot_fast.data.prompts import read_prompts
from oneshot_fast.data.records import text_field
from oneshot_fast.errors import UserError, one_line, require
from oneshot_fast.generators.lora_files import LoraFile
from oneshot_fast.generators.rtdmd_files import read_rtdmds
from oneshot_fast.runtime.ledger import say

_FAMILIES = {"sd35": "StableDiffusion3Pipeline", "flux": "FluxPipeline"}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_REWARDS = {
    "pickscore": "pickscore", "aesthetic": "aesthetic", "hpsv2": "hpsv2", "clipscore": "clip",
    "imagereward": "imagereward",
}  # fmt: skip
_IGNORED = ("preload_reward_models", "reward_dataset_map", "distributed", "strategy")
_PROMPT_FILES = (
    "test.txt", "test.jsonl", "test_metadata.jsonl", "prompts.json", "prompts.txt",
    "metadata.jsonl",
)  # fmt: skip
_TIMESTEPS = 1000  # of a flow's training
# what is read, and what is taken where it is not given
_KEYS: dict[str, Any] = {
    "pretrained_path": "", "model_type": "sd35", "dtype": "bf16", "image_resolution": 512,
    "mode": "distilled", "lora_paths": [], "lora_rank": 32, "lora_alpha": 64, "num_steps": 4,
    "denoising_step_list": [1000, 750, 500, 250], "cps_eta": 0.9, "guidance_scale": 1.0,
    "seed": 42, "batch_size": 4, "prompts": [], "prompt_file": "", "eval_prompt_path": "",
    "eval_prompt_source": "dataset", "dataset": "drawbench", "dataset_path": "dataset",
    "output_dir": "./inference_outputs", "eval_reward": False, "reward_fn": {},
    "reward_ckpt_path": "", "num_media_images": 0,
}  # fmt: skip


@dataclass(frozen=True)
class InferenceConfig:
    """What a YAML file says, in our words.

    Attributes:
        model_id: The base model.
        pipeline: diffusers' class that it has to be.
        model: Values of ``ModelOptions`` by name.
        guidance: What a model that embeds its guidance is told; None: its pipeline's default.
        lora_alpha: Of files that do not say it.
        resolution: Image side in pixels.
        seed: Of the images.
        batch_size: Images that are made at once.
        prompts: Of the images.
        output_dir: Where they are written.
        rewards: Specs of ``load_rewards``.
        models_dir: Folder of their models; None for the usual one.
    """

    model_id: str
    pipeline: str
    model: dict[str, Any]
    guidance: float | None
    lora_alpha: float
    resolution: int
    seed: int
    batch_size: int
    prompts: list[str]
    output_dir: Path
    rewards: tuple[str, ...]
    models_dir: Path | None


def read_config(
    path: Path, overrides: Sequence[str] = (), prompts: Sequence[str] = ()
) -> InferenceConfig:
    """Read a YAML file.

    Args:
        path: The file.
        overrides: KEY=VALUE, where the value is YAML, in place of the file's.
        prompts: Of the command line, in place of all that the file names.

    Raises:
        UserError: If it cannot be read, a key is unknown, or a value is of no use.
    """
    require(path.is_file(), f"--config {path}: no such file")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: {one_line(error)}") from None
    require(isinstance(raw, dict), f"--config {path}: it is no YAML of keys and values")
    given = {str(key): value for key, value in raw.items()}
    for override in overrides:
        key, is_there, text = override.partition("=")
        require(bool(is_there), f"--override {override}: give KEY=VALUE")
        outer, _, inner = key.partition(".")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"--override {override}: {one_line(error)}") from None
        given[outer] = {**_mapping(given.get(outer), outer), inner: value} if inner else value
    unknown = [key for key in given if key not in _KEYS and key not in _IGNORED]
    require(not unknown, f"--config {path}: unknown key {', '.join(unknown[:3])}; remove it")
    # what is empty in the file counts as left out
    given = {key: value for key, value in given.items() if value not in (None, "")}
    return _Reader(path, given).read(list(prompts))


class _Reader:
    """Values of a YAML file by key, and what is wrong with them."""

    def __init__(self, path: Path, given: Mapping[str, Any]) -> None:
        self._path, self._given, self._values = path, given, _KEYS | dict(given)

    def read(self, prompts: list[str]) -> InferenceConfig:
        family, mode = self._one("model_type", _FAMILIES), self._text("mode")
        self._need(mode in ("distilled", "normal"), "mode", "give distilled or normal")
        model_id = self._text("pretrained_path")
        self._need(bool(model_id.strip()), "pretrained_path", "name the base model")
        steps, told = self._whole("num_steps", 1), None
        model: dict[str, Any] = {
            "num_inference_steps": steps,
            "dtype": self._one("dtype", _DTYPES),
            "lora": tuple(self._texts("lora_paths", split=True)),
        }
        if mode == "distilled":
            levels, eta = self._levels(steps), self._real("cps_eta", 0, 1)
            if steps > 1:
                model |= {"step_list": levels, "cps_eta": eta}
            if family == "FluxPipeline":
                told = 1.0  # as it was trained
        else:
            guidance, is_told = self._real("guidance_scale", 1), family == "FluxPipeline"
            fits = steps > 1 or guidance == 1 or is_told
            self._need(fits, "guidance_scale", "one step has none: 1")
            if is_told:
                told = guidance
            elif steps > 1:
                model["guidance_scale"] = guidance
        self._check_ranks(model["lora"])
        ckpt = self._text("reward_ckpt_path")
        of_dataset = self._text("eval_prompt_source") == "dataset"
        found = InferenceConfig(
            model_id=model_id,
            pipeline=family,
            model=model,
            guidance=told,
            lora_alpha=self._real("lora_alpha", 0),
            resolution=self._whole("image_resolution", 1),
            seed=self._whole("seed", 0),
            batch_size=self._whole("batch_size", 1),
            prompts=prompts or self._prompts(of_dataset),
            output_dir=Path(self._text("output_dir")),
            rewards=self._rewards() if self._flag("eval_reward") else (),
            models_dir=Path(ckpt) if ckpt else None,
        )
        other_mode = (
            ("guidance_scale",) if mode == "distilled" else ("denoising_step_list", "cps_eta")
        )
        other_source = ("prompts", "eval_prompt_path", "prompt_file") if of_dataset else ()
        self._say_unused(other_mode, () if prompts else other_source)
        return found

    def _say_unused(self, *groups: Sequence[str]) -> None:
        """Name the keys that have no effect here, where they say anything but the usual."""
        unused = [key for key in _IGNORED if key in self._given]
        for key in (key for group in groups for key in group):
            if key in self._given and self._given[key] != _KEYS[key]:
                unused.append(key)
        if unused:
            say(f"{self._path}: not used here: {', '.join(unused)}")

    def _levels(self, steps: int) -> tuple[float, ...]:
        """Timesteps that the steps begin at."""
        key = "denoising_step_list"
        found = tuple(self._float(value, key, 0, _TIMESTEPS) for value in self._list(key))
        self._need(
            all(a > b for a, b in zip(found, [*found[1:], 0], strict=False)) and bool(found),
            key,
            f"give falling timesteps, from {_TIMESTEPS} to above 0",
        )
        self._need(steps <= len(found), "num_steps", f"{key} has {len(found)} timesteps")
        self._need(steps > 1 or found[0] == _TIMESTEPS, key, f"begin at {_TIMESTEPS}")
        return found

    def _check_ranks(self, files: Sequence[str]) -> None:
        """The scale is lora_alpha / lora_rank in the original, and alpha / the file's rank here."""
        rank = self._whole("lora_rank", 1)
        for file in map(LoraFile.parse, files):
            if not file.has_alpha:
                found = read_rtdmds(file.path, file.alpha, f"{file.path}: ")[1]["r"]
                self._need(found == rank, "lora_rank", f"{file.path} has {found}")

    def _prompts(self, of_dataset: bool) -> list[str]:
        """As the original finds them: of the data set, or inline, or of a file."""
        known = of_dataset or self._text("eval_prompt_source") == "prompt_file"
        self._need(known, "eval_prompt_source", "give dataset or prompt_file")
        most = self._whole("num_media_images", 0)
        if of_dataset:
            folder = Path(self._text("dataset_path")) / self._text("dataset")
            files = [folder / name for name in _PROMPT_FILES if (folder / name).is_file()]
            none_there = f"{folder} has none of {', '.join(_PROMPT_FILES)}; or give --prompt TEXT"
            self._need(bool(files), "dataset", none_there)
            found = read_prompts(files[0])
        elif not (found := self._texts("prompts")):
            named = self._text("eval_prompt_path") or self._text("prompt_file")
            self._need(bool(named), "prompt_file", "name the file of the prompts")
            found = read_prompts(Path(named))
        return found[:most] if most else found

    def _rewards(self) -> tuple[str, ...]:
        weights = _mapping(self._values["reward_fn"], "reward_fn")
        others = [name for name in weights if name not in _REWARDS]
        self._need(
            not others,
            "reward_fn",
            f"{', '.join(others)} are not here; --override eval_reward=false, or name others: "
            f"'reward_fn={{pickscore: 1.0}}'",
        )
        for value in weights.values():
            self._float(value, "reward_fn")
        self._need(bool(weights), "reward_fn", "name rewards, or --override eval_reward=false")
        return tuple(_REWARDS[name] for name in weights)

    def _text(self, key: str) -> str:
        value = self._values[key]
        self._need(isinstance(value, str), key, "give a text")
        return str(value)

    def _whole(self, key: str, least: int) -> int:
        value = self._values[key]
        fits = isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63
        self._need(fits, key, f"give a whole number from {least}")
        return int(value)

    def _real(self, key: str, least: float, most: float = math.inf) -> float:
        return self._float(self._values[key], key, least, most)

    def _float(
        self, value: Any, key: str, least: float = -math.inf, most: float = math.inf
    ) -> float:
        """A number, which YAML takes for a text where it is written as 1e-3."""
        try:
            found = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        remedy = f"give a number from {least:g}" if least > -math.inf else "give numbers"
        remedy += f" to {most:g}" if most < math.inf else ""
        self._need(math.isfinite(found) and least <= found <= most, key, remedy)
        return found

    def _flag(self, key: str) -> bool:
        value = self._values[key]
        self._need(isinstance(value, bool), key, "give true or false")
        return bool(value)

    def _one(self, key: str, known: Mapping[str, str]) -> str:
        value = str(self._values[key]).lower()
        self._need(value in known, key, f"only these are read: {', '.join(known)}")
        return known[value]

    def _list(self, key: str, split: bool = False) -> list[Any]:
        """A list, or one value alone; with ``split`` a text is several, with commas between."""
        value = self._values[key]
        if isinstance(value, str):
            value = value.split(",") if split else [value]
        self._need(isinstance(value, list), key, "give a list")
        return list(value)

    def _texts(self, key: str, split: bool = False) -> list[str]:
        found = self._list(key, split)
        self._need(all(isinstance(text, str) for text in found), key, "give a list of texts")
        texts = [text.strip() for text in found]
        return [text_field({key: text}, key) for text in texts if text]

    def _need(self, holds: bool, key: str, remedy: str) -> None:
        require(holds, f"{self._path}: {key} is {self._values[key]!r:.80}: {remedy}")


def _mapping(value: Any, key: str) -> dict[str, Any]:
    require(
        value is None or isinstance(value, dict), f"{key} is {value!r:.80}: give keys and values"
    )
    return dict(value or {})
