"""A models folder as the download makes it, with small models of the real classes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from reward_samples import (
    SMALL_BLIP,
    SMALL_CLIP,
    head_layout,
    imagereward_layout,
    open_clip_layout,
    random_tensors,
)
from safetensors.torch import load_file, save_file

from oneshot_fast.rewards.aesthetic import HEAD_FILE


def write_models(folder: Path) -> Path:
    """Write one small model of every kind; returns ``folder``."""
    for seed, name in enumerate(("CLIP-ViT-L-14", "PickScore_v1")):
        write_clip_model(folder / name, seed)
    write_clip_tokenizer(folder / "HPSv2")
    for seed, name in enumerate(("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt")):
        state = random_tensors(open_clip_layout(SMALL_CLIP), seed)
        torch.save({"epoch": 1, "state_dict": state}, folder / "HPSv2" / name)
    (folder / "Aesthetic").mkdir()
    torch.save(random_tensors(head_layout(24)), folder / "Aesthetic" / HEAD_FILE)
    write_bert_vocabulary(folder / "ImageReward")
    state = random_tensors(imagereward_layout(SMALL_BLIP))
    torch.save(state, folder / "ImageReward" / "ImageReward.pt")
    return folder


def write_clip_model(folder: Path, seed: int) -> None:
    """A CLIPModel as on the hub: with the buffers that older versions of transformers saved."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    sizes = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 32, "vocab_size": 514, "max_position_embeddings": 16, "eos_token_id": 2}
    vision = {"hidden_size": 64, "image_size": 28, "patch_size": 14}
    config = CLIPConfig(
        text_config=sizes | text | {"bos_token_id": 0},
        vision_config=sizes | vision,
        projection_dim=24,
        initializer_factor=8.0,
    )
    write_clip_tokenizer(folder)
    CLIPModel(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    tensors["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_clip_tokenizer(folder: Path) -> None:
    """CLIP's byte-level vocabulary without merges: every letter is a token."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = [chr(byte) for byte in plain] + [chr(256 + k) for k in range(len(others))]
    names = [*letters, *(letter + "</w>" for letter in letters)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: k for k, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def write_bert_vocabulary(folder: Path) -> list[str]:
    """BERT's vocab.txt with a few words, which it returns."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "boat", "on", "the", "water"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return words
