"""Decoders and precisions for speed and memory: equal to the plain ones, to what they promise."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from oneshot_fast.errors import ModelError, UserError
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.decoder import Decoder
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.generators.precision import gradient_scale, scale_gradient
from oneshot_fast.generators.sdxl import SdxlGenerator


def latents(B: int = 2) -> Tensor:
    return torch.randn(B, 4, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()


def decoded(decoder: Decoder) -> tuple[Tensor, Tensor]:
    """Images, and the gradient of a mean over them."""
    x = latents()
    raw = decoder.raw(x)
    (gradient,) = torch.autograd.grad(raw.square().mean(), x)
    assert raw.dtype == gradient.dtype == torch.float32
    return raw.detach(), gradient


def error(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"decoder_dtype": "float32"}, 0.0),
        ({"decoder_dtype": "bfloat16"}, 0.02),
        ({"decoder_dtype": "float16"}, 0.002),
        ({"decoder_checkpointing": True}, 0.0),
        ({"decoder_tiling": 8}, 0.0),
        ({"channels_last": True}, 1e-5),
    ],
    ids=str,
)
def test_other_ways_to_decode_give_the_same(
    tiny: Generator, options: dict[str, Any], bound: float
) -> None:
    expected = decoded(tiny.decoder)
    generator = ModelOptions(**options).load("tiny")
    for ours, plain in zip(decoded(generator.decoder), expected, strict=True):
        assert error(ours, plain) <= bound
    same = "dtype" not in str(options) or options["decoder_dtype"] == "float32"
    changed = options.get("decoder_tiling") is not None or not same
    assert (generator.fingerprint() != tiny.fingerprint()) == changed
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        generator.encode_image(image), tiny.encode_image(image), rtol=0, atol=1e-5
    )


def test_tiles_are_blended_into_one_image(tiny: Generator) -> None:
    tiled = ModelOptions(decoder_tiling=4, decoder_checkpointing=True).load("tiny").decoder
    whole, tiles = decoded(tiny.decoder), decoded(tiled)
    assert tiles[0].shape == whole[0].shape and tiles[1].isfinite().all()
    # the first tile has no seam: inside, only the padding and the statistics differ
    assert 0 < error(tiles[0], whole[0]) < 0.6
    with pytest.raises(UserError, match="decoder_tiling is 6; give a multiple of 4"):
        tiled.tile(6)


def test_less_memory_is_kept_with_checkpointing(tiny: Generator) -> None:
    def kept(decoder: Decoder) -> int:
        sizes: list[int] = []

        def pack(x: Tensor) -> Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            decoder.raw(latents())
        return sum(sizes)

    assert kept(ModelOptions(decoder_checkpointing=True).load("tiny").decoder) < 0.4 * kept(
        tiny.decoder
    )


def save_tiny_decoder(folder: Path, channels: int = 4) -> AutoencoderTiny:
    torch.manual_seed(0)
    sides, blocks = (8, 8, 8, 8), (1, 1, 1, 1)
    vae = AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=sides,
        decoder_block_out_channels=sides,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    )
    vae.save_pretrained(folder)
    return vae


def test_a_tiny_decoder_takes_the_place_of_the_vae(
    tiny: Generator, small_data: Path, tmp_path: Path, call: Any
) -> None:
    vae = save_tiny_decoder(tmp_path / "decoder")
    generator = ModelOptions(decoder_id=str(tmp_path / "decoder")).load("tiny")
    x = latents()
    torch.testing.assert_close(generator.decode_raw(x), vae.decode(x).sample)
    expected = (vae.decode(x).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(generator.decode(x), expected)
    assert generator.fingerprint() != tiny.fingerprint()
    with pytest.raises(UserError, match="not for a tiny decoder"):
        ModelOptions(decoder_id=str(tmp_path / "decoder"), decoder_tiling=8).load("tiny")
    ended = call(
        "assign", "--data_root", small_data, "--output_root", tmp_path / "run", "--model_id",
        "tiny", "--steps", 2, "--pixel_l1_weight", 1, "--decoder_id", tmp_path / "decoder",
    )  # fmt: skip
    assert ended.code == 0 and "assigned 6 of 6" in ended.out


def test_wrong_decoders_are_refused_in_one_line(tiny: Generator, tmp_path: Path) -> None:
    save_tiny_decoder(tmp_path / "other", channels=16)
    with pytest.raises(ModelError, match="is for 16 latent channels, the model has 4"):
        ModelOptions(decoder_id=str(tmp_path / "other")).load("tiny")
    with pytest.raises(ModelError, match=r"cannot use decoder .*nowhere"):
        ModelOptions(decoder_id=str(tmp_path / "nowhere")).load("tiny")
    save_tiny_decoder(tmp_path / "short")
    path = tmp_path / "short/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.layers.0.bias"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"cannot use decoder .*no decoder.layers.0.bias"):
        ModelOptions(decoder_id=str(tmp_path / "short")).load("tiny")
    generator = ModelOptions().load("tiny")
    generator.pipe.vae.register_to_config(force_upcast=True)
    with pytest.raises(ModelError, match="overflows in float16"):
        type(generator)(generator.pipe).decoder.set_dtype(torch.float16)


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.2), ("float16", 0.03)])
def test_half_precision_keeps_noise_and_gradients_in_single(
    tiny: Generator, dtype: Any, bound: float
) -> None:
    generator = ModelOptions(dtype=dtype).load("tiny")
    assert generator.denoiser.dtype == getattr(torch, dtype)
    found = []
    for g in (generator, tiny):
        z = latents()
        made = g.predict(z, g.encode_prompts(["a digit", "another"]))
        # as small as where a search nears its end; unscaled, float16 would be off by a fifth
        loss = 1e-3 * made.latents.square().mean()
        (gradient,) = torch.autograd.grad(loss, z)
        assert made.output.dtype == made.x.dtype == gradient.dtype == torch.float32
        found.append(gradient)
    assert error(*found) < bound


def test_a_small_gradient_survives_float16() -> None:
    elements = 4 * 64 * 64
    scale = gradient_scale(torch.float16, elements)
    assert scale == elements and gradient_scale(torch.bfloat16, elements) == 1
    weight = torch.full((), 0.5, dtype=torch.float16)
    gradients = []
    for s in (scale, 1.0):
        x = torch.full((elements,), 2e-4).requires_grad_()
        y = scale_gradient((scale_gradient(x, 1 / s).half() * weight).float(), s)
        (gradient,) = torch.autograd.grad(y.square().mean(), x)
        gradients.append(gradient)
    expected = torch.full((elements,), 2e-4 * 0.5 / elements)
    assert error(gradients[0], expected) < 0.01
    assert not gradients[1].any()


def test_a_compiled_unet_gives_the_same(tiny: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, with gradients; the machine code that a compiler makes of it is torch's affair."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = dict(tiny.denoiser.config)
    config |= {
        "block_out_channels": [16],
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
        "mid_block_type": None,
        "layers_per_block": 0,  # one on the way up
        "transformer_layers_per_block": 1,
        "attention_head_dim": [4],
    }
    small = type(tiny.denoiser).from_config(config)
    parts = {**tiny.pipe.components, "unet": small}
    generator = SdxlGenerator(type(tiny.pipe)(**parts))
    prompts = generator.encode_prompts(["a digit", "another"])
    found = []
    for _ in range(2):
        z = latents()
        (gradient,) = torch.autograd.grad(generator.latents(z, prompts).square().mean(), z)
        found.append(gradient)
        generator.compile()
    assert generator.is_compiled and error(found[1], found[0]) < 1e-5


def test_a_compile_mode_needs_compile() -> None:
    with pytest.raises(UserError, match="--compile_mode is for --compile"):
        ModelOptions(compile_mode="max-autotune").load("tiny")
