"""Pools of rewards: those of every prompt's candidates at the steps of a generator.

Read from folders of YAML files as TTSnap publishes them (by a strict line parser), .npy, .npz,
.safetensors and Parquet; written as .safetensors.
"""

import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from oneshot_fast.data.tables import extra_module
from oneshot_fast.errors import DataError, one_line, require
from oneshot_fast.runtime.files import write_safetensors
from oneshot_fast.search.pruning import Floats

# published reward: (value - shift) * factor is the scale that papers print
_PUBLISHED = {
    "imr": (0.16717362830052426, 1 / 1.0333394966054072), "hps": (0.0, 100.0), "pic": (0.0, 1.0),
}  # fmt: skip
_FILE = re.compile(r"p\d+_i\d+_s(\d+)\.ya?ml")


@dataclass(frozen=True)
class Pool:
    """Rewards of N candidates of each of P prompts.

    Attributes:
        base: [P, N, len(steps), R] float64, of the reward that also selects in the end.
        steps: Numbers of the steps, from 0, that rise; the last one is the generator's last.
        rewards: R names.
        noise_aware: [P, N, len(noise_aware_steps), R], of a reward trained for noisy estimates.
        noise_aware_steps: Steps of those; elsewhere the base reward prunes.
        weights: Of the rewards in the sum that a run goes by; empty where nobody said any.
    """

    base: Floats
    steps: tuple[int, ...]
    rewards: tuple[str, ...]
    noise_aware: Floats | None = None
    noise_aware_steps: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Raise DataError for shapes that do not fit and values that are not finite."""
        if len(self.weights) not in (0, len(self.rewards)) or not np.isfinite(self.weights).all():
            raise DataError(f"a pool has weights {self.weights} of {len(self.rewards)} rewards")
        of_prune = () if self.noise_aware is None else ((self.noise_aware, self.noise_aware_steps),)
        for values, steps in ((self.base, self.steps), *of_prune):
            shape = (*self.base.shape[:2], len(steps), len(self.rewards))
            if values.shape != shape or not values.size:
                raise DataError(f"a pool has values {values.shape} where {shape} are expected")
            if any(a >= b for a, b in itertools.pairwise(steps)):
                raise DataError(f"steps of a pool must rise, not {list(steps)}")
            if not np.isfinite(values).all():
                prompt, image, step, reward = np.argwhere(~np.isfinite(values))[0]
                raise DataError(
                    f"prompt {prompt}, image {image}, step {steps[step]}: {self.rewards[reward]} "
                    "is not a finite number"
                )
        if not {*self.noise_aware_steps} <= {*range(self.num_steps)}:
            raise DataError(f"noise-aware steps {list(self.noise_aware_steps)} are out of range")

    @property
    def num_steps(self) -> int:
        """S of the generator."""
        return self.steps[-1] + 1

    @property
    def final(self) -> Floats:
        """[P, N, R]: what selects in the end."""
        return self.base[:, :, -1]

    def prune(self, after: tuple[int, ...], noise_aware: bool) -> Floats:
        """[K, P, N, R]: what prunes after these steps.

        Raises:
            UserError: For a step without values.
        """
        found = []
        for step in after:
            if noise_aware and self.noise_aware is not None and step in self.noise_aware_steps:
                found.append(self.noise_aware[:, :, self.noise_aware_steps.index(step)])
                continue
            require(step in self.steps, f"the pool has no values at step {step}, only {self.steps}")
            found.append(self.base[:, :, self.steps.index(step)])
        return np.stack(found) if found else np.zeros((0, *self.final.shape))

    def of_prompts(self, rows: Any) -> "Pool":
        """Some of the prompts."""
        aware = self.noise_aware
        return dataclasses.replace(
            self, base=self.base[rows], noise_aware=None if aware is None else aware[rows]
        )

    def total(self) -> "Pool":
        """The weighted sum of the rewards, as a run goes by, where the pool has weights."""
        if not self.weights or self.weights == (1.0,):
            return self
        weights, aware = np.array(self.weights)[:, None], self.noise_aware
        return dataclasses.replace(
            self,
            base=self.base @ weights,
            rewards=("total",),
            noise_aware=None if aware is None else aware @ weights,
            weights=(),
        )

    def without_copies(self) -> "Pool":
        """The first of candidates that are equal everywhere: images that were counted twice."""
        flat = self.base.transpose(1, 0, 2, 3).reshape(self.base.shape[1], -1)
        first = np.sort(np.unique(flat, axis=0, return_index=True)[1])
        copies = len(flat) - len(first)
        if not copies:
            return self
        print(f"warning: {copies} of {len(flat)} candidates are copies; left out", file=sys.stderr)
        aware = self.noise_aware
        return dataclasses.replace(
            self, base=self.base[:, first], noise_aware=None if aware is None else aware[:, first]
        )

    def published_scale(self) -> "Pool":
        """Rewards named imr, pic and hps as papers print them."""
        for name in self.rewards:
            require(name in _PUBLISHED, f"no published scale of {name}; leave --scale out")
        shift, factor = np.array([_PUBLISHED[name] for name in self.rewards]).T
        aware = self.noise_aware
        return dataclasses.replace(
            self,
            base=(self.base - shift) * factor,
            noise_aware=None if aware is None else (aware - shift) * factor,
        )


def read_pool(path: Path) -> Pool:
    """Read a pool of any form.

    Raises:
        DataError: If it is none, with the file and what is wrong.
    """
    if not path.exists():
        raise DataError(f"no pool {path}")
    readers = {
        ".npy": _read_npy, ".npz": _read_npz, ".safetensors": _read_safetensors,
        ".parquet": _read_parquet,
    }  # fmt: skip
    if not path.is_dir() and path.suffix not in readers:
        raise DataError(f"{path} is no pool: give a folder of YAML files, or {', '.join(readers)}")
    reader = _read_folder if path.is_dir() else readers[path.suffix]
    try:
        return reader(path)
    except Exception as error:  # of numpy, safetensors, pyarrow, or ours, which knows no path
        raise DataError(f"{path} is no pool: {one_line(error)}") from error


def write_pool(path: Path, pool: Pool) -> None:
    """Write a pool as .safetensors, float32."""
    tensors = {"base": torch.from_numpy(pool.base).float().contiguous()}
    about: dict[str, list[Any]] = {"steps": [*pool.steps], "rewards": [*pool.rewards]}
    if pool.noise_aware is not None:
        tensors["noise_aware"] = torch.from_numpy(pool.noise_aware).float().contiguous()
        about["noise_aware_steps"] = [*pool.noise_aware_steps]
    if pool.weights:
        about["weights"] = [*pool.weights]
    write_safetensors(path, tensors, {"pool": about})


def _read_npy(path: Path) -> Pool:
    values = np.load(path, allow_pickle=False).astype(np.float64)
    values = values[..., None] if values.ndim == 3 else values
    names = _names(values.shape[-1])
    return Pool(values, tuple(range(values.shape[2])), names)


def _read_npz(path: Path) -> Pool:
    with np.load(path, allow_pickle=False) as found:
        parts = {name: found[name] for name in found.files}

    def values(name: str) -> Floats | None:
        if f"{name}_bytes" in parts:  # float32 split into planes of bytes, [4, S, P, N]
            planes = np.ascontiguousarray(np.moveaxis(parts[f"{name}_bytes"], 0, -1))
            return planes.view("<f4")[..., 0].transpose(1, 2, 0)[..., None].astype(np.float64)
        if name not in parts:
            return None
        plain = parts[name].astype(np.float64)
        return plain[..., None] if plain.ndim == 3 else plain

    base = values("base")
    if base is None:
        raise DataError("it has no array named base")
    names = tuple(map(str, parts["rewards"])) if "rewards" in parts else _names(base.shape[-1])
    steps = parts.get("base_steps", np.arange(base.shape[2]))
    aware = parts.get("naft_steps", ())
    return Pool(base, tuple(map(int, steps)), names, values("naft"), tuple(map(int, aware)))


def _read_safetensors(path: Path) -> Pool:
    with safe_open(path, "np") as file:
        about = json.loads((file.metadata() or {}).get("pool", "{}"))
        values = {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}  # noqa: SIM118
    if not {"steps", "rewards"} <= about.keys() or "base" not in values:
        raise DataError("its header does not say which steps and rewards it has")
    return Pool(
        values["base"],
        tuple(about["steps"]),
        tuple(about["rewards"]),
        values.get("noise_aware"),
        tuple(about.get("noise_aware_steps", ())),
        tuple(about.get("weights", ())),
    )


def _read_parquet(path: Path) -> Pool:
    """A row per prompt, image and step; every other column is a reward."""
    table = extra_module("pyarrow.parquet").read_table(path).to_pydict()
    rewards = tuple(
        name for name in table if name not in ("prompt", "image", "step", "noise_aware")
    )
    marks = table.get("noise_aware", [False] * len(table["prompt"]))

    def values(kind: bool) -> tuple[Floats, tuple[int, ...]]:
        rows = [k for k, mark in enumerate(marks) if bool(mark) == kind]
        axes = [{v: i for i, v in enumerate(sorted({table[name][k] for k in rows}))}
                for name in ("prompt", "image", "step")]  # fmt: skip
        found = np.full((*map(len, axes), len(rewards)), np.nan)
        seen: set[tuple[int, ...]] = set()
        for k in rows:
            place = tuple(axis[table[name][k]] for axis, name in
                          zip(axes, ("prompt", "image", "step"), strict=True))  # fmt: skip
            if place in seen:
                raise DataError(f"row {k} has prompt, image and step of another row")
            seen.add(place)
            found[place] = [table[name][k] for name in rewards]
        return found, tuple(map(int, axes[2]))

    base, steps = values(False)
    aware, aware_steps = values(True) if any(marks) else (None, ())
    return Pool(base, steps, rewards, aware, aware_steps)


def _read_folder(folder: Path) -> Pool:
    """``{model}_{reward}_val_{base,naft}/pXXX_iXXX_sNN.yaml``, or one such folder alone."""
    inner = sorted(
        p for p in folder.iterdir() if p.is_dir() and p.name.endswith(("_base", "_naft"))
    )
    base_folders = [p for p in inner if p.name.endswith("_base")] or [folder]
    names, parts = [], []
    for place in base_folders:
        found = re.fullmatch(r".*_(\w+)_val_base", place.name)
        names.append(found[1] if found else "reward")
        parts.append(_read_steps(place))
    steps = _same(parts, base_folders)
    base = np.stack([np.stack([part[s] for s in steps], -1) for part in parts], -1)
    aware_parts = [
        _read_steps(twin) if (twin := p.with_name(p.name.removesuffix("_base") + "_naft")).is_dir()
        else {} for p in base_folders
    ]  # fmt: skip
    common = sorted(set.intersection(*({*part} for part in aware_parts)))
    aware = None
    if common:
        aware = np.stack([np.stack([part[s] for s in common], -1) for part in aware_parts], -1)
    return Pool(base, tuple(steps), tuple(names), aware, tuple(common))


def _same(parts: list[dict[int, Floats]], folders: list[Path]) -> list[int]:
    for part, folder in zip(parts, folders, strict=True):
        if part.keys() != parts[0].keys() or not part:
            raise DataError(f"{folder.name} has steps {sorted(part)}, others {sorted(parts[0])}")
    return sorted(parts[0])


def _read_steps(folder: Path) -> dict[int, Floats]:
    """[P, N] of every step."""
    found: dict[int, Floats] = {}
    for path in sorted(folder.iterdir()):
        if (name := _FILE.fullmatch(path.name)) is None:
            continue
        found[int(name[1])] = read_yaml(path)
        first = next(iter(found.values()))
        if found[int(name[1])].shape != first.shape:
            raise DataError(f"{path} has {found[int(name[1])].shape} values, others {first.shape}")
    return found


def read_yaml(path: Path) -> Floats:
    """Values [P, N] of a file of ``<prompt>:`` lines with ``- <float>`` lines below.

    Raises:
        DataError: For any other line, a prompt that comes twice, or rows of unequal length.
    """
    rows: dict[int, list[str]] = {}
    row: list[str] | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip()
        if text.startswith("- ") and row is not None:
            row.append(text[2:])
        elif text.endswith(":") and text[:-1].isascii() and text[:-1].isdecimal():
            key = int(text[:-1])
            if key in rows:
                raise DataError(f"{path}, line {number}: prompt {key} comes a second time")
            row = rows[key] = []
        elif text:
            raise DataError(f"{path}, line {number}: {one_line(text)} is neither N: nor - NUMBER")
    lengths: Mapping[int, int] = {key: len(values) for key, values in rows.items()}
    for key, length in lengths.items():
        if length != next(iter(lengths.values())):
            raise DataError(f"{path}: prompt {key} has {length} values, others another number")
    try:
        return np.array([rows[key] for key in sorted(rows)], dtype=np.float64)
    except ValueError as error:
        raise DataError(f"{path}: {one_line(error)}") from None


def _names(count: int) -> tuple[str, ...]:
    return ("reward",) if count == 1 else tuple(f"reward {k}" for k in range(count))
