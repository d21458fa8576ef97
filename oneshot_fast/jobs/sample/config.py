"""RTDMD's YAML files of inference (https://github.com/Harahan/RTDMD, configs/inference)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from oneshot_fast.data.prompts import read_prompts
from oneshot_fast.errors import UserError, one_line, require
from oneshot_fast.generators.lora_files import LoraFile, read_torch
from oneshot_fast.runtime.ledger import say

_FAMILIES = {"sd35": "StableDiffusion3Pipeline", "flux": "FluxPipeline"}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_REWARDS = {
    "pickscore": "pickscore", "aesthetic": "aesthetic", "hpsv2": "hpsv2", "clipscore": "clip",
    "imagereward": "imagereward",
}  # fmt: skip
_IGNORED = ("preload_reward_models", "reward_dataset_map", "distributed", "strategy")
_PROMPT_FILES = ("test.txt", "test_metadata.jsonl", "test.jsonl", "prompts.txt")
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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: {one_line(error)}") from None
    require(isinstance(raw, dict), f"--config {path}: it is no YAML of keys and values")
    given = {str(key): value for key, value in raw.items()}
    for override in overrides:
        key, is_there, text = override.partition("=")
        require(bool(is_there), f"--override {override}: give KEY=VALUE")
        outer, _, inner = key.partition(".")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--override {override}: {one_line(error)}") from None
        given[outer] = {**_mapping(given.get(outer), outer), inner: value} if inner else value
    unknown = [key for key in given if key not in _KEYS and key not in _IGNORED]
    require(not unknown, f"--config {path}: unknown key {', '.join(unknown[:3])}; remove it")
    if ignored := [key for key in _IGNORED if key in given]:
        say(f"{path}: not used here: {', '.join(ignored)}")
    # what is empty in the file counts as left out
    return _Reader(path, _KEYS | {k: v for k, v in given.items() if v not in (None, "")}).read(
        list(prompts)
    )


class _Reader:
    """Values of a YAML file by key, and what is wrong with them."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self._path, self._values = path, values

    def read(self, prompts: list[str]) -> InferenceConfig:
        family, mode = self._one("model_type", _FAMILIES), self._text("mode")
        self._need(mode in ("distilled", "normal"), "mode", "give distilled or normal")
        steps, guidance = self._number("num_steps", 1), float(self._values["guidance_scale"])
        model: dict[str, Any] = {
            "num_inference_steps": steps,
            "dtype": self._one("dtype", _DTYPES),
            "lora": tuple(self._list("lora_paths")),
        }
        if mode == "distilled":
            levels = tuple(map(float, self._list("denoising_step_list")))
            fits = steps <= len(levels)
            self._need(fits, "num_steps", f"denoising_step_list has {len(levels)} timesteps")
            if steps > 1:
                model |= {"step_list": levels, "cps_eta": float(self._values["cps_eta"])}
            self._need(steps > 1 or levels[0] == 1000, "denoising_step_list", "begin at 1000")
        if steps > 1:
            model["guidance_scale"] = guidance
        self._need(steps > 1 or guidance == 1, "guidance_scale", "one step has none: 1")
        self._check_ranks(model["lora"])
        ckpt = self._text("reward_ckpt_path")
        return InferenceConfig(
            model_id=self._text("pretrained_path"),
            pipeline=family,
            model=model,
            lora_alpha=float(self._values["lora_alpha"]),
            resolution=self._number("image_resolution", 1),
            seed=self._number("seed", 0),
            batch_size=self._number("batch_size", 1),
            prompts=prompts or self._prompts(),
            output_dir=Path(self._text("output_dir")),
            rewards=self._rewards() if self._values["eval_reward"] else (),
            models_dir=Path(ckpt) if ckpt else None,
        )

    def _check_ranks(self, files: Sequence[str]) -> None:
        """The scale is lora_alpha / lora_rank in the original, and alpha / the file's rank here."""
        rank = self._number("lora_rank", 1)
        for file in map(LoraFile.parse, files):
            if not file.has_alpha:
                found = read_torch(file, f"{file.path}: ")[1]["r"]
                self._need(found == rank, "lora_rank", f"{file.path} has {found}")

    def _prompts(self) -> list[str]:
        if inline := self._list("prompts"):
            return inline
        named = self._text("eval_prompt_path") or self._text("prompt_file")
        source = self._text("eval_prompt_source")
        known = source in ("dataset", "prompt_file")
        self._need(known, "eval_prompt_source", "give dataset or prompt_file")
        if source == "prompt_file" or named:
            self._need(bool(named), "prompt_file", "name the file of the prompts")
            return read_prompts(Path(named))
        folder = Path(self._text("dataset_path")) / self._text("dataset")
        files = [folder / name for name in _PROMPT_FILES if (folder / name).is_file()]
        listed = ", ".join(_PROMPT_FILES)
        self._need(bool(files), "dataset", f"{folder} has none of {listed}; or give --prompt TEXT")
        found = read_prompts(files[0])
        most = self._number("num_media_images", 0)
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
        return tuple(f"{_REWARDS[name]}:{float(value)}" for name, value in weights.items())

    def _text(self, key: str) -> str:
        value = self._values[key]
        self._need(isinstance(value, str), key, "give a text")
        return str(value)

    def _number(self, key: str, least: int) -> int:
        value = self._values[key]
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        self._need(fits, key, f"give a whole number from {least}")
        return int(value)

    def _one(self, key: str, known: Mapping[str, str]) -> str:
        value = str(self._values[key]).lower()
        self._need(value in known, key, f"only these are read: {', '.join(known)}")
        return known[value]

    def _list(self, key: str) -> list[Any]:
        value = self._values[key]
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        self._need(isinstance(value, list), key, "give a list")
        return [part for part in value if part != ""]

    def _need(self, holds: bool, key: str, remedy: str) -> None:
        require(holds, f"{self._path}: {key} is {self._values[key]!r:.80}: {remedy}")


def _mapping(value: Any, key: str) -> dict[str, Any]:
    require(
        value is None or isinstance(value, dict), f"{key} is {value!r:.80}: give keys and values"
    )
    return dict(value or {})
