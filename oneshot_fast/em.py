"""The main job: alternate assignment (E-step) and training (M-step), and measure what it brings.

Holds no maths: each stage is a resumable run in a folder of its own, and this file puts them in
order. Repeating an interrupted command goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from oneshot_fast.assign import AssignRun
from oneshot_fast.cli import (
    OK,
    SOME_FAILED,
    DataOptions,
    ModelOptions,
    RunOptions,
    public,
    run_command,
)
from oneshot_fast.data import Failure, Record, read_manifest
from oneshot_fast.errors import require
from oneshot_fast.matching import AssignOptions
from oneshot_fast.runs import RunFolder, append_jsonl, mend_jsonl, write_json, write_jsonl
from oneshot_fast.seeds import derived_seed
from oneshot_fast.sft import SftRun
from oneshot_fast.tracking import start_tracking
from oneshot_fast.training import PreservePool, SftOptions

if TYPE_CHECKING:
    from oneshot_fast.evaluate import RandomNoiseMeasure
    from oneshot_fast.generator import OneStepGenerator
    from oneshot_fast.targets import Targets

OUTPUTS = (
    "eval", "direct", "heldout-base", "heldout-final", "logs", "preserve.safetensors",
    "checkpoint-best", "checkpoint-final", "failures.jsonl", "history.jsonl", "summary.json",
    "report.html",
)  # fmt: skip


@dataclass(frozen=True)
class EmOptions:
    """How often and how thoroughly the two steps alternate."""

    num_cycles: int = 2
    """Cycles of one E-step and one M-step."""
    assign_steps: int = 40
    """E-step: gradient steps per target."""
    assign_lr: float = 0.02
    """E-step: Adam's learning rate on the skew matrix."""
    assign_batch_size: int = 16
    """E-step: targets solved at once."""
    patch_size: int = 2
    """E-step: side of the rotated patches in latent pixels."""
    rotation_groups: int = 1
    """E-step: G x G tiles of the latent with a rotation each."""
    drift_reg_weight: float = 0.0
    """E-step: weight of the mean squared distance between the noise and its base noise."""
    train_epochs: int = 10
    """M-step: passes over the matched pairs per cycle."""
    train_batch_size: int = 4
    """M-step: matched pairs per step."""
    train_lr: float = 1e-5
    """M-step: AdamW's learning rate."""
    train_weight_decay: float = 0.01
    """M-step: AdamW's decoupled weight decay."""
    train_max_grad_norm: float = 1.0
    """M-step: gradients are scaled down to this norm."""
    latent_loss_weight: float = 1.0
    """Both steps: weight of the mean squared error between the latents."""
    pixel_l1_weight: float = 0.0
    """Both steps: weight of the mean absolute error between the images; 0 never decodes."""
    preserve_latent_weight: float = 0.5
    """M-step: weight of the latent distance to the initial generator on random noise."""
    preserve_pixel_weight: float = 0.05
    """M-step: the same in pixels; 0 never decodes."""
    preserve_batch_size: int | None = None
    """M-step: random noises per step for the preserve losses; by default train_batch_size."""
    preserve_pool_size: int = 512
    """M-step: random noises whose initial outputs are computed once."""

    def assign(self) -> AssignOptions:
        """Options of the E-step."""
        return AssignOptions(
            steps=self.assign_steps,
            lr=self.assign_lr,
            patch_size=self.patch_size,
            rotation_groups=self.rotation_groups,
            latent_loss_weight=self.latent_loss_weight,
            pixel_l1_weight=self.pixel_l1_weight,
            drift_reg_weight=self.drift_reg_weight,
        )

    def sft(self, noise: Literal["matched", "random"] = "matched", cycles: int = 1) -> SftOptions:
        """Options of the M-step, or of ``cycles`` M-steps' worth of direct SFT."""
        return SftOptions(
            epochs=self.train_epochs * cycles,
            batch_size=self.train_batch_size,
            lr=self.train_lr,
            weight_decay=self.train_weight_decay,
            max_grad_norm=self.train_max_grad_norm,
            latent_loss_weight=self.latent_loss_weight,
            pixel_l1_weight=self.pixel_l1_weight,
            preserve_latent_weight=self.preserve_latent_weight,
            preserve_pixel_weight=self.preserve_pixel_weight,
            preserve_batch_size=self.preserve_batch_size,
            preserve_pool_size=self.preserve_pool_size,
            noise=noise,
        )


@dataclass(frozen=True)
class EmCommand:
    """Align a one-step generator with images: alternate noise assignment and training.

    Without arguments it runs the embedded default: a small digit generator and images of digits in
    a style it does not know. An interrupted run resumes when the same command is repeated.
    """

    work_dir: Path = Path("runs/em")
    """Folder of everything the run writes."""
    initial_model_id: str | None = None
    """Generator to align: folder in diffusers layout, hub id, .safetensors file, or "tiny". By
    default stabilityai/sdxl-turbo for your own data, "tiny" without."""
    heldout_root: Path | None = None
    """Pairs never trained on, in the format of data_root: assigned with the first and the last
    generator, with equal effort."""
    eval_samples: int = 500
    """Random noises on which the generator is measured before, between and after the cycles."""
    compare_direct: bool = False
    """Also train directly on random noise, with as many steps, and show it beside EM."""
    num_images: int = 16
    """Targets per E-step whose images are saved and shown; -1 for all."""
    save_minutes: float = 5.0
    """Minutes between saved training states; 0 saves after every step."""
    em: EmOptions = EmOptions()
    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    run: RunOptions = RunOptions()


class Em:
    """The stages of one run, in order; every one is skipped if its result is there."""

    def __init__(self, command: EmCommand) -> None:
        """Load the data and the initial generator.

        Raises:
            UserError: On bad data, model or options.
        """
        require(command.em.num_cycles >= 1, "num_cycles must be at least 1")
        require(command.eval_samples >= 10, "eval_samples must be at least 10")
        command.em.assign().check()
        command.em.sft().check()
        self.command, self.folder = command, command.work_dir
        train, heldout = self._data_roots()
        self.records, self.failures = command.data.read(train)
        self.heldout: list[Record] = []
        if heldout is not None:
            self.heldout, failures = dataclasses.replace(
                command.data, start_index=0, max_samples=None
            ).read(heldout)
            self.failures += failures

        from oneshot_fast.targets import Targets

        own_data = command.data.data_root is not None
        model_id = command.initial_model_id or ("stabilityai/sdxl-turbo" if own_data else "tiny")
        self.generator: OneStepGenerator = command.model.load(model_id, master_weights=True)
        self.targets: Targets = Targets(self.generator, command.data.resolution)
        self.summary: dict[str, Any] = {"random_noise": {}, "cycles": []}

    def _data_roots(self) -> tuple[Path, Path | None]:
        if self.command.data.data_root is not None:
            return self.command.data.data_root, self.command.heldout_root

        from oneshot_fast.tiny.dataset import write_default_dataset

        data = self.folder / "data"
        write_default_dataset(data)
        return data / "train", self.command.heldout_root or data / "heldout"

    def settings(self) -> dict[str, Any]:
        """Everything the result depends on."""
        return {
            "command": "em",
            **dataclasses.asdict(self.command.em),
            "eval_samples": self.command.eval_samples,
            "compare_direct": self.command.compare_direct,
            "seed": self.command.run.seed,
            "resolution": self.targets.resolution,
            "resize_mode": self.command.data.resize_mode,
            "model": self.generator.fingerprint(),
            "device": self.generator.device.type,
            "samples": len(self.records),
            "data": f"{derived_seed(0, *(record.id for record in self.records)):016x}",
            "heldout": f"{derived_seed(0, *(record.id for record in self.heldout)):016x}",
        }

    def run(self) -> dict[str, Any]:
        """Run all stages that have no result yet.

        Returns:
            The summary, as in summary.json.
        """
        run, cycles = self.command.run, range(1, self.command.em.num_cycles + 1)
        outputs = (*OUTPUTS, *(f"cycle-{cycle:02d}" for cycle in cycles))
        settings = self.settings()
        with RunFolder(self.folder, settings, outputs, run.overwrite):
            mend_jsonl(self.folder / "history.jsonl")
            tracker = start_tracking(run.report_to, self.folder, settings)
            measure = self._measure()
            self._evaluate(measure, "base")
            pool = self._pool()
            self._assign_heldout("base")
            initial = {k: v.cpu().clone() for k, v in self.generator.unet.state_dict().items()}
            for cycle in cycles:
                self._cycle(cycle, pool)
                tracker.log(self._evaluate(measure, _name(cycle)), step=cycle)
            self._assign_heldout("final")
            if self.command.compare_direct:
                self.generator.unet.load_state_dict(initial)
                self._train_directly(measure, pool)
            tracker.end_training()
            self._finish(settings)
        return self.summary

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[Path]:
        """Yield the folder of a stage and note in history.jsonl how long it took."""
        started = time.perf_counter()
        yield self.folder / name
        path = self.folder / "history.jsonl"
        if name not in (row["stage"] for row in mend_jsonl(path)):
            seconds = round(time.perf_counter() - started, 3)
            append_jsonl(path, [{"stage": name, "seconds": seconds}])

    def _measure(self) -> RandomNoiseMeasure:
        from oneshot_fast.evaluate import RandomNoiseMeasure, real_measures
        from oneshot_fast.tiny.classifier import load_classifier
        from oneshot_fast.tiny.dataset import digit_of

        prompts = [record.prompt for record in self.records]
        is_digits = all(digit_of(prompt) is not None for prompt in prompts)
        classifier = load_classifier() if is_digits else None
        real = None
        if self.heldout:
            mode = self.command.data.resize_mode
            real = self.targets.images([(record.image_path, mode) for record in self.heldout]).cpu()
            labels = [record.prompt for record in self.heldout]
            self.summary["real"] = real_measures(real, labels, classifier)
        return RandomNoiseMeasure(
            prompts,
            self.generator.latent_shape(self.targets.resolution, self.targets.resolution),
            samples=self.command.eval_samples,
            seed=self.command.run.seed,
            classifier=classifier,
            real=real,
        )

    def _evaluate(self, measure: RandomNoiseMeasure, name: str) -> dict[str, float]:
        with self._stage(f"eval/{name}") as path:
            result = measure.measure(self.generator, path)
        self.summary["random_noise"][name] = result
        return result

    def _pool(self) -> PreservePool | None:
        options = self.command.em.sft()
        if not options.preserves:
            return None
        return PreservePool.build(
            self.generator,
            [record.prompt for record in self.records],
            self.generator.latent_shape(self.targets.resolution, self.targets.resolution),
            options.preserve_pool_size,
            self.command.run.seed,
            self.folder / "preserve.safetensors",
        )

    def _assign(
        self, folder: Path, records: list[Record], failures: list[Failure], seed: int
    ) -> dict[str, Any]:
        return AssignRun(
            self.generator,
            self.targets,
            folder,
            self.command.em.assign(),
            seed=seed,
            resize_mode=self.command.data.resize_mode,
            batch_size=self.command.em.assign_batch_size,
            num_images=self.command.num_images,
        ).run(records, failures)

    def _train(
        self,
        folder: Path,
        manifest: Path,
        options: SftOptions,
        seed: int,
        pool: PreservePool | None,
    ) -> dict[str, Any]:
        pairs, failures = read_manifest(manifest)
        return SftRun(
            self.generator,
            self.targets,
            folder,
            options,
            seed=seed,
            save_minutes=self.command.save_minutes,
        ).run(pairs, failures, pool=pool)

    def _assign_heldout(self, name: str) -> None:
        if not self.heldout:
            return
        with self._stage(f"heldout-{name}") as folder:
            result = self._assign(folder, self.heldout, [], self.command.run.seed)
        kept = ("initial_loss", "best_loss", "losses")
        heldout = self.summary.setdefault("heldout", {"samples": result["samples"]})
        heldout[name] = {key: result[key] for key in kept}

    def _train_directly(self, measure: RandomNoiseMeasure, pool: PreservePool | None) -> None:
        """Baseline: the same number of steps on the same targets, with random noise."""
        options = self.command.em.sft("random", self.command.em.num_cycles)
        manifest = self.folder / _name(1) / "assign" / "manifest.jsonl"
        with self._stage("direct") as folder:
            self._train(folder, manifest, options, self.command.run.seed, pool)
        self._evaluate(measure, "direct")

    def _cycle(self, cycle: int, pool: PreservePool | None) -> None:
        """One E-step on fresh base noises and one M-step on what it found."""
        seed = derived_seed(self.command.run.seed, "cycle", cycle)
        with self._stage(f"{_name(cycle)}/assign") as folder:
            assigned = self._assign(folder, self.records, self.failures, seed)
        with self._stage(f"{_name(cycle)}/sft") as folder:
            manifest = self.folder / _name(cycle) / "assign" / "manifest.jsonl"
            trained = self._train(folder, manifest, self.command.em.sft(), seed, pool)
        self.summary["cycles"].append(
            {
                "cycle": cycle,
                "assign": {k: assigned[k] for k in ("initial_loss", "best_loss", "losses")},
                "sft": {k: trained[k] for k in ("matched_loss_before", "matched_loss_after")},
                "failed": assigned["failed"],
            }
        )

    def _finish(self, settings: dict[str, Any]) -> None:
        """Choose the best cycle, link checkpoints, write summary and failures."""
        noise, cycles = self.summary["random_noise"], self.summary["cycles"]
        last = len(cycles)
        noise["final"] = noise[_name(last)]
        # Without a classifier nothing here tells better from worse, so the last one is taken.
        best = min(
            range(1, last + 1), key=lambda k: (noise[_name(k)].get("frechet_distance", 0.0), -k)
        )
        for name, cycle in (("best", best), ("final", last)):
            link = self.folder / f"checkpoint-{name}"
            link.unlink(missing_ok=True)
            link.symlink_to(Path(_name(cycle)) / "sft" / "checkpoint-final")
        folders = [f"{_name(last)}/assign", "heldout-base"]
        failures = [r for f in folders for r in mend_jsonl(self.folder / f / "failures.jsonl")]
        write_jsonl(self.folder / "failures.jsonl", failures)
        history = mend_jsonl(self.folder / "history.jsonl")
        self.summary |= {
            "best_cycle": best,
            "failed": len(failures),
            "seconds": round(sum(row["seconds"] for row in history), 1),
            "settings": settings,
        }
        write_json(self.folder / "summary.json", self.summary)


def _name(cycle: int) -> str:
    return f"cycle-{cycle:02d}"


def execute(command: EmCommand) -> int:
    """Run the command; see ``run_command`` for exit codes."""
    summary = Em(command).run()

    from oneshot_fast.report import write_em_report

    write_em_report(command.work_dir, public(command))
    print_summary(summary, command.work_dir)
    return SOME_FAILED if summary["failed"] else OK


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """Say what was reached and where it is."""
    noise = dict(summary["random_noise"])
    if "real" in summary:
        noise["real images"] = summary["real"]
    columns = [name for name in ("base", "final", "direct", "real images") if name in noise]
    print(f"\nOn {noise['base']['samples']} random noises:")
    print(f"{'':24}" + "".join(f"{name:>14}" for name in columns))
    for key, label in (
        ("accuracy", "prompt accuracy"),
        ("frechet_distance", "Frechet distance"),
        ("diversity", "diversity"),
        ("drift", "drift from base"),
    ):
        cells = [f"{noise[c][key]:14.3f}" if key in noise[c] else f"{'-':>14}" for c in columns]
        print(f"{label:24}" + "".join(cells))
    print("\nMatching loss, before -> after the E-step -> after the M-step:")
    for row in summary["cycles"]:
        assign, sft = row["assign"], row["sft"]
        print(
            f"cycle {row['cycle']:<4} {assign['initial_loss']:10.4f} -> {assign['best_loss']:.4f}"
            f" -> {sft['matched_loss_after']:.4f}"
        )
    if "heldout" in summary:
        base, final = summary["heldout"]["base"], summary["heldout"]["final"]
        change = 100 * (final["best_loss"] / base["best_loss"] - 1)
        print(
            f"{summary['heldout']['samples']} held-out pairs, assigned: {base['best_loss']:.4f} "
            f"with the base model, {final['best_loss']:.4f} with the final one ({change:+.0f} %)"
        )
    if summary["failed"]:
        print(f"{summary['failed']} records failed: {folder / 'failures.jsonl'}", file=sys.stderr)
    print(f"\ntook {summary['seconds']:.0f} s; checkpoint: {folder / 'checkpoint-final'}")
    print(f"report: {folder / 'report.html'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m oneshot_fast.em``."""
    return run_command("em", EmCommand, execute, argv)


if __name__ == "__main__":
    sys.exit(main())
