"""The recipe that made the packaged weights: VAE, teacher, one-step distillation, classifier.

Each stage writes one file to the output folder and is skipped where that file exists. The same seed
and number of threads give the same weights.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from oneshot_fast.embedded.classifier import DigitClassifier
from oneshot_fast.embedded.digits import load_digits, random_affine, random_style, render
from oneshot_fast.embedded.pipeline import model_path, random_pipeline
from oneshot_fast.recipes.tiny.autoencoder import set_scaling_factor, train_vae
from oneshot_fast.recipes.tiny.config import TrainConfig
from oneshot_fast.recipes.tiny.diffusion import make_pairs, train_student, train_teacher
from oneshot_fast.recipes.tiny.fitting import fit
from oneshot_fast.recipes.tiny.material import Digits, Material
from oneshot_fast.runtime.files import write_safetensors


def train_classifier(config: TrainConfig) -> DigitClassifier:
    """Train the classifier on the training writers' digits in random styles.

    Loss: cross-entropy of the digit plus 10 times the squared error of ink, paper and level.
    """
    draw = torch.Generator().manual_seed(config.seed + 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 3)
        classifier = DigitClassifier().train()
    digits, labels = load_digits("train")
    batch = config.batch_size

    def loss_of_step(_: int) -> Tensor:
        index = torch.randint(len(digits), (batch,), generator=draw)
        style = random_style(batch, draw)
        images = render(digits[index], style, random_affine(batch, 1.5, draw))
        images = images + 0.03 * torch.randn(images.shape, generator=draw)
        features = classifier.features(images)
        look = torch.cat([style.ink, style.paper, style.level[:, None]], 1)
        wrong = F.cross_entropy(
            classifier.digit_head(features), labels[index], label_smoothing=0.05
        )
        return wrong + 10 * F.mse_loss(classifier.style_head(features), look)

    fit("classifier", classifier.parameters(), loss_of_step, config.classifier_steps, lr=2e-3)
    return classifier.eval()


def run_stage(path: Path, modules: nn.ModuleDict, train: Callable[[], None]) -> None:
    """``train`` the modules in place and save them to ``path``, or load them where it exists."""
    if path.is_file():
        modules.load_state_dict(load_file(path))
        return
    train()
    write_safetensors(path, modules.state_dict(), {})


def save_pipeline(pipeline: StableDiffusionXLPipeline, folder: Path) -> None:
    """Write the pipeline as it is packaged: UNet and VAE in fp16, text encoders in fp32.

    transformers gives a model the type of its file, diffusers fp32: so all of it loads as fp32.
    """
    pipeline.unet.half()
    pipeline.vae.half()
    pipeline.save_pretrained(folder)
    pipeline.unet.float()
    pipeline.vae.float()


def train(config: TrainConfig) -> None:
    """Run the stages up to `config.stage` and write `pipeline/` and `classifier.safetensors`."""
    torch.set_num_threads(config.threads)
    if config.stage in ("classifier", "all"):
        path = config.output_dir / "classifier.safetensors"
        if not path.is_file():
            write_safetensors(path, train_classifier(config).state_dict(), {})
    if config.stage == "packaged_teacher":
        train_packaged_teacher(config)
    elif config.stage != "classifier":
        train_pipeline(config, Digits())


def train_packaged_teacher(config: TrainConfig) -> None:
    """Train a teacher's UNet for the packaged VAE and text encoders and write `unet/`, in fp16."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(model_path(), dtype=torch.float32)
    pipeline.unet = random_pipeline(config.seed).unet
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        module.requires_grad_(False)
    unet = nn.ModuleDict({"unet": pipeline.unet})
    stage = config.output_dir / "packaged_teacher.safetensors"
    run_stage(stage, unet, lambda: train_teacher(config, pipeline, Digits()))
    pipeline.unet.half().save_pretrained(config.output_dir / "unet")


def train_pipeline(config: TrainConfig, material: Material) -> None:
    """Run the stages vae, teacher and distill up to `config.stage`, then write `pipeline/`."""
    folder, pipeline = config.output_dir, random_pipeline(config.seed)
    vae = nn.ModuleDict({"vae": pipeline.vae})
    run_stage(folder / "vae.safetensors", vae, lambda: train_vae(config, pipeline.vae, material))
    set_scaling_factor(pipeline.vae, material)
    if config.stage == "vae":
        return
    names = ("unet", "text_encoder", "text_encoder_2")
    teacher = nn.ModuleDict({name: getattr(pipeline, name) for name in names})
    stage = folder / "teacher.safetensors"
    run_stage(stage, teacher, lambda: train_teacher(config, pipeline, material))
    if config.stage == "teacher":
        return
    pairs = folder / "pairs.safetensors"
    if not pairs.is_file():
        write_safetensors(pairs, make_pairs(config, pipeline, material), {})
    student = nn.ModuleDict({"unet": pipeline.unet})
    stage = folder / "student.safetensors"
    run_stage(stage, student, lambda: train_student(config, pipeline, material, load_file(pairs)))
    save_pipeline(pipeline, folder / "pipeline")
