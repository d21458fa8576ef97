"""Download models: the generator, those of rewards and measures, checked by size and hash."""

import errno
import functools
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from oneshot_fast.cli import OK, run_command
from oneshot_fast.runtime.hub import RemoteFile, fetch, list_files

Name = Literal[
    "sdxl-turbo", "CLIP-ViT-L-14", "DINOv2-L-14", "Aesthetic", "PickScore_v1", "ImageReward",
    "HPSv2",
]  # fmt: skip
# files by repository on the hub; * matches any name in one folder
CLIP, CLIP_TOKENIZER = "openai/clip-vit-large-patch14", ("vocab.json", "merges.txt")
MODELS: Mapping[Name, Mapping[str, tuple[str, ...]]] = {
    "sdxl-turbo": {
        "stabilityai/sdxl-turbo": (
            "model_index.json",
            "scheduler/*.json",
            "tokenizer/*",
            "tokenizer_2/*",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "text_encoder_2/config.json",
            "text_encoder_2/model.safetensors",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
        )
    },
    "CLIP-ViT-L-14": {CLIP: ("config.json", "model.safetensors", *CLIP_TOKENIZER)},
    "DINOv2-L-14": {"facebook/dinov2-large": ("config.json", "model.safetensors")},
    "Aesthetic": {"camenduru/improved-aesthetic-predictor": ("sac+logos+ava1-l14-linearMSE.pth",)},
    # both were trained with CLIP's vocabulary
    "PickScore_v1": {
        "yuvalkirstain/PickScore_v1": ("config.json", "model.safetensors"),
        CLIP: CLIP_TOKENIZER,
    },
    "HPSv2": {
        "xswu/HPSv2": ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"),
        CLIP: CLIP_TOKENIZER,
    },
    "ImageReward": {
        "THUDM/ImageReward": ("ImageReward.pt",),
        "google-bert/bert-base-uncased": ("vocab.txt", "tokenizer_config.json"),
    },
}
# of copies that are not their authors' own
SHA256 = {
    "sac+logos+ava1-l14-linearMSE.pth": (
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
    )
}


@dataclass(frozen=True)
class DownloadCommand:
    """Download models into a folder each, from the Hugging Face hub (HF_ENDPOINT: a mirror).

    What is there already is checked and kept, a broken transfer goes on where it stopped, and a
    file whose size or hash is not the hub's is refused.
    """

    only: tuple[Name, ...] = ()
    """These models; by default all of them."""
    models_dir: Path = Path("models")
    """Folder that gets one folder per model."""
    dry_run: bool = False
    """Say licences and bytes, and download nothing."""


def execute(command: DownloadCommand) -> int:
    """Run the command; returns the exit code.

    Raises:
        ModelError: If the hub cannot be asked, or serves something else than it states.
        OSError: If there is no space.
    """
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    files: list[RemoteFile] = []
    for model in dict.fromkeys(command.only) or MODELS:
        for repository, patterns in MODELS[model].items():
            found, licence = list_files(repository, patterns, command.models_dir / model, SHA256)
            total = sum(file.size for file in found)
            print(f"{model}: {total:,} bytes of {repository}, licence {licence}")
            files += found
    missing = sum(file.size for file in files if not file.is_there)
    print(f"to download: {missing:,} bytes of {sum(file.size for file in files):,}", flush=True)
    if command.dry_run:
        return OK
    command.models_dir.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(command.models_dir).free < missing - sum(
        file.partial_size for file in files
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(command.models_dir))
    for file in files:
        fetch(file)
    print(f"all files are in {command.models_dir}, sizes and hashes checked")
    return OK


main = functools.partial(run_command, "download", DownloadCommand, execute)

if __name__ == "__main__":
    sys.exit(main())
