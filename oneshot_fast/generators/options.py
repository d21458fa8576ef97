"""How a generator is loaded: the flags of every command that takes one."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import UseAppendAction

from oneshot_fast.errors import UserError, require

if TYPE_CHECKING:
    from oneshot_fast.generators.base import Generator


@dataclass(frozen=True)
class ModelOptions:
    """How the generator is loaded, and where it runs."""

    variant: str | None = None
    """Weight variant, such as fp16; plain weights serve where the model has none."""
    revision: str | None = None
    """Hub revision."""
    model_config: str | None = None
    """Folder or hub id with the pipeline's configs, and with the networks that the file lacks; only
    for a .safetensors file."""
    timestep: float | None = None
    """Timestep at which the one step begins, for a model that was distilled for another than the
    noisiest (DMD2: 399, Hyper-SD's UNet: 800); known ones are recognised by their names."""
    lora: UseAppendAction[tuple[str, ...]] = ()
    """FILE or FILE:WEIGHT of a LoRA for this model (.safetensors of diffusers, peft or kohya's
    scripts, RTDMD's generator_ema.pt, or a folder that holds one), added to the weights in their
    files' type; may be given several times."""
    num_inference_steps: int = 1
    """Denoising steps, by the pipeline's scheduler; one of Euler, EulerAncestral, LCM, TCD, DDIM,
    DDPM, FlowMatchEuler, SCM or our CPS takes several. Noise that it draws in later ones is the
    same in all runs for the same sample."""
    step_list: tuple[float, ...] = ()
    """Several steps: the timesteps that they begin at, such as 1000 750 500 250, of a flow before
    its scheduler shifts them, of SANA-Sprint angles; of a longer list the first are taken. By
    default the scheduler's."""
    guidance_scale: float = 1.0
    """Several steps: classifier-free guidance; 1: none, as distilled models are used."""
    embedded_guidance: float | None = None
    """For a model that is told of guidance (FLUX.1-dev, LCM, SANA-Sprint): its scale; by default
    what it was saved with, students of distill with 1, or its pipeline's (3.5, 8.5, 4.5)."""
    backprop_steps: int | None = None
    """Several steps: differentiate only the last so many evaluations, for less time; gradients pass
    the others as if their output were given. By default all; each is computed again in the backward
    pass, for little memory."""
    cps_eta: float | Literal["ancestral"] | None = None
    """Several steps: draw fresh noise by coefficients-preserving sampling at the noise levels of
    the pipeline's scheduler, from 0 (none: Euler) to 1 (all, as LCM does), or ancestral."""
    scheduler_eta: float = 0.0
    """Several steps: eta of the pipeline's own scheduler, as pipe(eta=...): how much noise DDIM or
    TCD (there called gamma, too) draws, from 0 to 1."""
    device: str | None = None
    """cuda, cuda:1, cpu, ...; by default cuda where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type the denoiser computes in; auto is float32 on the CPU, bfloat16 on a GPU. Noise, rotation
    and losses are float32."""
    channels_last: bool = False
    """Keep weights in channels_last order, which suits convolutions in half precision on a GPU."""
    compile: bool = False
    """Compile the denoiser (torch.compile), once per batch size; the first start takes minutes,
    later ones read torch's cache on disk."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """For --compile; reduce-overhead replays CUDA graphs, which helps small batches."""
    decoder_id: str | None = None
    """Tiny decoder (AutoencoderTiny: folder or hub id) that takes the VAE's place wherever latents
    are decoded: the pixel loss, and images shown."""
    decoder_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type the decoder computes in; auto: the denoiser's, but float32 for a VAE that overflows."""
    decoder_checkpointing: bool = False
    """Pixel loss: recompute the decoder's activations in the backward pass, for less memory."""
    decoder_tiling: int = 0
    """Pixel loss: decode in overlapping tiles of so many latent pixels (32, say); 0: as a whole."""
    cache_dir: Path | None = None
    """Folder that keeps encoded prompts and target images (safetensors, named by content) for other
    runs and commands too; by default each run encodes them anew."""

    @property
    def flags(self) -> list[str]:
        """Arguments of a command line that give all that is not a default."""
        found = list[str]()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if field.name == "lora":  # given once for each
                found += [part for one in value for part in ("--lora", one)]
                continue
            found.append(f"--{field.name}")
            if value is not True:
                found += map(str, value if isinstance(value, tuple) else (value,))
        return found

    def load(
        self,
        model_id: str,
        master_weights: bool = False,
        lora_alpha: float | None = None,
        student: bool = False,
        stack: bool = False,
    ) -> "Generator":
        """Load a generator: a diffusers folder, hub id, .safetensors file or packaged model.

        With ``master_weights`` it keeps float32 weights and computes in ``dtype`` by autocast;
        ``lora_alpha`` is that of LoRA files that do not say it; a ``student`` is a few-step
        generator even of one step, see ``FewStepGenerator.over``. With ``stack`` the LoRAs are
        not merged but stay adapters of the denoiser, see ``PipelineGenerator.stack``.
        """
        import diffusers
        import torch
        import transformers

        from oneshot_fast.generators.few_step import FewStepGenerator, check_steps
        from oneshot_fast.generators.loading import load_generator
        from oneshot_fast.generators.lora_files import LoraFile

        require(
            self.model_config is None or model_id.endswith(".safetensors"),
            f"--model_config is for a .safetensors file, which {model_id} is not; leave it out",
        )
        taken = self.backprop_steps, self.cps_eta, self.scheduler_eta, self.step_list
        self._check_steps()
        check_steps(self.num_inference_steps, self.guidance_scale, *taken)
        if self.compile_mode != "default" and not self.compile:
            raise UserError("--compile_mode is for --compile; give both")
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        loras = tuple(LoraFile.parse(text, lora_alpha) for text in self.lora)
        generator = load_generator(
            model_id,
            device=self.device,
            dtype=None if self.dtype == "auto" else getattr(torch, self.dtype),
            master_weights=master_weights,
            variant=self.variant,
            revision=self.revision,
            model_config=self.model_config,
            timestep=self.timestep,
            lora=() if stack else loras,
            several_steps=student or self.num_inference_steps > 1,
        )
        if stack and loras:
            generator.stack(loras)
        if self.embedded_guidance is not None:
            require(
                getattr(generator, "embeds_guidance", False),
                f"--embedded_guidance: {model_id} is told of no guidance; leave it out",
            )
            generator.embedded_guidance = self.embedded_guidance  # type: ignore[attr-defined]
        if student or self.num_inference_steps > 1:
            from oneshot_fast.generators.pipeline import PipelineGenerator

            if not isinstance(generator, PipelineGenerator):
                raise UserError(
                    f"{model_id} is no pipeline of diffusers, which a teacher has to be"
                    if student
                    else f"{model_id} takes one step; leave --num_inference_steps out"
                )
            generator = FewStepGenerator.over(
                generator,
                self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                backprop_steps=self.backprop_steps,
                eta=self.cps_eta,
                scheduler_eta=self.scheduler_eta,
                step_list=self.step_list,
                student=student,
            )
        dtype = None if self.decoder_dtype == "auto" else getattr(torch, self.decoder_dtype)
        tuned = self.decoder_id, dtype, self.decoder_checkpointing, self.decoder_tiling
        if any(tuned):
            generator.tune_decoder(*tuned)
        if self.cache_dir is not None:
            generator.use_cache(self.cache_dir)
        if self.channels_last:
            generator.use_channels_last()
        if self.compile:
            generator.compile(self.compile_mode)
        return generator

    def _check_steps(self) -> None:
        count = self.num_inference_steps
        for name in ("guidance_scale", "backprop_steps", "cps_eta", "scheduler_eta", "step_list"):
            require(
                count > 1 or getattr(self, name) == getattr(ModelOptions, name),
                f"--{name} has no effect without --num_inference_steps above 1; give it, too",
            )
        told = self.embedded_guidance
        require(
            told is None or 0 <= told < math.inf,
            f"embedded_guidance is {told}; give 0 or a positive number",
        )
        require(
            count == 1 or self.timestep is None,
            "--timestep is where one step begins; leave it or --num_inference_steps out",
        )
        require(
            count == 1 or self.compile_mode != "reduce-overhead",
            "CUDA graphs keep the results of one evaluation; leave --compile_mode reduce-overhead "
            "or --num_inference_steps out",
        )


def check_sampler(manifest: Path, model: ModelOptions, otherwise: str) -> None:
    """Raise UserError if the run that found the pairs, where it is known, took other steps.

    ``otherwise`` is the flag by which its noises are not taken.
    """
    from oneshot_fast.runtime.files import read_json

    path = manifest.parent / "run.json"
    if manifest.parent.name == "training":  # of optimize
        path = manifest.parent.parent / "run.json"
    found = read_json(path) if path.is_file() else {}
    used = {name: getattr(model, name) for name in ("num_inference_steps", "guidance_scale")}
    used |= {name: getattr(model, name) for name in ("cps_eta", "scheduler_eta")}
    used |= {"step_list": model.step_list[: model.num_inference_steps]}
    for name, here in used.items() if found else ():
        there = found.get(name, getattr(ModelOptions, name))  # one step notes none of them
        require(
            here == (tuple(there) if isinstance(there, list) else there),
            f"{manifest}: its noises were found with {name} {there}, not {here}; give --{name} as "
            f"there, or {otherwise}",
        )
