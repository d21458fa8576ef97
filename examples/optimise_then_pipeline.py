"""Optimise the noise of a prompt for a reward, then give it to an ordinary diffusers pipeline.

The noises that `python -m oneshot_fast.optimize` keeps are N(0, 1): a pipeline multiplies `latents`
by its scheduler's `init_noise_sigma` itself, so they go in as they are. Scaling them before would
scale twice.

    python examples/optimise_then_pipeline.py [folder or hub id of a one-step SDXL pipeline]
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from oneshot_fast.embedded.pipeline import model_path
from oneshot_fast.optimize import main as optimize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main(model=None, folder=None, steps=20):
    """Return the summary of the optimisation, and the saved and the pipeline's image."""
    model, folder = str(model or model_path()), Path(folder or tempfile.mkdtemp())
    prompt = "a photo of the digit seven"
    flags = ["--model_id", model, "--prompt", prompt, "--reward", "digit"]
    if optimize([*flags, "--steps", str(steps), "--output_dir", str(folder)]) != 0:
        raise SystemExit("the optimisation failed")

    row = json.loads((folder / "manifest.jsonl").read_text().splitlines()[0])
    noise = load_file(folder / row["noise_path"])["z"][row["noise_index"]]

    pipe = StableDiffusionXLPipeline.from_pretrained(model).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        prompt,
        latents=noise[None].to(DEVICE, pipe.unet.dtype),
        num_inference_steps=1,
        guidance_scale=0.0,
    ).images[0]
    image.save(folder / "from_pipeline.png")
    print(f"images: {folder / row['target_image_path']} and {folder / 'from_pipeline.png'}")
    return (
        json.loads((folder / "metrics_summary.json").read_text()),
        folder / row["target_image_path"],
        folder / "from_pipeline.png",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
