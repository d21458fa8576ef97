"""The embedded generator: a StableDiffusionXLPipeline of SDXL-Turbo's shape, for a CPU.

Two CLIP text encoders with tokenizers of an own small vocabulary, a UNet with text-and-time
embedding, a VAE with 4 latent channels and factor 8, and SDXL-Turbo's scheduler settings. Images
are 64 x 64 pixels, latents [4, 8, 8].
"""

import itertools
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from oneshot_fast.embedded.digits import DIGIT_WORDS, IMAGE_SIZE

LATENT_SIZE = 8
TEXT_WIDTH = 32
OTHER_WORDS = (
    *("a", "an", "the", "of", "in", "on", "with", "and", "handwritten", "digit", "number"),
    *("photo", "image", "thick", "thin", "black", "white", "blue", "red", "ink", "paper"),
)
START, END = "<|startoftext|>", "<|endoftext|>"


def model_path() -> Path:
    """The packaged model: an ordinary diffusers folder for StableDiffusionXLPipeline."""
    return Path(__file__).parent / "weights"


def teacher_path() -> Path:
    """UNet and scheduler of the packaged teacher, whose other parts are those of `model_path`."""
    return Path(__file__).parent / "teacher"


def build_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level BPE in which each known word is one token and any other text falls into bytes.

    Vocabulary (token to id) and merges are in CLIP's format.
    """
    letters = list(bytes_to_unicode().values())
    merges: dict[tuple[str, str], None] = {}
    # Longest first and left to right: no short word's merge ("an") breaks a long word apart.
    for word in sorted(DIGIT_WORDS + OTHER_WORDS, key=len, reverse=True):
        parts = [*word[:-1], word[-1] + "</w>"]
        for head, tail in itertools.pairwise(itertools.accumulate(parts)):
            merges[head, tail[len(head) :]] = None
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += [head + tail for head, tail in merges] + [START, END]
    return {token: index for index, token in enumerate(tokens)}, list(merges)


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer over `build_vocabulary`, 77 tokens long, padded with the end token."""
    vocabulary, merges = build_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def _text_config(tokenizer: CLIPTokenizer, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _build_unet() -> UNet2DConditionModel:
    time_embedding, time_ids = 8, 6
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=2 * TEXT_WIDTH,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_embedding,
        projection_class_embeddings_input_dim=time_ids * time_embedding + TEXT_WIDTH,
    )


def _build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=IMAGE_SIZE,
        block_out_channels=(16, 16, 32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        latent_channels=4,
        force_upcast=False,
    )


def random_pipeline(seed: int) -> StableDiffusionXLPipeline:
    """The pipeline with random fp32 weights on the CPU; the same seed gives the same weights.

    The global random state is left as it was.
    """
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(
            vae=_build_vae(),
            text_encoder=CLIPTextModel(_text_config(tokenizer, "quick_gelu")),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer, "gelu")),
            tokenizer=tokenizer,
            tokenizer_2=build_tokenizer(),
            unet=_build_unet(),
            scheduler=EulerAncestralDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                timestep_spacing="trailing",
                prediction_type="epsilon",
            ),
            # As for SDXL-Turbo, the empty prompt is zeros; no watermark library is asked for.
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
    for module in (pipeline.vae, pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        module.eval()
    return pipeline
