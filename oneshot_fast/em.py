"""The main job: alternate assignment (E-step) and training (M-step), and measure what it brings."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from oneshot_fast.cli import (
    OK,
    SOME_FAILED,
    DataOptions,
    ModelOptions,
    RunOptions,
    public,
    run_command,
)
from oneshot_fast.em_run import EmRun
from oneshot_fast.matching import AssignOptions
from oneshot_fast.training import SftOptions


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
    train_batch_size: int = 8
    """M-step: matched pairs per step."""
    train_lr: float | None = None
    """M-step: AdamW's learning rate; by default 1e-5, for the embedded data 1e-4."""
    train_weight_decay: float = 0.01
    """M-step: AdamW's decoupled weight decay."""
    train_max_grad_norm: float = 1.0
    """M-step: gradients are scaled down to this norm."""
    train_gradient_accumulation_steps: int = 1
    """M-step: parts that every batch is computed in; less memory, the same result to rounding."""
    train_gradient_checkpointing: bool = False
    """M-step: recompute the UNet's activations in the backward pass; less memory, same result."""
    train_optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """M-step: adamw8bit keeps the moments in 8 bits (torchao: pip install torchao)."""
    train_weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """M-step: type of the trained weights; bfloat16 rounds stochastically, needs adamw8bit."""
    train_use_ema: bool = False
    """M-step: end with an exponential moving average of the weights."""
    latent_loss_weight: float = 1.0
    """Both steps: weight of the mean squared error between the latents."""
    pixel_l1_weight: float = 0.0
    """Both steps: weight of the mean absolute error between the images; 0 never decodes."""
    preserve_latent_weight: float | None = None
    """M-step: weight of the latent distance to the initial generator on random noise; by default
    0.5, for the embedded data 0, since all of its targets are in the new style."""
    preserve_pixel_weight: float | None = None
    """M-step: the same in pixels, by default 0.05 and 0; 0 never decodes."""
    preserve_batch_size: int | None = None
    """M-step: random noises per step for the preserve losses; by default train_batch_size."""
    preserve_pool_size: int = 512
    """M-step: random noises whose initial outputs are computed once."""

    def resolve(self, embedded: bool) -> EmOptions:
        """Fill in the defaults that differ between the embedded data and a user's own."""
        defaults = {
            "train_lr": 1e-4 if embedded else 1e-5,
            "preserve_latent_weight": 0.0 if embedded else 0.5,
            "preserve_pixel_weight": 0.0 if embedded else 0.05,
        }
        missing: dict[str, Any] = {k: v for k, v in defaults.items() if getattr(self, k) is None}
        return dataclasses.replace(self, **missing)

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
        """Options of the M-step, or of ``cycles`` M-steps' worth of direct SFT; resolved."""
        assert self.train_lr is not None
        assert self.preserve_latent_weight is not None
        assert self.preserve_pixel_weight is not None
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
            gradient_accumulation_steps=self.train_gradient_accumulation_steps,
            gradient_checkpointing=self.train_gradient_checkpointing,
            optimizer=self.train_optimizer,
            weights_dtype=self.train_weights_dtype,
            use_ema=self.train_use_ema,
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
    dry_run: bool = False
    """Print parameters, memory by part, disk and time needed of both steps, from a few timed ones
    on random data; nothing is written."""
    em: EmOptions = EmOptions()
    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    run: RunOptions = RunOptions()


def execute(command: EmCommand) -> int:
    """Run the command; see ``run_command`` for exit codes."""
    own_data = command.data.data_root is not None
    model_id = command.initial_model_id or ("stabilityai/sdxl-turbo" if own_data else "tiny")
    options = command.em.resolve(embedded=not own_data)
    command = dataclasses.replace(command, initial_model_id=model_id, em=options)
    if command.dry_run:
        print_plan(command)
        return OK
    summary = EmRun(command).run()

    from oneshot_fast.processes import is_main
    from oneshot_fast.report import write_em_report

    if is_main():
        write_em_report(command.work_dir, public(command))
        print_summary(summary, command.work_dir)
    return SOME_FAILED if summary["failed"] else OK


def print_plan(command: EmCommand) -> None:
    """Say what the command would need; ``command.em`` is resolved."""
    em, data = command.em, command.data
    em.assign().check()
    em.sft().check()

    from oneshot_fast.dry_run import assign_plan, sft_plan
    from oneshot_fast.tiny.dataset import TRAIN_PAIRS

    if data.data_root is None:
        samples = len(range(TRAIN_PAIRS)[data.start_index :][: data.max_samples])
    else:
        samples = len(data.read(data.data_root)[0])
    generator = command.model.load(command.initial_model_id or "tiny", master_weights=True)
    side = data.resolution or generator.image_size
    e_step = assign_plan(
        generator,
        em.assign(),
        resolution=side,
        batch_size=em.assign_batch_size,
        samples=samples,
        num_images=command.num_images,
    )
    m_step = sft_plan(generator, em.sft(), resolution=side, samples=samples)
    assert e_step.seconds is not None
    assert m_step.seconds is not None
    hours = em.num_cycles * (e_step.seconds + m_step.seconds) / 3600
    print(f"E-step\n{e_step}\n\nM-step\n{m_step}\n")
    print(f"in all, {em.num_cycles} cycles: {hours:.2f} h, without the evaluations")


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
    truncated = summary["cycles"][-1]["truncated_prompts"]
    if truncated:
        print(f"warning: {truncated} prompts are longer than 77 tokens; cut off", file=sys.stderr)
    if summary["failed"]:
        print(f"{summary['failed']} records failed: {folder / 'failures.jsonl'}", file=sys.stderr)
    print(f"\ntook {summary['seconds']:.0f} s; checkpoint: {folder / 'checkpoint-final'}")
    print(f"report: {folder / 'report.html'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m oneshot_fast.em``."""
    return run_command("em", EmCommand, execute, argv)


if __name__ == "__main__":
    sys.exit(main())
